"""What a user sees of a run while it goes on: a bar in bytes, or a line now and then in a job log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from weights_conversion.text import size

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0


@contextmanager
def bar(total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yields a function that counts written bytes: a tqdm bar on a terminal, else a log line every LOG_SECONDS."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        shown = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc="converting")

        def show(count: int) -> None:
            with suppress(OSError, ValueError):  # the terminal may be gone; the work goes on
                shown.update(count)

        try:
            yield show
        finally:
            with suppress(OSError, ValueError):
                shown.close()
        return
    lock, state = threading.Lock(), {"bytes": done, "said": time.monotonic()}
    started = time.monotonic()

    def advance(count: int) -> None:
        with lock:
            state["bytes"] += count
            now = time.monotonic()
            if now - state["said"] < LOG_SECONDS:
                return
            state["said"] = now
            rate = max(state["bytes"] - done, 1) / (now - started)
            left = (total - state["bytes"]) / rate
            done_of = f"{size(state['bytes'])} of {size(total)}"
            logger.info("%s, %.2f GB/s, %.0f s left", done_of, rate / 1e9, left)

    yield advance
