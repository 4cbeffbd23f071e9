"""Which family a Megatron checkpoint is of: what it says, else what its args and tensors show.

Megatron-Core writes no family's name. Each family states its signs here, as data; whatever fits none, or several, is
for the user to decide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from weights_conversion.architectures import FAMILIES
from weights_conversion.architectures.family import Signs, Structure
from weights_conversion.config import Moe
from weights_conversion.configs.megatron_args import was_reset
from weights_conversion.errors import ConversionError


@dataclass(frozen=True)
class Features(Structure):
    """What a checkpoint shows; None: it does not say. `rows` are those of its embedding, `ratio` is ffn / hidden."""

    window: bool | None = None
    theta: float | None = None
    epsilon: float | None = None
    rows: int | None = None
    grouped: bool = False
    positions: int | None = None
    ratio: float | None = None

    def __str__(self) -> str:
        shown = {
            "attention in parallel with the MLP": self.parallel_attention,
            "biases of q, k and v": self.qkv_bias,
            "norms of q and k": self.qk_norms,
            "Llama 3's rope scaling": self.llama3_rope,
            "experts": self.experts,
            "shared experts": self.shared_experts,
            "a gate of its shared experts": self.shared_gate,
            "router scores by sigmoid": self.sigmoid,
            "latent attention": self.latent,
            "sinks beside the softmax": self.sinks,
            "layers of one sub-block each": self.sub_blocks,
            "layers of gated delta": self.gated_delta,
            "norms behind attention and MLP": self.post_norms,
            "a sliding window": bool(self.window),
            "no sliding window": self.window is False,
        }
        numbers = {"rope_theta": self.theta, "epsilon": self.epsilon}
        parts = [f"{name} {value:g}" for name, value in numbers.items() if value is not None]
        rows = [f"{self.rows} vocabulary rows"] if self.rows is not None else []
        return ", ".join([*(name for name, there in shown.items() if there), *parts, *rows])


_STRUCTURE = tuple(field.name for field in fields(Structure))


def read_features(args: Mapping[str, Any], names: Iterable[str], rows: int) -> Features:
    """Of args in Megatron-LLM's names and tensors' names. `rows`: of the embedding, without its padding if known.

    Values that the original's resharding tool may have reset count only where they are not its defaults.
    """
    reset = was_reset(args)
    theta, epsilon, window = (args.get(key) for key in ("rope_theta", "layernorm_epsilon", "sliding_window_size"))
    hidden, ffn = args.get("hidden_size"), args.get("ffn_hidden_size")
    heads = args.get("num_attention_heads")
    names = list(names)
    latent = args.get("mla") is not None or _any(names, r"\.linear_kv_up_proj\.")
    return Features(
        parallel_attention=bool(args.get("parallel_attn")) or args.get("use_rms_norm") is False,
        qkv_bias=bool(args.get("add_qkv_bias")) or _any(names, r"\.(query_key_value|linear_qkv)\.bias$"),
        # of latents, which may be named like those of heads, it says nothing
        qk_norms=not latent and (bool(args.get("qk_layernorm")) or _any(names, r"\.[qk]_layernorm\.")),
        llama3_rope=bool(args.get("use_rope_scaling")),
        **_experts(args.get("moe"), names),
        latent=latent,
        sinks=args.get("softmax_type") == "learnable" or _any(names, r"\.core_attention\.softmax_offset$"),
        sub_blocks=args.get("hybrid_layer_pattern") is not None,
        gated_delta=args.get("gated_delta") is not None or _any(names, r"\.self_attention\.in_proj\."),
        post_norms=_any(names, r"\.linear_(proj|fc2)\.post_layernorm\."),
        window=None if reset and window is None else window is not None,
        theta=None if reset and theta == 1e4 else theta,
        epsilon=None if reset and epsilon == 1e-5 else epsilon,
        rows=rows,
        grouped=args.get("num_attention_heads_kv") not in (None, heads),
        positions=args.get("max_position_embeddings"),
        ratio=ffn / hidden if ffn and hidden else None,
    )


def _experts(moe: Moe | None, names: list[str]) -> dict[str, bool]:
    """What args and tensors show of experts: a wrapper may store no args."""
    return {
        "experts": moe is not None or _any(names, r"\.experts\."),
        "shared_experts": (moe is not None and moe.shared_ffn_hidden_size > 0) or _any(names, r"\.shared_experts\."),
        "shared_gate": _any(names, r"\.shared_experts\.gate_weight$"),
        "sigmoid": (moe is not None and moe.score_function == "sigmoid") or _any(names, r"\.router\.expert_bias$"),
    }


def with_flags(features: Features, flags: Mapping[str, Any]) -> Features:
    """The same with what the user states (ModelConfig fields), which outranks args."""
    stated: dict[str, Any] = {"theta": flags.get("rope_theta"), "epsilon": flags.get("layernorm_epsilon")}
    stated = {name: value for name, value in stated.items() if value is not None}
    if "sliding_window" in flags:
        stated["window"] = flags["sliding_window"] is not None
    if "max_position_embeddings" in flags:
        stated["positions"] = flags["max_position_embeddings"]
    return replace(features, **stated)


def _any(names: Iterable[str], pattern: str) -> bool:
    return any(re.search(pattern, name) for name in names)


def decide_family(claims: Mapping[str, str], features: Features) -> tuple[str, ...]:
    """The families that the checkpoint may be of, the likeliest first; () where it fits none.

    `claims` are what manifest and args state (claimed_families), which stand above what the features suggest.
    """
    if claims:
        return tuple(dict.fromkeys(claims.values()))
    fits = [name for name, family in FAMILIES.items() if any(_fits(features, signs) for signs in family.signs)]
    stated = [name for name in fits if features.rows in {signs.rows for signs in FAMILIES[name].signs} - {None}]
    fits = stated or fits
    if len(fits) == 2:
        fits = [family for family in fits if FAMILIES[family].otherwise not in fits]
    return tuple(fits)


def _fits(features: Features, signs: Signs) -> bool:
    if any(getattr(features, name) != getattr(signs, name) for name in _STRUCTURE):
        return False
    if features.window is not None and features.window != signs.window:
        return False
    for name in ("theta", "epsilon"):
        if None not in (getattr(features, name), getattr(signs, name)) and (
            getattr(features, name) != getattr(signs, name)
        ):
            return False
    if signs.grouped is not None and features.grouped != signs.grouped:
        return False
    if signs.rows_needed and features.rows != signs.rows:
        return False
    if signs.least_positions is not None:
        return (features.positions or 0) >= signs.least_positions or features.ratio == signs.ratio
    return True


def _alike(features: Features, signs: Signs) -> int:
    """How many numbers are those of `signs`."""
    return sum(getattr(features, name) == getattr(signs, name) is not None for name in ("theta", "epsilon", "rows"))


def chosen_family(
    claims: Mapping[str, str], features: Features, root: object, model_type: str | None = None
) -> tuple[str, str]:
    """(the family, why) where no --model was given. Raises ConversionError, which names the candidates.

    `model_type` of a reference decides between several that fit.
    """
    candidates = decide_family(claims, features)
    if len(candidates) == 1 and claims:
        return candidates[0], f"says its {' and its '.join(claims)}"
    if len(candidates) == 1:
        return candidates[0], f"by what it shows ({features}); --model overrides it"
    if claims:
        said = " and ".join(f"{family} by its {origin}" for origin, family in claims.items())
        raise ConversionError(f"{root} says two things of the model that it holds: {said}; correct the wrong one")
    near = candidates or tuple(
        name
        for name, family in FAMILIES.items()
        if any(all(getattr(features, one) == getattr(signs, one) for one in _STRUCTURE) for signs in family.signs)
    )
    named = [family for family in near if model_type in FAMILIES[family].model_types]
    if named:  # those of one type are one class of transformers, whose values are stated or the reference's
        nearest = max(named, key=lambda family: max(_alike(features, signs) for signs in FAMILIES[family].signs))
        return nearest, f"one of those that it may be, by the reference's model_type {model_type}"
    if candidates:
        raise ConversionError(
            f"{root} does not say which model it holds, and what it shows ({features}) is true of "
            f"{' and '.join(candidates)}; say --model {' or --model '.join(candidates)}"
        )
    raise ConversionError(
        f"{root} does not say which model it holds, and no family is known by what it shows ({features}); "
        f"--model names it ({', '.join(near or FAMILIES)})"
    )
