"""What transformers makes of a config.json, its defaults included: a value that the converter overlooks is seen."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from weights_conversion.config import ModelConfig, Moe
from weights_conversion.errors import ConversionError
from weights_conversion.verification.conventions import block_of
from weights_conversion.verification.forward import rope_of
from weights_conversion.verification.rope import frequencies

_PLAIN = {  # ModelConfig's field: names in transformers' classes, of which a class has one or none
    "layernorm_epsilon": ("rms_norm_eps", "layer_norm_epsilon"),
    "max_position_embeddings": ("max_position_embeddings",),
    "tie_word_embeddings": ("tie_word_embeddings",),
    "num_layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "num_attention_heads": ("num_attention_heads",),
    "vocab_size": ("vocab_size",),
}
_ROPE = {*inspect.signature(frequencies).parameters, "partial_rotary_factor"}
_SEQUENTIAL = {"ffn_hidden_size": ("intermediate_size",), "num_query_groups": ("num_key_value_heads",)}
_MOE = {  # of one with experts; what a class does not have, its code decides
    "num_experts": ("n_routed_experts", "num_local_experts", "num_experts"),
    "ffn_hidden_size": ("moe_intermediate_size", "intermediate_size"),
    "topk": ("num_experts_per_tok",),
    "clamp": ("swiglu_limit",),
    "shared_ffn_hidden_size": ("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"),
    "latent_size": ("moe_latent_size",),
}
_MAMBA = {
    "state_dim": ("ssm_state_size",),
    "head_dim": ("mamba_head_dim",),
    "num_groups": ("n_groups",),
    "num_heads": ("mamba_num_heads",),
}
_MLA = {
    "q_lora_rank": ("q_lora_rank",),
    "kv_lora_rank": ("kv_lora_rank",),
    "qk_head_dim": ("qk_nope_head_dim",),
    "qk_pos_emb_head_dim": ("qk_rope_head_dim",),
    "v_head_dim": ("v_head_dim",),
}
_DELTA = {
    "num_key_heads": ("linear_num_key_heads",),
    "num_value_heads": ("linear_num_value_heads",),
    "key_head_dim": ("linear_key_head_dim",),
    "value_head_dim": ("linear_value_head_dim",),
    "conv_kernel_dim": ("linear_conv_kernel_dim",),
}
_SYMBOLS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-", "moe": "E"}
_SWITCHES = {"add_qkv_bias": {"glm4_moe": "attention_bias"}, "qk_layernorm": {"glm4_moe": "use_qk_norm"}}


def misread(folder: Path, config: ModelConfig) -> tuple[list[str], list[str]]:
    """(where `config`, as the converter reads it, is not what transformers' class says; what could not be compared)."""
    try:
        stated = _load(folder)
    except Exception as error:  # transformers raises whatever its classes raise
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return [], [f"transformers cannot read config.json ({reason}), so its values are as the converter reads them"]
    stated = getattr(stated, "text_config", stated)  # of a repository around a text model
    problems, known = [], _Known(stated)
    names = _PLAIN if block_of(config).parallel else _PLAIN | _SEQUENTIAL
    for field, spellings in names.items():
        said = known if config.moe is not None else stated
        values = [getattr(said, name) for name in spellings if hasattr(said, name)]
        if values and values[0] is not None and values[0] != getattr(config, field):
            problems.append(_sentence(field, values[0], getattr(config, field)))
    there, here = (_windows(each, config.num_layers) for each in (stated, config))
    if there != here:
        problems.append(_sentence("sliding_window", there, here))
    for part, names in ((config.moe, _MOE), (config.mla, _MLA), (config.mamba, _MAMBA), (config.gated_delta, _DELTA)):
        problems += _differing(known, names, part) if part is not None else []
    if config.gated_delta is not None:
        linear = tuple(kind == "linear_attention" for kind in getattr(stated, "layer_types", None) or ())
        if linear != config.gated_delta.layers:
            problems.append(_sentence("layer_types", stated.layer_types, config.gated_delta.layers))
    if config.local_rope_theta is not None:
        problems += _local_rope(stated, config)
    for field, keys in _SWITCHES.items():
        key = keys.get(getattr(stated, "model_type", ""))
        if key is not None and bool(getattr(stated, key)) != getattr(config, field):
            problems.append(_sentence(field, getattr(stated, key), getattr(config, field)))
    kinds, pattern = getattr(stated, "layers_block_type", None), config.hybrid_layer_pattern
    if pattern is not None and kinds is not None and pattern != "".join(_SYMBOLS.get(kind, "?") for kind in kinds):
        problems.append(_sentence("hybrid_layer_pattern", kinds, pattern))
    if config.moe is not None:
        problems += _router_problems(known, config.moe)
    scalar = getattr(stated, "query_pre_attn_scalar", None)
    if scalar is not None and scalar != config.query_pre_attn_scalar:
        problems.append(_sentence("query_pre_attn_scalar", scalar, config.query_pre_attn_scalar))
    problems += _rope_problems(stated, config) if block_of(config).rotary else []
    return problems, []


class _Known:
    """transformers' config without the keys that its class does not have: it carries them, and ignores them.

    Qwen3.5's class with experts has no intermediate_size, GPT-OSS's no norm_topk_prob; files have both now and then.
    """

    def __init__(self, stated: Any) -> None:
        self._stated, self._default = stated, _default(type(stated))

    def __getattr__(self, name: str) -> Any:
        if self._default is not None and not hasattr(self._default, name):
            raise AttributeError(name)
        return getattr(self._stated, name)


@functools.lru_cache(maxsize=8)
def _default(kind: Any) -> Any:
    """A class's own defaults; None where it cannot be made without values."""
    try:
        return kind()
    except Exception:  # transformers raises whatever its classes raise
        return None


def _differing(stated: Any, names: Mapping[str, tuple[str, ...]], read: Any) -> list[str]:
    problems = []
    for field, spellings in names.items():
        there = [getattr(stated, name) for name in spellings if hasattr(stated, name)]
        if there and there[0] != getattr(read, field):
            problems.append(_sentence(field, there[0], getattr(read, field)))
    return problems


def _router_problems(stated: Any, moe: Moe) -> list[str]:
    """The router's values, and which layers have experts, by the rules of transformers' modeling files."""
    softmax = moe.score_function == "softmax"
    groups, chosen = getattr(stated, "n_group", None), getattr(stated, "topk_group", None)
    if groups in (None, 1) or getattr(stated, "topk_method", None) == "greedy":
        groups = chosen = None
    said: dict[str, tuple[object, object]] = {
        "scaling_factor": (getattr(stated, "routed_scaling_factor", None) or 1.0, moe.scaling_factor or 1.0),
        "num_groups": (groups, moe.num_groups),
        "group_topk": (chosen, moe.group_topk),
        "layers": (_layers(stated, len(moe.layers)), moe.layers),
    }
    if hasattr(stated, "norm_topk_prob"):
        said["norm_topk_prob"] = (bool(stated.norm_topk_prob), not moe.pre_softmax if softmax else moe.topk > 1)
    if hasattr(stated, "n_shared_experts") and not hasattr(stated, _MOE["shared_ffn_hidden_size"][0]):
        said["shared_ffn_hidden_size"] = (
            stated.n_shared_experts * stated.moe_intermediate_size, moe.shared_ffn_hidden_size
        )  # fmt: skip
    return [_sentence(field, one, two) for field, (one, two) in said.items() if one != two]


def _layers(stated: Any, count: int) -> tuple[bool, ...]:
    if kinds := getattr(stated, "layers_block_type", None):
        return tuple(kind == "moe" for kind in kinds)
    if (kinds := getattr(stated, "mlp_layer_types", None)) is not None:
        return tuple(kind == "sparse" for kind in kinds)
    first, step = getattr(stated, "first_k_dense_replace", 0), getattr(stated, "decoder_sparse_step", 1)
    dense = getattr(stated, "mlp_only_layers", None) or ()
    return tuple(layer >= first and layer not in dense and (layer + 1) % step == 0 for layer in range(count))


def _sentence(field: str, transformers: object, converter: object) -> str:
    return f"{field} in config.json is {transformers} to transformers and {converter} to the converter"


def _load(folder: Path) -> Any:
    from transformers import AutoConfig
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it advises on values, which are not the user's to change here
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    finally:
        logging.set_verbosity(before)


def _windows(stated: Any, layers: int) -> list[int | None] | int | None:
    """The window of each layer, by transformers' config or the converter's; one where all of them have it."""
    if isinstance(stated, ModelConfig):
        found = [stated.window_of(layer) for layer in range(layers)]
    else:
        window, kinds = getattr(stated, "sliding_window", None), getattr(stated, "layer_types", None)
        found = [window if kind == "sliding_attention" else None for kind in kinds or ["sliding_attention"] * layers]
    return found[0] if len(set(found)) == 1 else found


_LOCAL = "sliding_attention"  # the key of transformers 5, where layers with a window have a rope of their own


def _local_rope(stated: Any, config: ModelConfig) -> list[str]:
    """The rope of layers with a window, which is never scaled."""
    values = getattr(stated, "rope_parameters", None) or {}
    local = values.get(_LOCAL) or {"rope_theta": getattr(stated, "rope_local_base_freq", None)}
    said = {"rope_theta": local.get("rope_theta"), "rope_type": local.get("rope_type", "default")}
    read = {"rope_theta": config.local_rope_theta, "rope_type": "default"}
    return [] if said == read else [_sentence("rope of layers with a window", json.dumps(said), json.dumps(read))]


def rope_values(stated: Any) -> dict[str, Any]:
    """Rope of a transformers config, in the words of `frequencies`, of transformers 4 and 5."""
    values = dict(getattr(stated, "rope_parameters", None) or getattr(stated, "rope_scaling", None) or {})
    values = dict(values.get("full_attention") or {}) if _LOCAL in values else values
    kind = values.pop("rope_type", None) or values.pop("type", None) or "default"
    values.pop("type", None)
    theta = values.pop("rope_theta", None)
    theta = theta if theta is not None else getattr(stated, "rope_theta", 10000.0)
    values.setdefault("partial_rotary_factor", getattr(stated, "partial_rotary_factor", None))
    values.pop("finetuned", None)  # a note of old configs of yarn, which no rope reads
    known = {name for name in values if name in _ROPE}
    said = {name: value for name, value in values.items() if (value is not None if name in known else value)}
    said = {name: value for name, value in said.items() if not name.startswith("mrope_")}  # of text: all are the same
    return {"kind": kind, "theta": theta, **said}


def _rope_problems(stated: Any, config: ModelConfig) -> list[str]:
    """Compares the angles, since the same rope can be said in several ways."""
    said, read = rope_values(stated), {**rope_of(config), "partial_rotary_factor": config.rotary_percent}
    angles = []
    for values in (said, read):
        kwargs = dict(values)
        dim = int(config.head_dim * kwargs.pop("partial_rotary_factor", 1.0))
        try:
            angles.append(frequencies(dim=dim, **kwargs))
        except (ConversionError, TypeError) as error:
            return [f"the rope in config.json is {json.dumps(said, default=str)} to transformers: {error}"]
    (wanted, wanted_scaling), (found, scaling) = angles
    softmax = [values.get("mscale_all_dim") or 0 for values in (said, read)] if config.mla is not None else [0, 0]
    same = wanted.shape == found.shape and torch.equal(wanted, found) and softmax[0] == softmax[1]
    if same and math.isclose(wanted_scaling, scaling, rel_tol=1e-12):
        return []
    return [_sentence("rope", json.dumps(said, default=str), json.dumps(read, default=str))]
