"""Whole tensors by row ranges from Hugging Face folders, without the converter's readers.

The files are read by safetensors and torch.load; only the rows that are asked for are read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weights_conversion.errors import ConversionError
from weights_conversion.files.fileio import named, read_json
from weights_conversion.verification.forward import Weights


def huggingface_weights(folder: Path) -> Weights:
    """Weights of an HF folder. The files are those that transformers would open."""
    names: dict[str, Callable[[slice | None], Tensor]] = {}
    for path in _files(folder):
        names |= _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)

    def read(name: str, rows: slice | None) -> Tensor:
        if name not in names and (packed := _packed(name, rows, names)) is not None:
            return packed
        return names[_stored_as(name, names, folder)](rows)

    return read


def _packed(name: str, rows: slice | None, names: Mapping[str, Callable[[slice | None], Tensor]]) -> Tensor | None:
    """Rows of one expert's matrix, where one tensor holds those of all experts: (E, 2f, H) with gate above up."""
    match = re.fullmatch(r"(.*\.experts\.)(\d+)\.(gate|up|down)_proj\.weight", name)
    whole = f"{match[1]}{'down_proj' if match[3] == 'down' else 'gate_up_proj'}" if match else ""
    if match is None or whole not in names:
        return None
    matrix = names[whole](slice(int(match[2]), int(match[2]) + 1))[0]
    half = {"gate": slice(0, len(matrix) // 2), "up": slice(len(matrix) // 2, None), "down": slice(None)}[match[3]]
    return matrix[half][rows or slice(None)]


_AROUND_LAYERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def _stored_as(name: str, names: Iterable[str], folder: Path) -> str:
    """The one name under which a tensor is stored: its own, or its own behind a wrapper's."""
    if name in names:
        return name
    longer = [stored for stored in names if f".{_AROUND_LAYERS.sub('', stored)}".endswith(f".{name}")]
    if len(longer) != 1:
        raise ConversionError(f"{folder} has no tensor {name}")
    return longer[0]


def _files(folder: Path) -> list[Path]:
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return sorted(folder.glob("model-*-of-*.safetensors")) or sorted(folder.glob("pytorch_model-*-of-*.bin"))


def _safetensors(path: Path) -> dict[str, Callable[[slice | None], Tensor]]:
    from safetensors import safe_open

    with _read_by("safetensors", path):
        file: Any = safe_open(path, framework="pt")
        names = list(file.keys())

    def reader(name: str) -> Callable[[slice | None], Tensor]:
        def read(rows: slice | None) -> Tensor:
            with _read_by("safetensors", path):
                return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]

        return read

    return {name: reader(name) for name in names}


# Of which libraries of C++ and Rust tell in words alone.
_OF_THE_SYSTEM = (
    errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC,
    errno.EDQUOT, errno.EROFS, errno.EINTR, errno.ENODEV, errno.EBUSY, errno.ETIMEDOUT, errno.ENOSYS, errno.EOPNOTSUPP,
)  # fmt: skip


@contextlib.contextmanager
def _read_by(library: str, path: Path) -> Iterator[None]:
    """What a library says of a file that it does not read is one sentence, which names the file."""
    try:
        with named("reading", path):
            yield
    except (ConversionError, OSError, MemoryError):
        raise
    except Exception as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        for number in errno.errorcode:
            words = os.strerror(number)
            numbered = f"{words} ({number})" in str(error) or f"(os error {number})" in str(error)
            if numbered or (number in _OF_THE_SYSTEM and words in str(error)):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise ConversionError(f"{path} cannot be read by {library} ({why[0][:200]})") from error


def _torch_file(path: Path) -> dict[str, Callable[[slice | None], Tensor]]:
    # Only archives can be mapped; the files of torch before 1.6 are none.
    with _read_by("torch.load", path):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))

    def reader(tensor: Tensor) -> Callable[[slice | None], Tensor]:
        return lambda rows: tensor.detach() if rows is None else tensor.detach()[rows]

    return {name: reader(tensor) for name, tensor in content.items() if isinstance(tensor, Tensor)}
