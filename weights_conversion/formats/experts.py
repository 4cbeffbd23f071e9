"""How rank files spell experts: one tensor each, in two ways, or all of a rank in one. Here they become one each.

In Megatron-Core an expert's tensors are `linear_fc1.weight{e}` (TEGroupedMLP) or `local_experts.{e}.linear_fc1.weight`
(SequentialMLP). `linear_fc1.weight` holds all of a rank (moe_single_grouped_weight), and so did `weight1` of GroupedMLP
until 0.16, which stores each expert's matrix columns first, whatever the shape that it states.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping
from math import prod

from weights_conversion.errors import ConversionError
from weights_conversion.layouts.placement import TensorRef

_EACH = re.compile(r"(.*\.mlp\.experts\.)local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)")
_ALL = re.compile(r"(.*\.mlp\.experts\.)(linear_fc[12])\.(weight|bias)")
_GROUPED = re.compile(r"(.*\.mlp\.experts\.)weight([12])")


def experts_apart(tensors: Mapping[str, TensorRef], experts: int, where: str) -> dict[str, TensorRef]:
    """`tensors` of a rank with `experts` of its own, each under TEGroupedMLP's name. Two spellings of one: an error."""
    found: dict[str, TensorRef] = {}
    for name, ref in tensors.items():
        for spelled, part in _apart(name, ref, experts, where):
            spelled = sys.intern(spelled)  # the same on many ranks
            if spelled in found:
                raise ConversionError(f"{where} holds {spelled} twice, in two spellings ({name} is one); remove one")
            found[spelled] = part
    return found


def _apart(name: str, ref: TensorRef, experts: int, where: str) -> Iterator[tuple[str, TensorRef]]:
    if match := _EACH.fullmatch(name):
        yield f"{match[1]}{match[3]}.{match[4]}{match[2]}", ref
    elif match := _ALL.fullmatch(name):
        if not ref.shape or ref.shape[0] != experts:
            raise ConversionError(
                f"{name} in {where} has shape {list(ref.shape)}, where {experts} experts were expected"
            )
        for expert in range(experts):
            yield f"{match[1]}{match[2]}.{match[3]}{expert}", _slab(name, ref, expert, ref.shape[1:])
    elif match := _GROUPED.fullmatch(name):
        axis = 1 if match[2] == "1" else 0
        if len(ref.shape) != 2 or not experts or ref.shape[axis] % experts:
            raise ConversionError(
                f"{name} in {where} has shape {list(ref.shape)}, which {experts} experts cannot share"
            )
        # weight1 says (H, E x 2f) and weight2 (E x f, H); in memory they are (E, H, 2f) and (E, f, H).
        inner = ref.shape[axis] // experts
        shape = (inner, ref.shape[0]) if axis else (ref.shape[1], inner)
        for expert in range(experts):
            part = _slab(name, ref, expert, shape)
            yield f"{match[1]}linear_fc{match[2]}.weight{expert}", dataclasses.replace(part, transposed=True)
    else:
        yield name, ref


def _slab(name: str, ref: TensorRef, number: int, shape: tuple[int, ...]) -> TensorRef:
    """Part `number` of a tensor that is several of `shape` one behind the other."""
    start = ref.offset + number * prod(shape) * ref.dtype.itemsize
    return dataclasses.replace(ref, name=f"{name}[{number}]", shape=shape, offset=start)
