"""Repositories with vision around a text model: their config.json holds the text's in text_config.

Everything of the rest (vision_config, ids of image tokens) is kept as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weights_conversion.errors import ConversionError

KEY = "text_config"
# Keys that the outer config may state for the text too: transformers takes the outer ones for the whole model.
_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_SHARED = ("tie_word_embeddings", "quantization_config", "compression_config", "dtype", "torch_dtype", "architectures")


def text_of(raw: Mapping[str, Any], where: str = "config.json") -> Mapping[str, Any]:
    """The text model's keys of a config.json; itself where it is of a text model alone."""
    text = raw.get(KEY)
    if text is None:
        return raw
    if not isinstance(text, Mapping):
        raise ConversionError(f"{where} has {KEY} {text!r}, where an object was expected")
    tied = [part.get("tie_word_embeddings") for part in (raw, text)]
    if None not in tied and bool(tied[0]) != bool(tied[1]):
        raise ConversionError(
            f"{where} has tie_word_embeddings {tied[0]!r} and, in {KEY}, {tied[1]!r}; remove the wrong one"
        )
    shared = {key: raw[key] for key in _SHARED if raw.get(key) is not None}
    return {**shared, **{key: value for key, value in text.items() if value is not None or key not in shared}}


def model_type(raw: Mapping[str, Any]) -> Any:
    """Of the text model."""
    text = raw.get(KEY)
    return text.get("model_type", raw.get("model_type")) if isinstance(text, Mapping) else raw.get("model_type")


def stated(args: Mapping[str, Any]) -> dict[str, Any]:
    """What Megatron-Bridge's args of a whole model say of what is around its text."""
    found: dict[str, Any] = {key: args[key] for key in _IDS if type(args.get(key)) is int}
    vision = args.get("vision_config")
    if isinstance(vision, Mapping):
        found["vision_config"] = {
            key: value
            for key, value in vision.items()
            if isinstance(value, (str, int, float, list)) and not str(key).startswith("_")
        }
    return found


def around(base: Mapping[str, Any], text: Mapping[str, Any], kind: str, hf_class: str) -> dict[str, Any]:
    """A repository's config.json: `base`, or one made from nothing, around `text`."""
    inner = {key: value for key, value in text.items() if key not in ("architectures", "transformers_version")}
    result: dict[str, Any] = {**base, "architectures": [hf_class], "model_type": kind, KEY: inner}
    result["tie_word_embeddings"] = text["tie_word_embeddings"]
    for key in ("dtype", "torch_dtype"):
        if key in base:
            result[key] = text[key]
    return result
