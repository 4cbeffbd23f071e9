"""Links in a source that lead out of it: they are followed, since people link tokenizers and weights, and told."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from weights_conversion.files import fileio

_SHOWN = 10


def elsewhere(path: str | Path, root: str | Path) -> str | None:
    """Where a file or folder below `root` really lies; None: in `root`, or among the blobs of the hub's cache.

    `root` itself may be a link: whoever named it knows.
    """
    real, top = _real(path), _real(root)
    if real == top or real.startswith(os.path.join(top, "")):
        return None
    snapshots = os.path.dirname(top)  # of a repository's folder in the cache: blobs/SUM, snapshots/COMMIT/NAME
    blobs = os.path.join(os.path.dirname(snapshots), "blobs")
    if os.path.basename(snapshots) == "snapshots" and os.path.dirname(real) == blobs:
        return None
    return real


def _real(path: str | Path) -> str:
    """Raises OSError where a link on the way could not be looked at: it would not be told."""
    try:
        return os.path.realpath(path, strict=True)
    except fileio.ABSENT:
        return os.path.realpath(path)


def told(root: str | Path, paths: Iterable[str | Path], besides: Iterable[str] = ()) -> list[str]:
    """A sentence for each of `paths` below `root` that lies elsewhere, ten at most; not for the names `besides`."""
    top, named = os.path.join(os.path.abspath(root), ""), set(besides)
    mine = sorted({os.path.abspath(path) for path in paths})
    found = [
        (path, real)
        for path in mine
        if path.startswith(top) and os.path.basename(path) not in named and (real := elsewhere(path, root))
    ]
    said = [f"{path} is a link to {real}, which lies elsewhere; what it holds was taken" for path, real in found]
    if len(said) > _SHOWN:
        return [*said[:_SHOWN], f"{len(said) - _SHOWN} more files below {root} are links to what lies elsewhere"]
    return said
