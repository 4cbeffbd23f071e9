"""Quantised tensors of a Hugging Face folder: values and scales, of which one tensor is made that is read like any.

A tensor is quantised if its type is, whatever a config says of it. Its scales lie beside it by name, in any file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from weights_conversion.configs import quantization
from weights_conversion.configs.quantization import Quantisation
from weights_conversion.errors import ConversionError
from weights_conversion.layouts.decoding import BlockScaled
from weights_conversion.layouts.placement import Decoder, Placed, TensorRef, whole
from weights_conversion.sources import mxfp4, naming

SCALED = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
_SUFFIXES = ("_scale_inv", "_scale")  # both are factors, whatever "inv" says
_SCALE = re.compile(r"(?P<of>.*)(?:_scale_inv|_scale)")
# Of inputs and of the cache: they change no weight.
_ACTIVATIONS = re.compile(r"(.*\.)?(input|activation|output|k|v|q|prob|kv)_(scale|scale_inv|scale_ub)")
_USUAL = (128, 128)  # DeepSeek's block, where nothing states one


@dataclass(frozen=True)
class Dequantised:
    """All tensors, quantised ones under their own names; and what is to be reported."""

    tensors: dict[str, Placed]
    notes: tuple[str, ...] = ()


def dequantised(tensors: Mapping[str, Placed], raw: Mapping[str, Any], where: str) -> Dequantised:
    """`tensors` of a folder with the config `raw`, each quantised one as values of the config's type.

    Raises ConversionError for scales that are missing, of a wrong shape or too many, and for kinds that are not read.
    """
    stated = quantization.read(raw, where)
    if isinstance(stated, list):
        raise ConversionError(*stated)
    small = mxfp4.joined(tensors, _dtype(raw, tensors))
    if small.problems:
        raise ConversionError(*naming.grouped(small.problems))
    tensors, noted = small.tensors, _noted(small)
    quantised = {name: each for name, each in tensors.items() if each.dtype in SCALED}
    if not quantised:
        said = f"quantised  {where} says {stated.method}, and no tensor is: they are read as they are" if stated else ""
        return Dequantised(tensors, noted or ((said,) if said else ()))
    _check_method(stated, quantised, where)
    dtype = _dtype(raw, tensors)
    found = {name: each for name, each in tensors.items() if not _ACTIVATIONS.fullmatch(name)}
    idle = len(tensors) - len(found)
    problems: list[tuple[str, str]] = []
    kinds: dict[str, int] = {}
    for name, placed in quantised.items():
        scales = [found.pop(name + suffix) for suffix in _SUFFIXES if name + suffix in found]
        decoder = _decoder(placed, scales, stated)
        if isinstance(decoder, str):
            problems.append((name, f"{name} is stored as {_short(placed.dtype)}, {decoder}"))
            continue
        kind = _kind(decoder)
        kinds[kind] = kinds.get(kind, 0) + 1
        found[name] = computed(placed, dtype, decoder)
    problems += [
        (name, f"{name} is a scale, but {match['of']} is {_of(tensors, match['of'])}")
        for name in found
        if (match := _SCALE.fullmatch(name))
    ]
    if problems:
        raise ConversionError(*naming.grouped(problems))
    parts = ", ".join(f"{count} with {kind}" for kind, count in kinds.items())
    method = stated.method if stated is not None else "fp8"
    note = (
        f"quantised  {method}: {len(quantised)} tensors ({parts}) are dequantised to {_short(dtype)}, by a product in "
        "float32 that is rounded once"
    )
    left = [f"quantised  {idle} scales of activations are left out: they change no weight"] if idle else []
    return Dequantised(found, (*noted, note, *left))


def _check_method(stated: Quantisation | None, quantised: Mapping[str, Placed], where: str) -> None:
    """A config of another method than these types have is not the config of these files."""
    if stated is None or stated.method != "mxfp4":
        return
    name, each = next(iter(quantised.items()))
    raise ConversionError(
        f"{where} says that the model is quantised by mxfp4, but {name} is stored as {_short(each.dtype)}; is it the "
        "config.json of these files?"
    )


def _noted(small: mxfp4.Found) -> tuple[str, ...]:
    if not small.names:
        return ()
    dtype = _short(small.tensors[small.names[0]].dtype)
    return (f"quantised  mxfp4: {len(small.names)} tensors of all experts are dequantised to {dtype}, which is exact",)


def computed(placed: Placed, dtype: torch.dtype, decoder: Decoder, shape: tuple[int, ...] | None = None) -> Placed:
    """A tensor as whole as `placed` (or of another shape), whose values a decoder makes."""
    ref = placed.copies[0][0].ref
    return whole(replace(ref, dtype=dtype, offset=-1, decoder=decoder, shape=ref.shape if shape is None else shape))


def _decoder(placed: Placed, scales: list[Placed], stated: Quantisation | None) -> BlockScaled | str:
    """What reads a tensor with its scales, or what is wrong."""
    if len(scales) != 1:
        number = "two scales" if scales else "no scale"
        return f"and has {number} beside it (_scale_inv, _scale): one was expected; download the folder again"
    values, scale = placed.copies[0][0].ref, scales[0].copies[0][0].ref
    if scale.dtype not in _SCALES:
        return f"and its scale {scale.name} as {_short(scale.dtype)}, where a floating-point type was expected"
    if len(values.shape) not in (2, 3) or 0 in values.shape:
        return f"with shape {list(values.shape)}, where a matrix was expected"
    *lead, height, width = values.shape
    matrices = lead[0] if lead else 1
    block = _block(values.shape, scale, stated)
    if isinstance(block, str):
        return block
    grid = (-(-height // block[0]), -(-width // block[1]))
    if not scale.shape or scale.numel == 1:  # one for all, however many matrices
        block, rows, grid = (matrices * height, width), matrices * height, (1, 1)
        matrices = 1
    else:
        rows = height
    return BlockScaled(
        replace(values, shape=(values.numel // width, width)),
        replace(scale, shape=(matrices * grid[0], grid[1])),
        block,
        rows,
    )


def _block(shape: tuple[int, ...], scale: TensorRef, stated: Quantisation | None) -> tuple[int, int] | str:
    """Rows and columns that share a scale, or why that is not to be told."""
    *lead, height, width = shape
    block = stated.block if stated is not None else None
    ways = {_grid(lead, height, width, block or _USUAL): block or _USUAL}
    if block is None:
        ways = {
            (*lead, height, 1): (1, width),
            (*lead, 1, 1): (height, width),
            (): (height, width),
            (1,): (height, width),
            **ways,
        }
        if lead:
            ways[tuple(lead)] = (height, width)
        elif height != width or (stated is not None and stated.per_row):
            ways[height,] = (1, width)
    if scale.shape in ways:
        return ways[scale.shape]
    if block is None and scale.shape == (height,):
        return f"and its scale {scale.name} has shape {list(scale.shape)}, which may be of its rows or its columns"
    wanted = " or ".join(dict.fromkeys(str(list(way)) for way in ways))
    of = f" for blocks of {block[0]} x {block[1]}" if block is not None else ""
    return (
        f"with shape {list(shape)}, and its scale {scale.name} has shape {list(scale.shape)}, where {wanted} was "
        f"expected{of}"
    )


def _grid(lead: list[int], height: int, width: int, block: tuple[int, int]) -> tuple[int, ...]:
    return *lead, -(-height // block[0]), -(-width // block[1])


def _kind(decoder: BlockScaled) -> str:
    rows, columns = decoder.block
    if (rows, columns) == (decoder.height, decoder.values.shape[1]):
        return "one scale each"
    return "a scale per row" if rows == 1 else f"a scale per block of {rows} x {columns}"


def _dtype(raw: Mapping[str, Any], tensors: Mapping[str, Placed]) -> torch.dtype:
    """The config's type; where it states none, that of the tensors that are not quantised."""
    stated = raw.get("dtype") or raw.get("torch_dtype")
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if isinstance(stated, str) and stated.removeprefix("torch.") in dtypes:
        return dtypes[stated.removeprefix("torch.")]
    sizes: dict[torch.dtype, int] = {}
    for name, each in tensors.items():
        if each.dtype in dtypes.values() and not _SCALE.fullmatch(name):
            sizes[each.dtype] = sizes.get(each.dtype, 0) + each.rows * each.columns
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.bfloat16)


def _of(tensors: Mapping[str, Placed], name: str) -> str:
    return f"stored as {_short(tensors[name].dtype)}, which needs none" if name in tensors else "not there"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
