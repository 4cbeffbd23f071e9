"""Tensors that hold several: all experts of a layer, or the parts of a projection."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Packed:
    """Where an expert's tensor is, if one tensor holds those of all experts of a layer: (E, parts x rows, columns).

    `always`: there is no other spelling. `transposed`: it is (E, columns, rows); such a tensor has one part. `turned`
    is the name of the same tensor where it is not transposed.
    """

    name: str
    part: int
    parts: int
    always: bool = False
    transposed: bool = False
    turned: str = ""

    def shape(self, experts: int, each: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tensor, where one expert's part has the shape `each`."""
        rows, *rest = each
        return (experts, *rest, rows) if self.transposed else (experts, self.parts * rows, *rest)


@dataclass(frozen=True)
class Part:
    """Where a row's tensor stands in one that joins several: as number `at` of `parts`, the axes of their rows.

    The joined tensor `name` is `groups` (an axis) times the share of each part, in order: HF has it so once ("one": all
    of each part together) or head by head, and Megatron's ranks one after the other each hold their share of each part.
    `saved_apart`: torch_dist also has the state of its module under the names of the modules that it stands for.
    """

    name: str
    at: int
    parts: tuple[str, ...]
    groups: str = "one"
    saved_apart: bool = False
