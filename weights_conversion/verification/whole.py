"""Whole tensors by row ranges from Hugging Face folders, without the converter's readers.

The files are read by safetensors and torch.load; only the rows that are asked for are read.
"""

from __future__ import annotations

import contextlib
import re
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio, told
from weights_conversion.files.fileio import named, read_json
from weights_conversion.verification import dequantised
from weights_conversion.verification.forward import Weights


def huggingface_weights(folder: Path) -> Weights:
    """Weights of an HF folder. The files are those that transformers would open."""
    names: dict[str, Stored] = {}
    for path in _files(folder):
        names |= _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
    names |= _dequantised(folder, names)
    dtype = _dtype(folder) if any(name.endswith("_blocks") for name in names) else torch.bfloat16

    # Of a text model, in a repository around it: within its names, or in front of them.
    inner, outside = "model.language_model.", "language_model."
    around = any(name.startswith(inner) for name in names)
    behind = any(name.startswith(f"{outside}model.") for name in names)
    respells = not any(_MIXTRAL in name for name in names)

    def read(name: str, rows: slice | None) -> Tensor:
        name = _respelled(name) if respells else name
        if around and name.startswith("model."):
            name = inner + name.removeprefix("model.")
        name = outside + name if behind else name
        if name not in names:
            part = _packed(name, rows, names)
            part = _of_experts(name, rows, names, dtype) if part is None else part
            if part is not None:
                return part
        return names[_stored_as(name, names, folder)].read(rows)

    return read


MAPPED_BYTES = 64 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its shape, and how to read rows of it (None: all)."""

    shape: tuple[int, ...]
    read: Callable[[slice | None], Tensor]


def _dtype(folder: Path) -> torch.dtype:
    """The type that a quantised folder's config states."""
    raw = read_json(folder / "config.json")
    stated = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return {"float16": torch.float16, "float32": torch.float32}.get(stated, torch.bfloat16)


def _dequantised(folder: Path, names: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors that have scales beside them, by their names, as the values that these make of them."""
    pairs = {name: next((n for n in (f"{name}_scale_inv", f"{name}_scale") if n in names), None) for name in names}
    raw = read_json(folder / "config.json") if any(pairs.values()) else {}
    dtype = _dtype(folder) if raw else torch.bfloat16

    def computed(values: Stored, scales: Stored) -> Stored:
        block = dequantised.block_of(values.shape, scales.shape, raw)

        def read(rows: slice | None) -> Tensor:
            stored, factors, first = values.read(rows), scales.read(None), rows.start or 0 if rows is not None else 0
            result = torch.empty(stored.shape, dtype=dtype)
            if stored.dim() == 2:
                return dequantised.values_of(stored, factors, first, block, result)
            for number, matrix in enumerate(stored):  # rows are whole experts
                own = factors[first + number] if len(factors.shape) > 0 and factors.numel() > 1 else factors
                dequantised.values_of(matrix, own, 0, block, result[number])
            return result

        return Stored(values.shape, read)

    return {name: computed(names[name], names[scale]) for name, scale in pairs.items() if scale is not None}


def _of_experts(name: str, rows: slice | None, names: Mapping[str, Stored], dtype: torch.dtype) -> Tensor | None:
    """Rows of an expert's matrix or bias, called NAME.{expert}, of files that have its columns first.

    `.gate` and `.up` behind it are every other row. Quantised files (NAME_blocks, MXFP4) have rows first.
    """
    match = re.fullmatch(r"(.*\.experts\.(?:gate_up|down)_proj(?:_bias)?)\.(\d+)(\.gate|\.up)?", name)
    if match is None:
        return None
    expert = slice(int(match[2]), int(match[2]) + 1)
    own = {".gate": slice(0, None, 2), ".up": slice(1, None, 2), None: slice(None)}[match[3]]
    if (whole := _held(match[1], names)) is not None:
        one = names[whole].read(expert)[0]
        return (one.t() if one.dim() == 2 else one)[own][rows or slice(None)]
    pair = [_held(match[1] + end, names) for end in ("_blocks", "_scales")]
    if None in pair:
        return None
    blocks, scales = (names[each].read(expert)[0][own][rows or slice(None)] for each in pair if each is not None)
    into = torch.empty(len(blocks), 32 * scales.shape[1], dtype=dtype)
    return dequantised.small_values(blocks.flatten(1), scales, into)


def _held(name: str, names: Iterable[str]) -> str | None:
    """`name`, or the one that a wrapper's stands in front of."""
    return name if name in names else next((each for each in names if each.endswith(f".{name}")), None)


_MIXTRAL = ".block_sparse_moe."  # in names of its experts, but not where transformers 5 saves them under its own


def _respelled(name: str) -> str:
    """A name of Mixtral's as all other models with experts have it."""
    if _MIXTRAL not in name:
        return name
    halves = {"w1": "gate", "w3": "up", "w2": "down"}
    name = re.sub(r"\.(w[123])\.weight$", lambda match: f".{halves[match[1]]}_proj.weight", name)
    return name.replace(_MIXTRAL, ".mlp.")


def _packed(name: str, rows: slice | None, names: Mapping[str, Stored]) -> Tensor | None:
    """Rows of one expert's matrix, where one tensor holds those of all experts: (E, 2f, H) with gate above up."""
    match = re.fullmatch(r"(.*\.experts\.)(\d+)\.(gate|up|down)_proj\.weight", name)
    whole = f"{match[1]}{'down_proj' if match[3] == 'down' else 'gate_up_proj'}" if match else ""
    if match and match[3] == "up" and whole not in names and f"{match[1]}up_proj" in names:  # without a gate
        return names[f"{match[1]}up_proj"].read(slice(int(match[2]), int(match[2]) + 1))[0][rows or slice(None)]
    if match is None or whole not in names:
        return None
    matrix = names[whole].read(slice(int(match[2]), int(match[2]) + 1))[0]
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
        if fileio.is_file(single):
            return [single]
        if fileio.is_file(index):
            return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return sorted(folder.glob("model-*-of-*.safetensors")) or sorted(folder.glob("pytorch_model-*-of-*.bin"))


def _safetensors(path: Path) -> dict[str, Stored]:
    opened = _Mapped(path)

    def reader(name: str) -> Callable[[slice | None], Tensor]:
        def read(rows: slice | None) -> Tensor:
            with _read_by("safetensors", path):
                file = opened.file()
                tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
                opened.has_read(tensor.nbytes)
                return tensor

        return read

    with _read_by("safetensors", path):
        file = opened.file()
        return {name: Stored(tuple(file.get_slice(name).get_shape()), reader(name)) for name in list(file.keys())}


class _Mapped:
    """A safetensors file, opened anew after every MAPPED_BYTES: what it has mapped and read counts as memory."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._file: Any = None
        self._bytes = 0

    def file(self) -> Any:
        from safetensors import safe_open

        with self._lock:
            if self._file is None:
                self._file, self._bytes = safe_open(self._path, framework="pt"), 0
            return self._file

    def has_read(self, count: int) -> None:
        with self._lock:
            self._bytes += count
            if self._bytes >= MAPPED_BYTES:
                self._file = None  # unmapped when nobody reads by it any more


@contextlib.contextmanager
def _read_by(library: str, path: Path) -> Iterator[None]:
    """What a library says of a file that it does not read is one sentence, which names the file."""
    with named("reading", path):
        try:
            yield
        except ConversionError:
            raise
        except Exception as error:
            if failed := told.of_the_system(error, path):
                raise failed from (None if failed is error else error)
            why = str(error).strip().splitlines() or [type(error).__name__]
            raise ConversionError(f"{path} cannot be read by {library} ({why[0][:200]})") from error


def _torch_file(path: Path) -> dict[str, Stored]:
    # Only archives can be mapped; the files of torch before 1.6 are none.
    with _read_by("torch.load", path):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))

    def reader(tensor: Tensor) -> Callable[[slice | None], Tensor]:
        return lambda rows: tensor.detach() if rows is None else tensor.detach()[rows]

    return {
        name: Stored(tuple(tensor.shape), reader(tensor))
        for name, tensor in content.items()
        if isinstance(tensor, Tensor)
    }
