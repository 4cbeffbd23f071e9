"""conversion_manifest.json: what an import leaves beside the tracker, so that an export loses nothing.

It holds the source's config.json and generation_config.json verbatim, hashes of its tokenizer files, where it came
from, and the true number of vocabulary rows. Megatron ignores it, and an export works without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from weights_conversion import __version__
from weights_conversion.config import ConversionError, ModelConfig
from weights_conversion.formats.huggingface import read_json

NAME = "conversion_manifest.json"
_FORMAT = 1


def build(
    config: ModelConfig, *, true_vocab_size: int | None, repository: str | None, revision: str | None,
    source_config: Mapping[str, Any] | None, generation_config: Mapping[str, Any] | None, tokenizer: Sequence[Path],
) -> str:  # fmt: skip
    """The manifest's text. A local folder's path is not part of it."""
    content = {
        "format": _FORMAT,
        "converter_version": __version__,
        "family": config.family,
        "repository": repository,
        "revision": revision,
        "true_vocab_size": true_vocab_size,
        "model": {name: value for name, value in asdict(config).items() if name != "family"},
        "config": source_config,
        "generation_config": generation_config,
        "tokenizer_sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tokenizer},
    }
    return json.dumps(content, indent=2) + "\n"


def find(folders: Sequence[Path]) -> tuple[Path, dict[str, Any]] | None:
    """The first manifest in `folders`."""
    for folder in folders:
        path = folder / NAME
        if path.is_file():
            content = read_json(path)
            if content.get("format") != _FORMAT or not isinstance(content.get("model"), dict):
                raise ConversionError(
                    f"{path} has format {content.get('format')!r}, this release reads {_FORMAT}; "
                    "use a newer release, or remove the file to convert from the checkpoint's args"
                )
            return path, content
    return None


def model_fields(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Its ModelConfig fields, vocabulary apart."""
    known = ModelConfig.__dataclass_fields__
    return {name: value for name, value in manifest["model"].items() if name in known and name != "vocab_size"}
