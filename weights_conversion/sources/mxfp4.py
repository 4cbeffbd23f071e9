"""MXFP4 tensors of a Hugging Face folder: NAME_blocks of nibbles and NAME_scales, of which one tensor is made.

It is called NAME_blocks: such files have the rows of each expert's matrix first, where NAME itself, in a folder that is
not quantised, has its columns first. A shape does not always show which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from weights_conversion.layouts.decoding import MXFP4_VALUES, Mxfp4
from weights_conversion.layouts.placement import Placed, TensorRef, whole

BLOCKS, SCALES = "_blocks", "_scales"
_EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)  # the same bytes


@dataclass
class Found:
    """Tensors that are no parts of others, the computed ones among them; `names` of those; what is wrong, by name."""

    tensors: dict[str, Placed] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)


def joined(tensors: Mapping[str, Placed], dtype: torch.dtype) -> Found:
    """`tensors` with each pair of blocks and scales as the values (experts, rows, columns) that they mean."""
    found = Found()
    for name, placed in tensors.items():
        if name.endswith(SCALES) and placed.dtype in _EXPONENTS:
            if name.removesuffix(SCALES) + BLOCKS not in tensors:
                found.problems.append((name, f"{name} has no {BLOCKS} beside it; download the folder again"))
        elif name.endswith(BLOCKS) and placed.dtype == torch.uint8:
            base = name.removesuffix(BLOCKS)
            scales = tensors.get(base + SCALES)
            pair = placed.copies[0][0].ref, scales.copies[0][0].ref if scales is not None else None
            if problem := _problem(name, *pair):
                found.problems.append((name, problem))
            elif base in tensors:
                found.problems.append((name, f"{name} is there and {base} too, which are the same weights; remove one"))
            else:
                found.tensors[name] = _computed(*pair, dtype)
                found.names.append(name)
        else:
            found.tensors[name] = placed
    return found


def _problem(name: str, blocks: TensorRef, scales: TensorRef | None) -> str | None:
    if scales is None:
        return f"{name} has no {SCALES} beside it; download the folder again"
    if scales.dtype not in _EXPONENTS:
        return f"{scales.name} is stored as {scales.dtype}, where uint8 was expected: the exponents of its blocks"
    half = MXFP4_VALUES // 2
    if len(blocks.shape) != 4 or blocks.shape[-1] != half or 0 in blocks.shape:
        return f"{name} has shape {list(blocks.shape)}, where [experts, rows, blocks, {half}] was expected"
    if scales.shape != blocks.shape[:-1]:
        return f"{scales.name} has shape {list(scales.shape)}, where {list(blocks.shape[:-1])} was expected"
    return None


def _computed(blocks: TensorRef, scales: TensorRef | None, dtype: torch.dtype) -> Placed:
    assert scales is not None  # _problem has looked
    experts, height, groups, half = blocks.shape
    rows = experts * height
    exponents = replace(scales, shape=(rows, groups), dtype=torch.uint8)
    decoder = Mxfp4(replace(blocks, shape=(rows, groups * half)), exponents)
    shape = (experts, height, groups * MXFP4_VALUES)
    return whole(replace(blocks, dtype=dtype, offset=-1, shape=shape, decoder=decoder))
