"""Weights of a side with an adapter: what is stored and, beside it, the product of the adapter's factors."""

from __future__ import annotations

import re

from torch import Tensor

from weights_conversion.architectures import FAMILIES
from weights_conversion.engine.execute import read_rows
from weights_conversion.engine.streams import Scratch, Source
from weights_conversion.layouts.placement import Delta, overlaps
from weights_conversion.verification.forward import Weights
from weights_conversion.verification.sides import Model


def with_deltas(weights: Weights, model: Model, source: Source) -> Weights:
    """`weights`, in float32 where an adapter changes them; the same where the side has none."""
    found = _deltas(model)
    if not found:
        return weights

    def read(name: str, rows: slice | None) -> Tensor:
        stored = weights(name, rows)
        if name not in found:
            return stored
        result = stored.float()
        first = 0 if rows is None else rows.start
        for delta in found[name]:
            below = read_rows(delta.below, (0, delta.below.rows), source, Scratch()).float()
            for _, start, stop in overlaps(delta.above.copies[0], (first, first + len(result))):
                above = read_rows(delta.above, (start, stop), source, Scratch()).float()
                result[start - first : stop - first] += delta.scale * (above @ below)
        return result

    return read


def _deltas(model: Model) -> dict[str, tuple[Delta, ...]]:
    """Of each stored tensor by the name that a forward pass asks for."""
    if not model.dialect.megatron:  # whole tensors, also where several parts are joined in one
        around = re.compile(r"(model\.language_model|language_model\.model)\.")  # of a repository around a text model
        return {around.sub("model.", name, count=1): deltas for name, deltas in model.added.items()}
    found: dict[str, tuple[Delta, ...]] = {}
    for instance in FAMILIES[model.config.family].instances(model.config):
        deltas = [placed.deltas for placed in model.placed.get(instance.key, ())]
        if any(deltas):
            (own,) = deltas
            found[model.dialect.rank_name(instance.megatron(model.dialect.spell(instance.row.megatron)))] = own
    return found
