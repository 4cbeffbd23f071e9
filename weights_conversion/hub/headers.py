"""A repository without its weights: a folder of its small files, and of weight files that are headers and holes.

A dry run plans from it as from the whole repository. Of each weight file that is not in the cache only the header is
fetched, by a range request.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.hub.fetching import TIMEOUTS, patiently

_MOST_HEADER_BYTES = 100 << 20  # as safetensors itself has it


def check_readable(weights: Sequence[str], repository: str, amount: str, cache: Path) -> None:
    """Raises ConversionError for weights whose headers cannot be read by range."""
    if any(name.endswith(".bin") for name in weights):
        raise ConversionError(
            f"Repository {repository} has .bin weights alone, which cannot be looked into from afar: {amount} would be "
            f"fetched into {cache}; run 'hf download {repository}' and then the same command, or leave --dry-run out."
        )


def write_folder(
    folder: Path, snapshot: Path, repository: str, commit: str, small: Sequence[str], weights: Sequence[str]
) -> None:
    """Fills `folder`; what of `weights` is in the cache's `snapshot` is linked, the others are made."""
    folder.mkdir(parents=True)
    for name in [*small, *(name for name in weights if name.endswith(".json"))]:
        shutil.copyfile(snapshot / name, folder / name)
    for name in weights:
        if name.endswith(".json"):
            continue
        if fileio.is_file(snapshot / name):
            (folder / name).symlink_to((snapshot / name).resolve())
        else:
            _write_hollow(folder / name, repository, commit)


def _write_hollow(path: Path, repository: str, commit: str) -> None:
    """A safetensors file with the header of the repository's, whose data are a hole."""
    from huggingface_hub import constants, parse_safetensors_file_metadata
    from huggingface_hub.errors import SafetensorsParsingError

    limit = float(TIMEOUTS * constants.HF_HUB_DOWNLOAD_TIMEOUT)
    try:
        found = patiently(
            lambda: parse_safetensors_file_metadata(repository, path.name, revision=commit), limit, path.name
        )
    except SafetensorsParsingError as error:
        raise ConversionError(
            f"{path.name} of repository {repository} has no header of safetensors: choose another --revision or "
            "--model-path."
        ) from error
    header: dict[str, Any] = {"__metadata__": found.metadata} if found.metadata else {}
    end = 0
    for name, tensor in found.tensors.items():
        start, stop = tensor.data_offsets
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, stop]}
        end = max(end, int(stop))
    text = json.dumps(header).encode()
    if len(text) > _MOST_HEADER_BYTES:
        raise ConversionError(
            f"{path.name} of repository {repository} has a header of {len(text)} bytes: do not use it."
        )
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
