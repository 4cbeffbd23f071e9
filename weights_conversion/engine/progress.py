"""What a user sees of a run while it goes on: a bar in bytes, or a line now and then in a job log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from weights_conversion.errors.text import rate, size

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0


@contextmanager
def bar(
    total: int, done: int = 0, doing: str = "converting", unit: str = "B"
) -> Iterator[Callable[[int], None]]:  # fmt: skip
    """Yields a function that counts what is done, in bytes or another `unit`: threads may call it.

    It is a tqdm bar on a terminal, else a log line every LOG_SECONDS.
    """
    lock = threading.Lock()
    if sys.stderr.isatty():
        from tqdm import tqdm

        shown = tqdm(total=total, initial=done, unit=unit, unit_scale=unit == "B", desc=doing, dynamic_ncols=True)

        def show(count: int) -> None:
            with lock, suppress(OSError, ValueError):  # the terminal may be gone; the work goes on
                shown.update(count)

        try:
            yield show
        finally:
            with suppress(OSError, ValueError):
                shown.close()
        return
    state = {"done": done, "said": time.monotonic()}
    started = time.monotonic()

    def advance(count: int) -> None:
        with lock:
            state["done"] += count
            now = time.monotonic()
            if now - state["said"] < LOG_SECONDS:
                return
            state["said"] = now
            speed = max(state["done"] - done, 1) / (now - started)
            left = (total - state["done"]) / speed
            amount = f"{state['done']} of {total} {unit}s"
            if unit == "B":
                amount = f"{size(state['done'])} of {size(total)}, {rate(speed)}"
            logger.info("%s: %s, %.0f s left", doing, amount, left)

    yield advance
