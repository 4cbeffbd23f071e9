"""Tensors that join several parts: where the rows of one part stand in them. Geometry only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from weights_conversion.config import ModelConfig
from weights_conversion.layouts.adapted import Run, moved
from weights_conversion.layouts.placement import Placed
from weights_conversion.mapping.parameters import Part


def joined_shape(part: Part, shape: Sequence[int], config: ModelConfig) -> tuple[int, ...]:
    """Shape of the tensor that a part of `shape` is joined in."""
    return (sum(config.axes[axis] for axis in part.parts), *shape[1:])


def before(part: Part, config: ModelConfig) -> int:
    """Rows of the parts in front of it."""
    return sum(config.axes[axis] for axis in part.parts[: part.at])


def runs(part: Part, config: ModelConfig, groups: int) -> list[Run]:
    """(first row in the joined tensor, first row of the part, how many), for each group.

    `groups` must divide the rows of every part; which does not is refused where the model is checked.
    """
    sizes = [config.axes[axis] // groups for axis in part.parts]
    own, total, first = sizes[part.at], sum(sizes), sum(sizes[: part.at])
    return [(number * total + first, number * own, own) for number in range(groups)]


def part_of(joined: Placed, part: Part, config: ModelConfig, groups: int | None = None, name: str = "") -> Placed:
    """One part of a joined tensor, and of what adapters add to it; `groups` by default as the part says."""
    rows = runs(part, config, config.axes[part.groups] if groups is None else groups)
    height = config.axes[part.parts[part.at]]
    placed = moved(joined, rows, height, name or joined.name)
    deltas = tuple(replace(delta, above=moved(delta.above, rows, height, delta.above.name)) for delta in joined.deltas)
    return replace(placed, deltas=deltas)
