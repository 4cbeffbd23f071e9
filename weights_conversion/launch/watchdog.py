"""Who lives, and what ends a rank whose connection hangs or whose work does not come back to hear of a failure."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

from weights_conversion.launch import saying
from weights_conversion.launch.endings import End, Limits


class Signs:
    """The last sign of life of each rank that is watched, and when it was first seen here."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[str, float]] = {}

    def note(self, rank: int, sign: str) -> None:
        if rank not in self._seen or self._seen[rank][0] != sign:
            self._seen[rank] = (sign, time.monotonic())

    def silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, when) in self._seen.items() if now - when > seconds]


class Watchdog:
    """A thread of its own, since all others may hang. `contact()` is when the store last answered; `lost()` fails.

    | the work has not come back from another's failure for | and then                                            |
    |-------------------------------------------------------|-----------------------------------------------------|
    | limits.nudge                                          | its thread is interrupted, once, by a SIGTERM       |
    | limits.exit                                           | the process ends with 1; what rank 0 cannot say for |
    |                                                       | this rank, it says itself                           |
    """

    def __init__(self, rank: int, limits: Limits, end: End) -> None:
        self._rank, self._limits, self._end = rank, limits, end
        self._closed = threading.Event()

    def start(self, contact: Callable[[], float], lost: Callable[[], None]) -> None:
        threading.Thread(target=self._watch, args=(contact, lost), daemon=True, name="ranks-guard").start()

    def close(self) -> None:
        self._closed.set()

    def _watch(self, contact: Callable[[], float], lost: Callable[[], None]) -> None:
        limits, end = self._limits, self._end
        while not self._closed.wait(limits.beat):
            if end.failure is None and time.monotonic() - contact() > limits.silence:
                lost()
            if end.failure is None or end.noticed or end.settled:
                continue
            since = time.monotonic() - end.failed_at
            if since > limits.exit:
                if self._rank == 0 or not end.failure.told:
                    saying.say(f"error: {end.failure.text}")
                    saying.flush()
                os._exit(1)
            if since > limits.nudge and not end.nudged and callable(signal.getsignal(signal.SIGTERM)):
                end.nudged = True
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
