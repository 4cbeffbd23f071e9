"""config.json and generation_config.json of an export, beyond what the model itself says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from weights_conversion.configs import hf_config, hf_outer, quantization


def set_token_ids(
    config: dict[str, Any], generation: dict[str, Any], ids: Mapping[str, tuple[str, int]],
    overrides: Mapping[str, int], has_base: bool,
) -> None:  # fmt: skip
    """Overrides reach config.json and generation_config.json; a config made from nothing gets bos and eos too."""
    if not has_base:
        for key in ("bos", "eos"):
            if key in ids:
                config.setdefault(f"{key}_token_id", ids[key][1])
                generation.setdefault(f"{key}_token_id", ids[key][1])
    for key, value in overrides.items():
        config[key] = value
        generation[key] = value


def default_generation(config: Mapping[str, Any]) -> dict[str, Any]:
    """A generation_config.json as transformers makes it of a config."""
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
    return {"_from_model_config": True, **ids}


def differences(source: Mapping[str, Any], where: str, of: str, exported: Mapping[str, Any]) -> list[str]:
    """Fields whose meaning differs from the source's config.json (keys written for other readers do not count)."""
    if not source:
        return []
    source, exported = hf_outer.text_of(source, where), hf_outer.text_of(exported)
    rope = ("rope_theta", "rope_scaling", "rope_parameters")  # in two spellings: compared by what they mean
    pairs = {key: (source[key], exported[key]) for key in sorted(set(source) & set(exported) - set(rope))}
    for name, one, two in zip(
        ("rope theta", "rope scaling"),
        hf_config.read_rope(source, where),
        hf_config.read_rope(exported, "config.json"),
        strict=True,
    ):
        pairs[name] = (one, two)
    left = [key for key in hf_config.LEFT_BEHIND if source.get(key) is not None and key not in exported]
    differing = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    return [
        *(f"config     {key}: {one!r} in the {of}, {two!r} here" for key, (one, two) in differing.items()),
        *(f"config     {key} is left out: {_why_left(key)}" for key in left),
    ]


def _why_left(key: str) -> str:
    if key in quantization.KEYS:
        return "the weights that are written are not quantised"
    return "the export holds nothing of what it names"


def as_json(content: Mapping[str, Any]) -> bytes:
    """As the files of an export are written."""
    try:
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        return (json.dumps(content, indent=2) + "\n").encode()
