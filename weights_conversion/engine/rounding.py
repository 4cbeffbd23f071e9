"""Values that a conversion cannot give back as they were: of rows that are stored minus one, or in another type."""

from __future__ import annotations

from weights_conversion.engine.execute import read_rows
from weights_conversion.engine.recentring import recentred
from weights_conversion.engine.streams import Scratch, Source
from weights_conversion.layouts.plan import Plan, Step


def told(plan: Plan) -> list[str]:
    """A note for each such row, with how many of its values do not come back; these rows are small."""
    if plan.source.megatron == plan.target.megatron:
        return []
    counts: dict[str, tuple[int, int]] = {}
    source = Source()
    try:
        for step in plan.steps:
            row = step.instance.row
            if row.centred or row.hf_dtype is not None:
                lost, values = _lost(plan, step, source)
                before = counts.get(row.megatron, (0, 0))
                counts[row.megatron] = before[0] + lost, before[1] + values
    finally:
        source.close()
    return [
        f"rounding   {lost} of {values} values of {name.replace('{layer}', 'N')} do not come back as they were from "
        "the type that they are written in"
        for name, (lost, values) in counts.items()
        if lost
    ]


def _lost(plan: Plan, step: Step, source: Source) -> tuple[int, int]:
    scratch = Scratch()
    stored = read_rows(step.source[0], (0, step.source[0].rows), source, scratch)
    by = (-1.0 if plan.target.megatron else 1.0) if step.instance.row.centred else 0.0
    (there,) = recentred([stored], by, scratch)
    (back,) = recentred([there.to(step.target[0].dtype)], -by, scratch)
    return int((back.to(stored.dtype) != stored).sum()), stored.numel()
