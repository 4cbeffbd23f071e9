"""Keys of a config that no class here reads, but whose names say that they change the forward pass: refused by name.

A list of known foreign features grows stale with every release; names of features do not. What is asked for by a key
about rope, windows, norms, activations, scales, biases or attention is refused, unless its value says that the model
has no such thing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from reprlib import repr as short
from typing import Any

_CHANGES = re.compile(
    r"(^|_)(rope|act|acts|activation|moe|mup|ntk|sinks?)(_|$)"
    r"|rotary|rope_|alibi|yarn|position_emb|window|norm|scal|multiplier|softcap|clamp|clip|bias|residual|qk|kq|attn"
    r"|attention|expert|layer_types|logit|freq_factor|per_layer|(^|_)vision|hidden_activation|interleave"
)
# Numerics, training and how attention is computed: the model is the same.
_HARMLESS = re.compile(
    r"dropout|pdrop|attn_implementation|flash|sdpa|^output_|initializer|_in_fp32|grad|loss|^original_max_position"
    r"|^position_embedding_type$|logits_to_keep|^num_logits"
)
# Values by which a factor does nothing; for all other keys 1 may well be a count or a switch.
_FACTOR = re.compile(
    r"scal|multiplier|factor|pct|percent|ratio|fraction|temperature|alpha|gain|divisor|denominator|power"
)
_LIMIT = re.compile(r"cap|clip|clamp|window")
# What all models here have: true says nothing new, and false that this one has it not.
_HAD = re.compile(r"(use_)?(rope|rotary|rotary_emb|rotary_embeddings?|rms_?norm|swiglu|gated_mlp)")
_CAUSAL = re.compile(r"(is_|use_)?causal(_mask|_attention)?")
_POSITIONS = ("rope", "rotary", "absolute", None)  # "absolute" is what BERT's base class once wrote into every config


def is_plain(key: str, value: Any) -> bool:
    """Whether a value says that the model has no such thing."""
    if value is None or value is False or value in ("", [], {}, ()):
        return True
    if isinstance(value, (list, tuple)):
        return all(is_plain(key, item) for item in value)
    if type(value) in (int, float):
        if type(value) is float and value == 1.0:
            return not _LIMIT.search(key)
        return value == (1 if _FACTOR.search(key) else 0)
    return False


def changes_model(key: str, value: Any) -> bool:
    """Whether an unknown key, by its name and value, asks for another forward pass."""
    name = key.lower()
    if name == "position_embedding_type":
        return value not in _POSITIONS
    if name == "no_rope_layers":  # of SmolLM3 and Llama 4: 1 where a layer has rope
        return not (value is None or (isinstance(value, (list, tuple)) and all(item in (1, True) for item in value)))
    if _CAUSAL.fullmatch(name):  # true of every model here: false turns the mask off
        return value is False
    if _HAD.fullmatch(name) and isinstance(value, bool):
        return not value
    return bool(_CHANGES.search(name)) and not _HARMLESS.search(name) and not is_plain(name, value)


def idle_window(full: Mapping[str, Any], *, experts: bool = False) -> bool:
    """Whether use_sliding_window (Qwen's) changes nothing: no window, or layers that all stand before the first of it.

    With `experts` max_window_layers says nothing, or the opposite. layer_types, which transformers believes where it is
    stated, is compared apart from it.
    """
    layers, first = full.get("num_hidden_layers"), full.get("max_window_layers")
    beyond = type(layers) is int and type(first) is int and first >= layers and not experts
    return full["use_sliding_window"] is True and (full.get("sliding_window") is None or beyond)


def refusals(raw: Mapping[str, Any], known: Iterable[str], where: str, reader: str) -> list[str]:
    """Sentences on the keys that are not among `known` and change the model. `reader` is who does not read them."""
    skipped = frozenset(known)
    return [
        f"{where} has {key} {short(value)}, which {reader} does not know and which may change what the model computes; "
        "remove the key if the model has no such thing"
        for key, value in raw.items()
        if key not in skipped and changes_model(key, value)
    ]
