"""Meta's Llama folders: consolidated.NN.pth, each a model-parallel part, and params.json."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.files.fileio import read_json
from weights_conversion.formats import torch_files
from weights_conversion.layouts.placement import Placed, TensorRef, joined, two_dimensional, whole
from weights_conversion.mapping.parameters import is_buffer

# Along which dimension Meta's parts were cut; what is not named here is the same in every part.
_CUT = {
    "tok_embeddings": 1,
    "output": 0,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
}


def find_meta(folder: Path, names: Iterable[str]) -> Path | None:
    """The folder with consolidated.00.pth: `folder` itself, or one of its children `names`, as Meta names downloads."""
    for candidate in (folder, *(folder / name for name in names)):
        if fileio.is_file(candidate / "consolidated.00.pth"):
            return candidate
    return None


def read_params(folder: Path) -> dict[str, Any]:
    return read_json(folder / "params.json")


def read_meta(folder: Path) -> dict[str, Placed]:
    """All tensors of a Meta folder by Meta's name, their parts joined (not copied)."""
    found = {re.fullmatch(r"consolidated\.([0-9]{2,4})\.pth", path.name): path for path in folder.iterdir()}
    paths = {int(match[1]): path for match, path in found.items() if match}
    missing = sorted(set(range(max(paths, default=0) + 1)) - set(paths))
    if missing:
        raise ConversionError(f"{folder} lacks part {', '.join(f'consolidated.{part:02d}.pth' for part in missing)}")
    parts: list[dict[str, TensorRef]] = []
    for number in sorted(paths):
        opened = torch_files.read_torch_file(paths[number])
        parts.append(torch_files.tensors(opened, opened.content))
    problems, placed = [], {}
    for name in sorted({name for part in parts for name in part}):
        refs = [part[name] for part in parts if name in part]
        if len(refs) != len(parts) and not is_buffer(name):
            problems.append(f"{name} is in {len(refs)} of the {len(parts)} parts of {folder}")
            continue
        if is_buffer(name):
            placed[name] = whole(refs[0])
            continue
        cut = next((_CUT[piece] for piece in name.split(".") if piece in _CUT), None)
        shapes = {two_dimensional(ref.shape) if len(ref.shape) in (1, 2) else ref.shape for ref in refs}
        if len(shapes) > 1 or len({ref.dtype for ref in refs}) > 1 or len(refs[0].shape) not in (1, 2):
            problems.append(f"{name} has shapes {sorted(shapes)} in the parts of {folder}, where all are the same")
            continue
        placed[name] = joined(name, refs, cut)
    if problems:
        raise ConversionError(*problems)
    return placed
