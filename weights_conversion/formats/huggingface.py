"""Hugging Face folders: safetensors and .bin weights with or without an index, and safetensors output."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio, told
from weights_conversion.files.fileio import read_json
from weights_conversion.formats import torch_files
from weights_conversion.formats.wrappers import unwrapped
from weights_conversion.layouts.placement import PAGE, Placed, TensorRef, whole
from weights_conversion.mapping.parameters import is_buffer

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Pieces of quantised tensors, of any number of dimensions: scales beside values, blocks of small ones.
_PIECES = re.compile(r".*_(scale|scale_inv|scales|blocks)")
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit

# The order in which transformers looks for weights.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read_safetensors(path: Path) -> dict[str, TensorRef]:
    """The tensors of a safetensors file, from its header alone. A header that lies is refused, by safe_open."""
    header, length = _header(path)
    unknown = {name: entry.get("dtype") for name, entry in header.items() if isinstance(entry, dict)}
    for name, dtype in unknown.items():
        if isinstance(dtype, str) and dtype not in DTYPES:
            raise ConversionError(
                f"{name} in {path} is stored as {dtype}, which is a quantised or unknown type; "
                "convert the unquantised checkpoint"
            )
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError, RuntimeError, MemoryError) as error:  # torch opens the file once more
        if failed := told.of_the_system(error, path):
            raise ConversionError(f"{path} cannot be read ({failed.strerror or error})") from failed
        if isinstance(error, SafetensorError):
            raise _damaged(path, str(error)) from error
        raise ConversionError(f"{path} cannot be read ({error})") from error
    return {
        name: TensorRef(
            str(path), name, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header's JSON, in which safe_open does not say where data begin, and its bytes."""
    try:
        with fileio.open_file(path) as file, fileio.named("reading", path):
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(path, f"its header claims {length} bytes, the file has {size}")
            header = json.loads(file.read(length), object_pairs_hook=_once)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    return header, length


def _damaged(path: Path, why: str) -> ConversionError:
    return ConversionError(f"{path} is not a complete safetensors file: {why}; download or copy it again")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name stands in it twice")
    return content


def weight_files(folder: Path) -> tuple[Path | None, list[Path]]:
    """The index (if any) and the weight files of an HF folder."""
    present = [folder / name for name in WEIGHT_FILES if fileio.is_file(folder / name)]
    if not present and (parts := _parts_without_index(folder)):
        return None, parts
    if not present:
        raise ConversionError(
            f"{folder} holds no weights: it has none of {', '.join(WEIGHT_FILES)}; download or copy them there"
        )
    if present[0].suffix != ".json":
        return None, [present[0]]
    index = read_json(present[0], fileio.MAX_INDEX_BYTES)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ConversionError(f"{present[0]} has no weight_map from tensor names to file names")
    files = sorted(set(names.values()))
    strays = [name for name in files if Path(name).name != name or name in ("", ".", "..") or "\\" in name]
    if strays:
        raise ConversionError(f"{present[0]} names {strays[0]!r}, which is not a file of its own folder")
    missing = [name for name in files if not fileio.is_file(folder / name)]
    if missing:
        raise ConversionError(
            f"{folder} lacks {', '.join(missing)}, which {present[0].name} names; download the missing files"
        )
    return present[0], [folder / name for name in files]


def _parts_without_index(folder: Path) -> list[Path]:
    """model-00001-of-00003.safetensors and so on: their names say whether all are there."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        found = [re.fullmatch(rf"{stem}-(\d+)-of-(\d+)\.{suffix}", path.name) for path in sorted(folder.iterdir())]
        numbers = {int(match[1]): match[0] for match in found if match}
        counts = {int(match[2]) for match in found if match}
        if not numbers:
            continue
        if len(counts) != 1 or set(numbers) != set(range(1, max(counts) + 1)):
            raise ConversionError(
                f"{folder} has no index, and of its {stem}-*-of-*.{suffix} files only {', '.join(numbers.values())}; "
                "download the missing files"
            )
        return [folder / name for _, name in sorted(numbers.items())]
    return []


def check_no_adapter(folder: Path) -> None:
    """Refuses base weights with an adapter beside them: transformers, where peft is installed, loads both."""
    if fileio.is_file(folder / "adapter_config.json"):
        raise ConversionError(
            f"{folder} holds adapter_config.json beside its weights, so that transformers loads base plus adapter; "
            "merge the adapter (peft's merge_and_unload) and convert the merged folder, or move the adapter's files "
            "out of this one to convert the base alone"
        )


def read_hf(folder: Path) -> dict[str, Placed]:
    """All tensors of an HF folder by name, checked against its index in both directions."""
    check_no_adapter(folder)
    index, files = weight_files(folder)
    placed: dict[str, Placed] = {}
    problems = []
    for file in files:
        if file.suffix == ".safetensors":
            refs = read_safetensors(file)
        else:
            opened = torch_files.read_torch_file(file)
            refs = torch_files.tensors(opened, opened.content)
        for name, ref in refs.items():
            if name in placed:
                problems.append(f"{name} stands in two files, {placed[name].copies[0][0].ref.file} and {file}")
            # Three: all experts of a layer, or a convolution; more: an image's.
            if 1 <= len(ref.shape) <= 5 or is_buffer(name) or _PIECES.fullmatch(name):
                placed[name] = whole(ref)
            else:
                problems.append(f"{name} in {file} has shape {list(ref.shape)}; weights have one to five dimensions")
    if index is not None:
        names = read_json(index, fileio.MAX_INDEX_BYTES)["weight_map"]
        problems += [
            f"{name} should be in {names[name]}, as {index.name} says, but "
            + (f"is in {os.path.basename(placed[name].copies[0][0].ref.file)}" if name in placed else "is not there")
            for name in sorted(names)
            if name not in placed or os.path.basename(placed[name].copies[0][0].ref.file) != names[name]
        ]
    if problems:
        raise ConversionError(*problems)
    plain = unwrapped(placed)
    return {plain[name]: tensor for name, tensor in placed.items()}


@dataclass(frozen=True)
class SafetensorsTarget:
    """A safetensors file to be written, its tensors in the order of `refs`."""

    file: str
    refs: tuple[TensorRef, ...]

    def header(self) -> bytes:
        """Length and JSON, padded with spaces so that the data begin on a page."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for ref in self.refs:
            entries[ref.name] = {
                "dtype": _NAMES[ref.dtype],
                "shape": list(ref.shape),
                "data_offsets": [position, position + ref.nbytes],
            }
            position += ref.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % PAGE)
        return len(text).to_bytes(8, "little") + text

    def create(self, file: BinaryIO) -> dict[TensorRef, int]:
        """Writes the header and gives the file its size; returns the first byte of each tensor's data."""
        header = self.header()
        file.write(header)
        file.truncate(len(header) + sum(ref.nbytes for ref in self.refs))
        return self.find(file)

    def find(self, file: BinaryIO) -> dict[TensorRef, int]:
        """What `create` returned, of a file that is there."""
        offsets, position = {}, len(self.header())
        for ref in self.refs:
            offsets[ref] = position
            position += ref.nbytes
        return offsets

    def finish(self, file: BinaryIO, crcs: Mapping[TensorRef, int], offsets: Mapping[TensorRef, int]) -> None:
        """Nothing is left to do: the header was complete from the start."""


@dataclass(frozen=True)
class Index:
    """model.safetensors.index.json: which file holds which tensor."""

    targets: Sequence[SafetensorsTarget] = field(hash=False)

    def text(self) -> str:
        where = {ref.name: target.file for target in self.targets for ref in target.refs}
        total = sum(ref.nbytes for target in self.targets for ref in target.refs)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        return json.dumps(content, indent=2) + "\n"
