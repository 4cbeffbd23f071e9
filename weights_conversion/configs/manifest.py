"""conversion_manifest.json: what an import leaves beside the tracker, so that an export loses nothing.

It holds the source's config.json and generation_config.json verbatim, hashes of its tokenizer files, where it came
from, and the true number of vocabulary rows. Megatron ignores it, and an export works without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from weights_conversion import __version__
from weights_conversion.config import PARTS, ModelConfig, RopeScaling
from weights_conversion.configs import parts, secrets
from weights_conversion.errors import ConversionError
from weights_conversion.files.fileio import is_there, read_json, sha256

NAME = "conversion_manifest.json"
_FORMAT = 1


# Of the numbers and words of a ModelConfig, by the annotation; None of other fields, which are looked at one by one.
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "int | None": (int, type(None)),
    "float | None": (float, int, type(None)),
    "str | None": (str, type(None)),
}


def build(
    config: ModelConfig, *, true_vocab_size: int | None, repository: str | None, revision: str | None,
    source_config: Mapping[str, Any] | None, generation_config: Mapping[str, Any] | None, tokenizer: Sequence[Path],
    assumed: Sequence[str] = (), hf_form: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """The manifest's text. A local folder's path is not part of it.

    `assumed` are fields that nothing stated, so that the family's usual value was taken.
    `hf_form`: the form of a Hugging Face source, as an export then has it too: names of tensors that hold all experts
    of a layer, rows in a type of their own.
    """
    content = {
        "format": _FORMAT,
        "converter_version": __version__,
        "family": config.family,
        "repository": repository,
        "revision": revision,
        "true_vocab_size": true_vocab_size,
        "model": {name: value for name, value in asdict(config).items() if name != "family"},
        "assumed": list(assumed),
        "packed_experts": bool((hf_form or {}).get("packed_names")),
        **(hf_form or {}),
        "config": source_config,
        "generation_config": generation_config,
        "tokenizer_sha256": {path.name: sha256(path) for path in tokenizer},
    }
    return json.dumps(content, indent=2) + "\n"


def find(folders: Sequence[Path]) -> tuple[Path, dict[str, Any]] | None:
    """The first manifest in `folders`."""
    for folder in folders:
        path = folder / NAME
        if is_there(path):  # what is no file is no reason to go on without it
            content = read_json(path)
            if content.get("format") != _FORMAT or not isinstance(content.get("model"), dict):
                raise ConversionError(
                    f"{path} has format {content.get('format')!r}, this release reads {_FORMAT}; "
                    "use a newer release, or remove the file to convert from the checkpoint's args"
                )
            if problems := _malformed(content):
                raise ConversionError(*(f"{path} has {problem}; mend or remove it" for problem in problems))
            return path, secrets.without_secrets(content)[0]
    return None


def _malformed(content: Mapping[str, Any]) -> list[str]:
    """What in a manifest is not of the type that `build` writes."""
    problems = [
        f"{key} {content[key]!r}, where an object was expected"
        for key in ("config", "generation_config")
        if not isinstance(content.get(key), (dict, type(None)))
    ]
    rows = content.get("true_vocab_size")
    if type(rows) not in (int, type(None)):
        problems.append(f"true_vocab_size {rows!r}, where a number was expected")
    assumed = content.get("assumed", [])
    if not isinstance(assumed, list) or not all(isinstance(name, str) for name in assumed):
        problems.append(f"assumed {assumed!r}, where a list of names was expected")
    scaling = content["model"].get("rope_scaling")
    try:
        if scaling is not None:
            RopeScaling(**scaling)
    except TypeError:
        problems.append(f"rope_scaling {scaling!r}, where a kind with its numbers was expected")
    for name, kind in PARTS.items():
        stated = content["model"].get(name)
        if stated is not None and (problem := parts.malformed(kind, stated)):
            problems.append(problem)
    layers = content["model"].get("window_layers")
    if layers is not None and not (isinstance(layers, list) and all(type(has) is bool for has in layers)):
        problems.append(f"window_layers {layers!r}, where true or false of each layer was expected")
    pattern, count = content["model"].get("hybrid_layer_pattern"), content["model"].get("num_layers")
    if isinstance(pattern, str) and (set(pattern) - set("M*-E") or len(pattern) != count):
        problems.append(f"hybrid_layer_pattern {pattern!r}, where one of M*-E was expected for each of {count} layers")
    for name, value in content["model"].items():
        default = ModelConfig.__dataclass_fields__[name].type if name in ModelConfig.__dataclass_fields__ else None
        allowed = _TYPES.get(str(default))
        if allowed and type(value) not in allowed:
            problems.append(f"{name} {value!r}, which is of the wrong type")
    return problems


def model_fields(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Its ModelConfig fields, vocabulary apart."""
    known = ModelConfig.__dataclass_fields__
    fields = {name: value for name, value in manifest["model"].items() if name in known and name != "vocab_size"}
    scaling = fields.get("rope_scaling")
    result = fields | {"rope_scaling": None if scaling is None else RopeScaling(**scaling)}
    if fields.get("window_layers") is not None:
        result["window_layers"] = tuple(fields["window_layers"])
    for name, kind in PARTS.items():
        stated = fields.get(name)
        lists = {key: tuple(value) for key, value in (stated or {}).items() if isinstance(value, list)}
        result[name] = None if stated is None else kind(**{**stated, **lists})
    return result
