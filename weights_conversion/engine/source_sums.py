"""Megatron-Core's own sums of a source's files (integrity.json), checked before the work where it is asked for."""

from __future__ import annotations

from pathlib import Path

from weights_conversion.engine.job import RunOptions
from weights_conversion.formats import integrity
from weights_conversion.launch import distributed


def checked(folder: Path, options: RunOptions) -> list[str]:
    """A note, where sums or a proof are asked for and the iteration in `folder` has sums; ConversionError: wrong."""
    if not (options.checksums or options.verify):
        return []
    with distributed.rank_zero_first("integrity"):
        found = integrity.check(folder, options.workers) if distributed.current().rank == 0 else None
    return [found] if found else []
