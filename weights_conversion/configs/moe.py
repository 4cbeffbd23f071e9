"""Experts and their router: config.json <-> Moe <-> Megatron-Core's args.

Sources: transformers' modeling_*.py (which scores are made to sum up to 1), Megatron-Core's moe_utils.py
(topk_routing_with_score_function) and transformer_config.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from weights_conversion.config import ModelConfig, Moe
from weights_conversion.configs import moe_layers
from weights_conversion.configs.config_class import ConfigClass, ExpertKeys
from weights_conversion.configs.moe_checks import impossible

_GROUPED = "group_limited_greedy"


# --- config.json ------------------------------------------------------------------------------------------------------


def read_hf(known: ConfigClass, full: Mapping[str, Any], num_layers: int) -> Moe | list[str]:
    """The experts of a config.json, or what is wrong with it, in words that follow "config.json has".

    `full` has the class's defaults; `known.experts` is not None.
    """
    keys = known.experts
    assert keys is not None  # the caller has asked
    problems: list[str] = []
    experts = _count(known, full, keys.experts[0], problems)
    ffn = _count(known, full, keys.ffn, problems)
    topk = _count(known, full, "num_experts_per_tok", problems)
    shared = _count(known, full, keys.shared, problems) if keys.shared else 0
    latent = _count(known, full, "moe_latent_size", problems) if full.get("moe_latent_size") is not None else None
    layers = moe_layers.read_hf(keys, full, num_layers)
    if isinstance(layers, str):
        problems.append(layers)
    scaling = full.get("routed_scaling_factor") if keys.scaled else None
    if scaling is not None and not _is_positive(scaling):
        problems.append(f"routed_scaling_factor {scaling!r}, where a positive number was expected")
    clamp = float(full[keys.clamp]) if keys.clamp and _is_positive(full.get(keys.clamp)) else None
    if keys.clamp and clamp is None:
        problems.append(f"{keys.clamp} {full.get(keys.clamp)!r}, where a positive number was expected")
    groups = _read_groups(keys, full, problems)
    normed = keys.norm if keys.norm is not None else bool(full.get("norm_topk_prob"))
    if problems or isinstance(layers, str):
        return problems
    softmax = keys.score == "softmax"
    moe = Moe(
        experts, ffn, topk, layers,
        pre_softmax=softmax and not normed,
        score_function=keys.score,
        scaling_factor=None if scaling in (None, 1) else float(scaling),
        expert_bias=keys.bias,
        num_groups=groups[0],
        group_topk=groups[1],
        shared_ffn_hidden_size=shared * (ffn if keys.shared == "n_shared_experts" else 1),
        shared_gate=keys.gate,
        biased=keys.biased,
        clamp=clamp,
        latent_size=latent,
    )  # fmt: skip
    wrong = impossible(moe)
    # A sigmoid's scores are divided by their sum where a token has more than one expert, and there alone.
    if not softmax and normed != (topk > 1):
        wrong.append(f"norm_topk_prob {normed} with {topk} experts per token, which Megatron-Core does the other way")
    return wrong or moe


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _count(known: ConfigClass, full: Mapping[str, Any], key: str, problems: list[str]) -> int:
    stated = {name: full[name] for name in known.spellings(key) if full.get(name) is not None}
    value = next(iter(stated.values()), None)
    if len(set(map(repr, stated.values()))) > 1:
        problems.append(f"two values of one field, {stated}; remove the wrong one")
    elif type(value) is not int or value <= 0:
        problems.append(f"{key} {value!r}, where a positive int was expected")
    return value if type(value) is int else 0


def _read_groups(keys: ExpertKeys, full: Mapping[str, Any], problems: list[str]) -> tuple[int | None, int | None]:
    """(groups that experts are in, groups that a token may choose from); one group is none."""
    if not keys.groups or (keys.groups == "method" and full.get("topk_method") != _GROUPED):
        return None, None
    number, chosen = full.get("n_group"), full.get("topk_group")
    for key, value in (("n_group", number), ("topk_group", chosen)):
        if type(value) is not int or value <= 0:
            problems.append(f"{key} {value!r}, where a positive int was expected")
            return None, None
    if number == 1 and chosen != 1:
        problems.append(f"{chosen} groups per token (topk_group), and only 1 group (n_group)")
    return (None, None) if number == 1 else (number, chosen)


def write_hf(known: ConfigClass, moe: Moe, result: dict[str, Any]) -> None:
    """Writes the experts into a config.json. Keys that the source had stay as they are where they say the same."""
    keys = known.experts
    assert keys is not None  # the caller has asked
    stated = set(result)
    full = known.completed(result)
    values: dict[str, Any] = dict.fromkeys(keys.experts, moe.num_experts)
    values |= {key: moe.num_experts for key in known.spellings(keys.experts[0]) if key in stated}
    chosen = known.spellings("num_experts_per_tok")
    values |= {keys.ffn: moe.ffn_hidden_size} | dict.fromkeys(stated.intersection(chosen) or chosen, moe.topk)
    if "norm_topk_prob" in known.defaults:
        softmax = moe.score_function == "softmax"
        values["norm_topk_prob"] = not moe.pre_softmax if softmax else moe.topk > 1
    if keys.scaled:
        values["routed_scaling_factor"] = 1.0 if moe.scaling_factor is None else moe.scaling_factor
    if keys.shared:
        count = keys.shared == "n_shared_experts"
        values[keys.shared] = moe.shared_ffn_hidden_size // (moe.ffn_hidden_size if count else 1)
    if keys.clamp:
        values[keys.clamp] = moe.clamp
    if keys.latent:
        values["moe_latent_size"] = moe.latent_size
    if keys.groups:
        values |= _write_groups(keys, moe, full, stated)
    layers = moe_layers.write_hf(keys, moe.layers)
    if not stated.issuperset(layers) or moe_layers.read_hf(keys, full, len(moe.layers)) != moe.layers:
        values |= layers
    result.update({key: value for key, value in values.items() if key not in stated or result[key] != value})


def _write_groups(keys: ExpertKeys, moe: Moe, full: Mapping[str, Any], stated: set[str]) -> dict[str, Any]:
    written = {"n_group", "topk_group"} | ({"topk_method"} if keys.groups == "method" else set())
    same = _read_groups(keys, full, []) == (moe.num_groups, moe.group_topk)
    if same and stated >= written:
        return {}
    method = {"topk_method": "greedy" if moe.num_groups is None else _GROUPED} if keys.groups == "method" else {}
    return {"n_group": moe.num_groups or 1, "topk_group": moe.group_topk or 1, **method}


# --- Megatron-Core ----------------------------------------------------------------------------------------------------

# Moe's field -> its arg, of those that are the same value in both.
ARGS = {
    "num_experts": "num_experts",
    "ffn_hidden_size": "moe_ffn_hidden_size",
    "topk": "moe_router_topk",
    "pre_softmax": "moe_router_pre_softmax",
    "score_function": "moe_router_score_function",
    "scaling_factor": "moe_router_topk_scaling_factor",
    "expert_bias": "moe_router_enable_expert_bias",
    "num_groups": "moe_router_num_groups",
    "group_topk": "moe_router_group_topk",
    "shared_ffn_hidden_size": "moe_shared_expert_intermediate_size",
    "shared_gate": "moe_shared_expert_gate",
    "biased": "add_bias_linear",
    "clamp": "activation_func_clamp_value",
    "latent_size": "moe_latent_size",
    "layers": "moe_layer_freq",
}
# What the args of a family with experts may say beside: read here, and refused by value.
READ = frozenset({*ARGS.values(), "num_moe_experts"})


ROUTER_DTYPE = "moe_router_dtype"


def read_core(args: Mapping[str, Any]) -> Moe | list[str] | None:
    """The experts that Megatron-Core's args (or Megatron-Bridge's) state; None: it has none; or what is wrong."""
    experts = args.get("num_experts") or args.get("num_moe_experts")
    if experts is None or experts in (0, 1):
        return None
    problems: list[str] = []
    layers = moe_layers.read_core(_default(args, "moe_layer_freq", 1), args.get("num_layers") or 0)
    if isinstance(layers, str):
        problems.append(layers)
    sizes = _core_sizes(args, experts, problems)
    score = _default(args, "moe_router_score_function", "softmax")
    if score not in ("softmax", "sigmoid"):
        problems.append(f"moe_router_score_function {score!r}, which no family here has")
    scaling = args.get("moe_router_topk_scaling_factor") or None
    clamp = args.get("activation_func_clamp_value")
    if scaling is not None and not _is_positive(scaling):
        problems.append(f"moe_router_topk_scaling_factor {scaling!r}, where a positive number was expected")
    if clamp is not None and not _is_positive(clamp):
        problems.append(f"activation_func_clamp_value {clamp!r}, where a positive number was expected")
    if problems or isinstance(layers, str):
        return problems
    grouped = sizes["moe_router_group_topk"] > 0 and sizes["moe_router_num_groups"] > 1
    moe = Moe(
        experts, sizes["moe_ffn_hidden_size"], sizes["moe_router_topk"], layers,
        pre_softmax=score == "softmax" and bool(args.get("moe_router_pre_softmax")),  # of a sigmoid it means nothing
        score_function=score,
        scaling_factor=None if scaling in (None, 1) else float(scaling),
        expert_bias=bool(args.get("moe_router_enable_expert_bias")),
        num_groups=sizes["moe_router_num_groups"] if grouped else None,
        group_topk=sizes["moe_router_group_topk"] if grouped else None,
        shared_ffn_hidden_size=sizes["moe_shared_expert_intermediate_size"],
        shared_gate=bool(args.get("moe_shared_expert_gate")) and sizes["moe_shared_expert_intermediate_size"] > 0,
        biased=bool(args.get("add_bias_linear")),
        clamp=None if clamp is None else float(clamp),
        latent_size=sizes["moe_latent_size"] or None,
    )  # fmt: skip
    return impossible(moe) or moe


def _core_sizes(args: Mapping[str, Any], experts: Any, problems: list[str]) -> dict[str, int]:
    """The args that are numbers, those that may be absent as what that means."""
    sizes = {
        "num_experts": experts,
        "moe_ffn_hidden_size": args.get("moe_ffn_hidden_size") or args.get("ffn_hidden_size") or 0,
        "moe_router_topk": _default(args, "moe_router_topk", 2),
        "moe_router_num_groups": args.get("moe_router_num_groups") or 1,
    }
    may_be_none = ("moe_shared_expert_intermediate_size", "moe_router_group_topk", "moe_latent_size")
    sizes |= {name: args.get(name) or 0 for name in may_be_none}
    for name, size in sizes.items():
        if type(size) is not int or size < (0 if name in may_be_none else 1):
            problems.append(f"{name} {size!r}, where a positive int was expected")
    return sizes


def _default(args: Mapping[str, Any], name: str, default: Any) -> Any:
    return default if args.get(name) is None else args[name]


def write_core(config: ModelConfig, layer_freq: int | list[int] | None = None) -> dict[str, Any]:
    """Args of the experts; of a model without any, that it has none. `layer_freq`: --moe-layer-freq."""
    moe = config.moe
    if moe is None:
        return {"num_experts": None}
    return {
        **{name: getattr(moe, field) for field, name in ARGS.items()},
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size or None,
        "moe_layer_freq": moe_layers.core_layer_freq(config, layer_freq),
        "moe_grouped_gemm": True,
    }


def shown_by(moe: Moe, names: Iterable[str]) -> dict[str, bool]:
    """Fields that tensors decide, whatever args say: not every release and wrapper stores each arg."""
    ends = {"expert_bias": ".expert_bias", "shared_gate": ".shared_experts.gate_weight", "biased": ".router.bias"}
    found = {field: any(name.endswith(end) for name in names) for field, end in ends.items()}
    return found | ({} if moe.shared_ffn_hidden_size else {"shared_gate": False})


def router_dtype(args: Mapping[str, Any]) -> str | None:
    """The type in which a run computes its router's scores; None: in the model's. Where nothing states one: float32."""
    stated = args.get(ROUTER_DTYPE, "fp32")
    return stated if stated in ("fp32", "fp64", None) else "fp32"


def core_flags(config: ModelConfig, router: str | None = "fp32") -> list[str]:
    """Flags of Megatron-LM that --use-checkpoint-args does not restore (the score function and more: since 0.16).

    `router` is as router_dtype has it.
    """
    moe = config.moe
    if moe is None:
        return []
    flags = [] if router is None else [f"--moe-router-dtype {router}"]
    if moe.num_groups is not None:
        flags.append(f"--moe-router-num-groups {moe.num_groups} --moe-router-group-topk {moe.group_topk}")
    if moe.shared_gate:
        flags.append("--moe-shared-expert-gate")
    if moe.clamp is not None:
        flags.append(f"--activation-func-clamp-value {moe.clamp:g}")
    return flags


def core_warnings(config: ModelConfig) -> list[str]:
    """What stock Megatron-LM does with the experts, whatever flags it is given."""
    moe = config.moe
    if moe is None or moe.num_groups is None or moe.group_topk is None or moe.group_topk == moe.num_groups:
        return []
    summed, expected = moe.topk // moe.group_topk, 2 if moe.score_function == "sigmoid" else 1
    if summed == expected:
        return []
    rule = "the sum of its best 2 experts" if expected == 2 else "its best expert"
    return [
        f"a group of experts counts by {rule} in this model; Megatron-Core takes the sum of its best {summed} "
        f"(--moe-router-topk {moe.topk} // --moe-router-group-topk {moe.group_topk}), so that tokens get other experts "
        "there, in every release"
    ]


def trained_warnings(args: Mapping[str, Any]) -> list[str]:
    """What a run did with its experts that no other code does."""
    if args.get("moe") is None or args.get("moe_expert_capacity_factor") is None:
        return []
    return [
        f"training left out tokens above each expert's capacity (moe_expert_capacity_factor "
        f"{args['moe_expert_capacity_factor']}); transformers leaves out none"
    ]
