"""What a Megatron-Core checkpoint holds that a family does not have, by its args and by the names of its tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from weights_conversion.architectures import FAMILIES
from weights_conversion.configs import core_table, foreign_keys, mamba, moe_checks, own_args
from weights_conversion.configs import features as families
from weights_conversion.configs import moe as moe_args

# ModelConfig's switch -> what it is, and the end of a tensor's name that shows it ("": none does).
_SWITCHES = {
    "add_qkv_bias": ("biases of q, k and v", ".linear_qkv.bias"),
    "qk_layernorm": ("norms of q and k", ".q_layernorm.weight"),
    "attention_output_gate": ("gated attention (attention_output_gate)", ""),
    "layernorm_zero_centered_gamma": ("norm weights around zero (layernorm_zero_centered_gamma)", ""),
}
# Arg -> others that ask for the same, and the end of the name of a tensor that is there with it alone.
_SHOWN_BY: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("add_qkv_bias", ("add_bias_linear",), ".linear_qkv.bias"),
    ("qk_layernorm", (), ".q_layernorm.weight"),
    ("moe_router_enable_expert_bias", (), ".router.expert_bias"),
    ("moe_shared_expert_gate", (), ".shared_experts.gate_weight"),
)
_SHOWN = 24  # unknown args in the report
# Words of unknown args that say how a forward pass is computed, or are of serving and reinforcement learning: forks
# have hundreds of them.
_IDLE = re.compile(
    r"fuse|fusion|kernel|recompute|checkpoint|offload|swap|backend|(^|_)impl|overlap|cache|memory|profil|log_|_log$"
    r"|(tensor|sequence|context|expert|pipeline|data|hybrid|model)_parallel|parallel_(size|comm|group)|(^|_)(cp|mc2)_"
    r"|debug|check|reset_|mask_type|sglang|vllm|rollout|reward|advantage|actor|critic|policy|ppo|grpo|kl_|eps_clip"
    r"|clip_(ratio|range|eps|high|low)|importance|(^|_)(tis|opsm)_|(^|rollout_)temperature|sampl|eval|quantiz"
    r"|fp8|fp4|int8|ulysses|ring_|npu|ascend|cuda|gpu|nccl|hccl|communicat|dtype|blend"
)
# Args of Megatron-LLM's own, which megatron_args.py reads by value.
_MEGATRON_LLM = ("glu_activation", "parallel_attn", "parallel_layernorm", "position_embedding_type", "use_post_ln")
# What the names of tensors betray, where args are silent; and the feature of families that have it.
_FOREIGN_TENSORS: tuple[tuple[re.Pattern[str], str, str | None], ...] = (
    (re.compile(r"\.(experts|shared_experts|router)\."), "mixture of experts", "moe"),
    (
        re.compile(r"\.linear_(q|kv|qkv)_(down|up)_proj\.|self_attention\.linear_q_proj\."),
        "multi-latent attention",
        "mla",
    ),
    (re.compile(r"self_attention\.(in_proj\.|A_log)"), "layers of gated delta", "gated_delta"),
    (re.compile(r"\.linear_(proj|fc2)\.post_layernorm\."), "norms behind attention and MLP", "post_norms"),
    (re.compile(r"\.mixer\."), "state-space layers", "hybrid"),
    (re.compile(r"(^|\.)mtp\."), "multi-token prediction", "mtp"),
    (re.compile(r"\.(adapter|lora_[ab])\.", re.IGNORECASE), "LoRA adapters, which are merged before an export,", None),
    (re.compile(r"position_embeddings\.weight$"), "learned position embeddings", None),
    (re.compile(r"layer_?norm(_|\.)bias$"), "LayerNorm", None),
    (re.compile(r"(?<!linear_qkv)\.bias$"), "biases of linear layers", "biases"),
)


def foreign_tensors(names: Iterable[str], family: str, folder: Path) -> list[str]:
    """Sentences on tensors that `family` does not have, one for each kind."""
    has, kinds = families.of(family), {}
    for name in sorted(names):
        fits = (what for pattern, what, feature in _FOREIGN_TENSORS if feature not in has and pattern.search(name))
        what = next(fits, None)
        if what is not None:
            kinds.setdefault(what, name)
    everywhere = frozenset().union(*(families.of(name) for name in FAMILIES))
    known = {what for _, what, feature in _FOREIGN_TENSORS if feature in everywhere}
    return [
        f"{folder} holds a model with {what} (it has a tensor {name}), which "
        + (f"{family} does not have; --model names another" if what in known else "is none of the supported families")
        for what, name in kinds.items()
    ]


def shown(names: Iterable[str], args: Mapping[str, Any]) -> dict[str, Any]:
    """What tensors show, whatever args say: not every wrapper stores args, and not every release each of them."""
    names = tuple(names)
    latent = any(".linear_kv_up_proj." in name for name in names)  # its norms of latents may have the name of heads'
    found: dict[str, Any] = {
        switch: any(name.endswith(end) for name in names) and not (latent and switch == "qk_layernorm")
        for switch, (_, end) in _SWITCHES.items()
        if end
    }
    further = {match[1] for name in names if (match := re.search(r"(?:^|\.)mtp\.layers\.(\d+)\.", name))}
    if len(further) > (args.get("mtp_num_layers") or 0):
        found["mtp_num_layers"] = len(further)
    experts = args.get("moe")
    if experts is None:
        return found
    return found | {"moe": dataclasses.replace(experts, **moe_args.shown_by(experts, names))}


def contradicted(names: Collection[str], args: Mapping[str, Any], folder: Path) -> tuple[list[str], list[str]]:
    """(problems, warnings): normalised args that the tensors contradict, which are believed.

    A tensor that is there was trained. One that is missing, where args ask for it, was lost on the way: no file of
    Megatron-Core's leaves it out.
    """
    problems, warnings = [], []
    latent = args.get("mla") is not None or any(".linear_kv_up_proj." in name for name in names)
    for arg, others, end in _SHOWN_BY:
        stated = args.get(arg)
        if stated is None or (latent and arg == "qk_layernorm"):
            continue
        there = next((name for name in sorted(names) if name.endswith(end)), None)
        if stated and there is None and _may_have(arg, args, names):
            problems.append(
                f"the args of {folder} say {arg} {stated!r}, but it holds no tensor *{end}: was the copy complete, and "
                f"are they this model's args? If it has none, set {arg} to False in the checkpoint"
            )
        elif there is not None and not any(args.get(each) for each in (arg, *others)):
            warnings.append(f"the args say {arg} {stated!r}, but there is {there}: the tensors are believed")
    return problems, warnings


def _may_have(arg: str, args: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether the model has what the arg is about: experts' args mean nothing without experts, or a shared one."""
    if not arg.startswith("moe_"):
        return any(".linear_qkv." in name for name in names)
    moe = args.get("moe")
    return moe is not None and (arg != "moe_shared_expert_gate" or moe.shared_ffn_hidden_size > 0)


def foreign_to_family(args: Mapping[str, Any], family: str, folder: Path) -> list[str]:
    """Sentences on normalised args that `family` cannot have, and that no shape would betray."""
    has, required = families.of(family), families.required(family)
    problems = [
        f"{folder} holds a model with {what}, which {family} does not have; --model names another"
        for name, (what, _) in _SWITCHES.items()
        if args.get(name) and name not in has
    ]
    problems += [
        f"{folder} holds a model without {what}, which {family} has; --model names another"
        for name, (what, _) in _SWITCHES.items()
        if name in required and name in args and not args[name]
    ]
    problems += [
        f"{folder} holds a model with {what} ({name} is {args[name]!r}), which {family} does not have"
        for name, what in core_table.foreign(args, families.args_of(has)).items()
        if name not in _SWITCHES
    ]
    if "hybrid" in has:
        problems += [f"{folder} holds a model {what}; --model names another" for what in mamba.misfits(args, family)]
    problems += _experts_and_latents(args, family, folder, has)
    scaling = args.get("rope_scaling")
    if scaling is not None and scaling.kind not in FAMILIES[family].ropes:
        problems.append(f"{folder} holds a model with rope scaling of kind {scaling.kind}, which {family} lacks")
    window = args.get("sliding_window_size")
    if FAMILIES[family].windowed or window is None:
        return problems
    return [
        *problems,
        f"{folder} holds a model with a sliding window of {window} tokens, which {family} does not have; if it is a "
        "mistral, say --model mistral, and --sliding_window_size 0 if it has none",
    ]


def _experts_and_latents(args: Mapping[str, Any], family: str, folder: Path, has: Collection[str]) -> list[str]:
    problems = own_args.misfits(args, family)
    if args.get("moe") is not None and "moe" in has:  # without the feature, num_experts has been named
        problems += moe_checks.misfits(families.class_of(family), args["moe"], family)
    elif "moe" in has and "moe" in args and "hybrid" not in has:
        problems.append(f"without a mixture of experts (num_experts is None), which {family} has")
    if "gated_delta" in has and "gated_delta" in args and args["gated_delta"] is None:
        problems.append(
            f"without layers of gated delta (experimental_attention_variant is not set), which {family} has"
        )
    if "mla" in has and "mla" in args and args["mla"] is None:
        problems.append(f"without latent attention (multi_latent_attention is not set), which {family} has")
    return [f"{folder} holds a model {problem}; --model names another" for problem in problems]


def by_name(args: Mapping[str, Any], folder: Path) -> list[str]:
    """Sentences on args that no release is known to have, and whose names say that they change the forward pass."""
    return [
        f"{folder} holds a model with {name} {str(value)[:40]!r}, an arg that is not known here and may change what "
        "the model computes; if it has no such thing, set the arg to None in the checkpoint"
        for name, value in core_table.unknown(args).items()
        if not _IDLE.search(name.lower()) and foreign_keys.changes_model(name, value) and not _is_off(name, args)
    ]


def in_megatron_llm(args: Mapping[str, Any], folder: Path) -> list[str]:
    """The same of Megatron-LLM's args, whose forks take features over from Megatron-Core."""
    others = {name: value for name, value in args.items() if name not in _MEGATRON_LLM}
    return by_name(others, folder) + [
        f"{folder} holds a model with {what} ({name} is {others[name]!r}), which none of Megatron-LLM's families has"
        for name, what in core_table.foreign(others).items()
    ]


def _is_off(name: str, args: Mapping[str, Any]) -> bool:
    """Whether an unknown arg counts only where another one is set, as the first word of both says, and it is not.

    Newer releases have numbers of features that are off (mhc_num_residual_streams, enable_mhc_connections).
    """
    word = name.partition("_")[0]
    if word == "moe":
        return args.get("moe") is None
    switch = re.compile(rf"(use|enable)_{re.escape(word)}(_\w+)?")
    switches = [value for other, value in args.items() if switch.fullmatch(other) and not core_table.is_known(other)]
    return bool(switches) and not any(switches)


def unknown(args: Mapping[str, Any]) -> list[str]:
    """A note on args that are set and that no release is known to have: what a fork adds may change the model."""
    found = core_table.unknown(args)
    if not found:
        return []
    shown = ", ".join(f"{name} {str(value)[:40]!r}" for name, value in sorted(found.items())[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [f"args       not known here, and taken to be of no consequence: {shown}{more}"]


def unreadable(left_out: Mapping[str, str], folder: Path) -> list[str]:
    """Sentences on args that decide what model it is, but are no plain values: `left_out` names the type of each."""
    return [
        f"the args of {folder} have {name} of type {left_out[name]}, which is not understood"
        for name in core_table.unreadable(left_out)
    ]
