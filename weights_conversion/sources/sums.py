"""Megatron-Core's own sums of a source's files (integrity.json), checked before the work where it is asked for."""

from __future__ import annotations

from pathlib import Path

from weights_conversion.formats import integrity
from weights_conversion.launch import distributed


def checked(folder: Path, workers: int) -> list[str]:
    """A note, where the iteration in `folder` has sums; ConversionError: they are not those of its files."""
    with distributed.rank_zero_first("integrity"):
        found = integrity.check(folder, workers) if distributed.current().rank == 0 else None
    return [found] if found else []
