"""Python's search for cycles among objects, held back where hundreds of thousands are made and all of them stay."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_found: list[bool] = []  # whether it was on when a block began, of each that goes on


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """A block, or as a decorator a function, without that search: a plan of 100,000 tensors takes half the time."""
    _found.append(gc.isenabled())
    gc.disable()
    try:
        yield
    finally:
        if _found.pop():
            gc.enable()


@contextlib.contextmanager
def with_collector() -> Iterator[None]:
    """A block within such a one, with the search if there was one outside."""
    outside = bool(_found) and _found[0]
    if outside:
        gc.enable()
    try:
        yield
    finally:
        if outside:
            gc.disable()
