"""Megatron-LLM's args <-> ModelConfig: what they say, what they can be trusted for, where each value comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from weights_conversion.architectures import FAMILIES
from weights_conversion.architectures.family import Family
from weights_conversion.config import PARTS, ModelConfig, Parallelism
from weights_conversion.configs import features, parts, rope_core, windows
from weights_conversion.errors import ConversionError

# ModelConfig field -> Megatron-LLM's name in args.
_LLM_NAMES = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_attention_heads_kv",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
    "layernorm_epsilon": "layernorm_epsilon",
    "rope_theta": "rope_theta",
    "rope_scaling_factor": "rope_scaling_factor",
    "sliding_window": "sliding_window_size",
    "tie_word_embeddings": "tie_embed_logits",
}
# Those that only Megatron-Core has; configs/core_args.py makes some of them of several args.
_PARTS = ("rope_scaling", "hybrid_layer_pattern", *PARTS)
_SCALES = ("local_rope_theta", "query_pre_attn_scalar")
_CORE_ONLY = (*_PARTS, "rotary_percent", "window_layers", "mtp_num_layers", *_SCALES, *features.SWITCHES)
NAMES = _LLM_NAMES | {name: name for name in _CORE_ONLY}
_DEFAULTS = {field.name: field.default for field in fields(ModelConfig)}
_MAY_BE_NONE = ("sliding_window", "window_layers", *_SCALES, *_PARTS)
# Fields that the original's resharding tool re-creates, and its defaults: another value cannot have been reset.
_RESET = {"layernorm_epsilon": 1e-5, "rope_theta": 1e4, "rope_scaling_factor": 1.0, "sliding_window": None}
RESET_BY_RESHARDING: dict[str, Any] = _RESET
SILENT = ("max_position_embeddings", "rope_scaling", "rotary_percent", "window_layers", *_SCALES, *RESET_BY_RESHARDING)
_NO_FLAG = ("rope_scaling", "window_layers", "rotary_percent", "moe", "mtp_num_layers", *_SCALES)
# What --use_checkpoint_args does not restore.
NOT_RESTORED = ("rope_theta", "rope_scaling_factor", "layernorm_epsilon")


def write_args(
    config: ModelConfig, parallel: Parallelism, *, vocabulary: int, dtype: torch.dtype, divisible_by: int
) -> dict[str, Any]:
    """The args of a rank file: plain values, everything that Megatron-LLM reads when it loads or resumes."""
    family = FAMILIES[config.family]
    return {
        **{name: getattr(config, field) for field, name in _LLM_NAMES.items()},
        "encoder_num_layers": config.num_layers,
        "seq_length": config.max_position_embeddings,
        "make_vocab_size_divisible_by": divisible_by,
        "padded_vocab_size": vocabulary,
        "tokenizer_type": family.tokenizer_type,
        "position_embedding_type": "rotary",
        "parallel_attn": family.parallel_attention,
        "parallel_layernorm": config.num_layernorms == 2,
        "use_flash_attn": True,
        "use_rms_norm": family.norm == "rms",
        "glu_activation": "swiglu" if family.gated else None,
        "use_bias": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_gelu_fusion": False,
        "bias_dropout_fusion": False,
        "bias_droput_fusion": False,  # the original's misspelling, which its loader knows
        "params_dtype": dtype,
        "model_name": config.family,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "transformer_pipeline_model_parallel_size": parallel.pipeline,
        **virtual_stages(config, parallel),
        "iteration": "release",
    }


def virtual_stages(config: ModelConfig, parallel: Parallelism) -> dict[str, int | None]:
    """How args say that stages are interleaved (None: they are not)."""
    interleaved = parallel.virtual > 1
    per_stage = config.num_layers // (parallel.pipeline * parallel.virtual)
    return {
        "virtual_pipeline_model_parallel_size": parallel.virtual if interleaved else None,
        "num_layers_per_virtual_pipeline_stage": per_stage if interleaved else None,
    }


def training_flags(config: ModelConfig, vocabulary: int, divisible_by: int, tp: int) -> list[str]:
    """Flags that training must be given, because the checkpoint's args cannot carry them."""
    flags = [f"--{NAMES[name]} {getattr(config, name)}" for name in NOT_RESTORED if _matters(config, name)]
    if FAMILIES[config.family].windowed and config.sliding_window is not None:
        flags.append(f"--sliding_window_size {config.sliding_window}")
    if vocabulary % (divisible_by * tp):
        step = next(step for step in (64, 32, 16, 8, 4, 2, 1) if vocabulary % (step * tp) == 0)
        flags.append(f"--make_vocab_size_divisible_by {step}")
    return flags


def _matters(config: ModelConfig, name: str) -> bool:
    return name != "rope_scaling_factor" or config.rope_scaling_factor != 1.0


def was_reset(args: Mapping[str, Any]) -> bool:
    """Whether the original's resharding tool wrote this file and re-created its args from defaults."""
    return bool(
        args.get("use_cpu_initialization")
        and not args.get("perform_initialization", True)
        and args.get("no_save_optim")
        and args.get("no_save_rng")
    )


def _stated(family: str, args: Mapping[str, Any], manifest: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What args say and can be trusted for, and the names of what the resharding tool has reset in them.

    That no window or no rope scaling is there is said too, where args have a place for it.
    """
    stated, lost = from_args(family, args), []
    for name in ("sliding_window", "window_layers"):
        if FAMILIES[family].windowed and NAMES[name] in args:
            stated[name] = args[NAMES[name]]
    if "rope_scaling" in args:
        latent = args.get("mla") is not None
        stated["rope_scaling"] = rope_core.completed(args["rope_scaling"], manifest.get("rope_scaling"), latent=latent)
    if "moe" in stated:
        stated["moe"] = parts.completed(stated["moe"], manifest.get("moe"), args)
    if was_reset(args):
        lost = [name for name, default in RESET_BY_RESHARDING.items() if stated.get(name, default) == default]
    return {name: value for name, value in stated.items() if name not in lost}, lost


def _family_says(family: str, args: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{name: _DEFAULTS[name] for name in (*RESET_BY_RESHARDING, *_SCALES)},
        **FAMILIES[family].defaults,
        **{name: name in features.required(family) for name in features.SWITCHES},
        **{name: _DEFAULTS[name] for name in (*_PARTS, "mtp_num_layers")},
        **({} if features.class_of(family).mixed_windows else {"window_layers": None}),
        "rotary_percent": features.class_of(family).rotary_percent,
        "max_position_embeddings": args.get("seq_length"),
    }


def _disagreement(name: str, said: Sequence[tuple[str, Any]]) -> str | None:
    """A sentence on what differs from the first of `said`, which is used; a family's default is no rival."""
    (origin, value), *others = said
    rivals = [(other, stated) for other, stated in others if other != "family" and stated != value]
    if not rivals:
        return None
    shown, silent = NAMES.get(name, name), _is_silent(name, said)
    rest = " and ".join(f"{parts.shown(name, stated, value)} in the {other}" for other, stated in rivals)
    value = parts.shown(name, value, rivals[0][1])
    if origin == "flag":
        return f"{shown} is {value} by --{shown}, over {rest}"
    if not silent:
        return (
            f"{shown} is {value} in the {origin} and {rest}, so the manifest belongs to another model; "
            "remove conversion_manifest.json"
        )
    override = "" if name in _NO_FLAG else f", --{shown} overrides it"
    return f"{shown} is {value} in the {origin} and {rest}; {value} is used{override}"


def _is_silent(name: str, said: Sequence[tuple[str, Any]]) -> bool:
    """Whether no shape betrays in what the values differ that were stated."""
    first, *others = [value for origin, value in said if origin != "family"] or [None]
    alike = all(value == first or parts.is_silent(first, value) for value in others)
    return alike or name in (*SILENT, "mtp_num_layers")


def _lost(family: str, name: str, stated: Any, origin: str, value: Any) -> list[str]:
    """A warning on a value that the resharding tool has reset, where what is used instead may be wrong."""
    shown = NAMES[name]
    if origin == "manifest" and stated != value:
        return [f"{shown} is {stated} in the args, which the resharding tool has reset, and {value} in the manifest, "
                "which is used"]  # fmt: skip
    if origin == "family" and (name in FAMILIES[family].defaults or stated not in (value, None)):
        return [f"{shown} is lost: the args say {stated}, but the resharding tool has reset them; {value}, as usual "
                f"for {family}, is used, --{shown} overrides it"]  # fmt: skip
    return []


@dataclass(frozen=True)
class Resolved:
    """A ModelConfig, where each field came from ("flag", "manifest", "args", "family"), and what disagreed."""

    config: ModelConfig
    origins: Mapping[str, str]
    warnings: tuple[str, ...] = ()


def from_args(family: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """The ModelConfig fields that args state or imply (the original leaves out many in a release file)."""
    values = {field: args[name] for field, name in NAMES.items() if args.get(name) is not None}
    if "num_layers" not in values and args.get("encoder_num_layers") is not None:
        values["num_layers"] = args["encoder_num_layers"]
    missing = [NAMES[name] for name in ("num_layers", "hidden_size", "num_attention_heads") if name not in values]
    if missing:
        raise ConversionError(f"the checkpoint's args lack {', '.join(missing)}; it cannot be read without them")
    values.setdefault("num_query_groups", values["num_attention_heads"])
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    values.setdefault("ffn_hidden_size", 4 * values["hidden_size"])
    values.setdefault("tie_word_embeddings", FAMILIES[family].ties_in_megatron_llm)
    if not FAMILIES[family].windowed:
        values.pop("sliding_window", None)
    if "moe" in values and features.has_one_size(family):
        values["ffn_hidden_size"] = values["moe"].ffn_hidden_size
    values["num_layernorms"] = 2 if args.get("parallel_layernorm") else 1
    return values


def _forward_pass(family: Family) -> dict[str, Any]:
    """Args that decide the forward pass, with the one value that a family's models have."""
    return {
        "glu_activation": "swiglu" if family.gated else None,
        "use_rms_norm": family.norm == "rms",
        "parallel_attn": family.parallel_attention,
        "use_bias": False,
        "use_post_ln": False,
        "apply_residual_connection_post_layernorm": False,
    }


def unreadable(left_out: Mapping[str, str], folder: object) -> list[str]:
    """Sentences on args that decide the model, but are no plain values: `left_out` names the type of each."""
    return [
        f"the args of {folder} have {name} of type {left_out[name]}, which is not understood"
        for name in (*NAMES.values(), *_forward_pass(next(iter(FAMILIES.values()))), "position_embedding_type")
        if name in left_out
    ]


def foreign(family: str, args: Mapping[str, Any]) -> list[str]:
    """Args that ask for a forward pass that no model of `family` has, and that no weight's shape betrays: sentences."""
    expected = _forward_pass(FAMILIES[family])
    problems = [
        f"the checkpoint's args say {name} {args[name]!r}, but {family} models have {value!r}"
        for name, value in expected.items()
        if name in args and args[name] != value and not (args[name] is None and value is False)
    ]
    window = args.get("sliding_window_size")
    if window is not None and not FAMILIES[family].windowed:
        problems.append(
            f"the checkpoint's args say sliding_window_size {window}, a window that {family} does not have; if it is a "
            "mistral, say --model mistral, and --sliding_window_size 0 if it has none"
        )
    position = args.get("position_embedding_type")
    if position not in (None, "rotary", "PositionEmbeddingType.rotary", "rope") and getattr(position, "value", 0) != 1:
        shown = getattr(position, "value", position)
        problems.append(
            f"the checkpoint's args say position_embedding_type {shown!r}, but {family} models have 'rotary'"
        )
    return problems


def resolve(
    family: str, args: Mapping[str, Any], manifest: Mapping[str, Any] | None, flags: Mapping[str, Any], vocabulary: int
) -> Resolved:
    """Each field by precedence: flag, args (where they can be trusted), manifest, family. Disagreements are warned of.

    `manifest` and `flags` hold ModelConfig fields. What training was told outranks what was imported; only a context
    that is shorter than the import's says nothing about the model. A manifest that contradicts the args about the
    model's shape belongs to another model and is an error.
    """
    imported = dict(manifest or {})
    args_say, lost = _stated(family, args, imported)
    longer = (imported.get("max_position_embeddings") or 0) > args_say.get("max_position_embeddings", 0)
    order = {"max_position_embeddings": ("flag", "manifest", "args", "family")} if longer else {}
    sources = {"flag": flags, "args": args_say, "manifest": imported, "family": _family_says(family, args)}

    values: dict[str, Any] = {"family": family, "vocab_size": vocabulary}
    origins, warnings, problems = {}, [], []
    for field in fields(ModelConfig):
        name = field.name
        if name in values:
            continue
        said = [(origin, sources[origin][name]) for origin in order.get(name, sources) if name in sources[origin]]
        if not said or (said[0][1] is None and name not in _MAY_BE_NONE):
            problems.append(f"nothing says what {NAMES.get(name, name)} is; the checkpoint's args lack it")
            continue
        origins[name], values[name] = said[0]
        if sentence := _disagreement(name, said):
            (warnings if _is_silent(name, said) or origins[name] == "flag" else problems).append(sentence)
        elif origins[name] == "family" and name in FAMILIES[family].defaults and name not in lost:
            usual = f"{NAMES[name]} is: {values[name]}, as usual for {family}, is used"
            warnings.append(f"nothing says what {usual}; --{NAMES[name]} or --reference gives another")
        if name in lost:
            warnings += _lost(family, name, args.get(NAMES[name]), origins[name], values[name])
    unsaid = features.lacking(family, values)
    problems += [f"nothing says what {name} is; the checkpoint's args lack it" for name in unsaid]
    if problems:
        raise ConversionError(*problems)
    values["sliding_window"], values["window_layers"] = windows.plain(values["sliding_window"], values["window_layers"])
    return Resolved(ModelConfig(**values), origins, tuple(warnings))
