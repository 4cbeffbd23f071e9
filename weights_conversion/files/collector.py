"""Python's search for cycles among objects, held back where hundreds of thousands are made and all of them stay."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """A block, or as a decorator a function, without that search: a plan of 100,000 tensors takes half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
