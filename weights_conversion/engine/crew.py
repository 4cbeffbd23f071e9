"""How many threads work at once: tried on the first gigabyte of a large output, and then kept.

A filesystem across a network takes more with more streams at once; a local disk and few cores do not. Which this is,
only a measurement says. Chunks and what is written are the same whatever comes out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

THREADS_PER_WORKER = 2  # while one waits for its write, the other reads, converts and checksums
TRIED_PER_WORKER = 3  # with four, 70B's shape would take more than 0.6 GB
LEAST_BYTES = 4 << 30  # of an output that is worth a trial
WINDOW_BYTES = 256 << 20  # two for each number, in turn
SETTLE_BYTES = 64 << 20  # of a window, in which what the last one began is still on its way
GAIN = 1.1  # what the slower window of more threads must have beside the faster one of few: disks vary by themselves


def most_threads(workers: int, nbytes: int) -> int:
    """How many threads may at some moment convert an output of `nbytes`."""
    return workers * (TRIED_PER_WORKER if nbytes >= LEAST_BYTES else THREADS_PER_WORKER)


class Crew:
    """Lets threads 0 to `limit` - 1 work. May be used from all of them."""

    def __init__(self, workers: int, nbytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`nbytes` are to be converted; `clock` says seconds."""
        self.few, self.most = workers * THREADS_PER_WORKER, most_threads(workers, nbytes)
        self.limit = self.few
        self._clock, self._changed = clock, threading.Condition()
        self._left = [self.few, self.most] * 2 if self.most > self.few else []  # the windows, the current one first
        self._rates: dict[int, list[float]] = {self.few: [], self.most: []}  # bytes/s of each window
        self._done, self._begin = 0, (0, 0.0)  # bytes of the window; when it had settled, and with how many
        self._settled = False

    def admits(self, number: int) -> bool:
        """Waits until thread `number` is to work; False where it never is again."""
        with self._changed:
            while number >= self.limit and self._left:
                self._changed.wait()
            return number < self.limit

    def count(self, nbytes: int) -> None:
        """So many bytes are converted."""
        with self._changed:
            if not self._left:
                return
            self._done += nbytes
            if not self._settled and self._done >= SETTLE_BYTES:
                self._settled, self._begin = True, (self._done, self._clock())
            elif self._done >= WINDOW_BYTES:
                count, since = self._begin
                self._rates[self.limit].append((self._done - count) / max(self._clock() - since, 1e-9))
                self._next()

    def _next(self) -> None:
        self._left.pop(0)
        self._done, self._settled = 0, False
        if self._left:
            self.limit = self._left[0]
        else:
            gains = min(self._rates[self.most]) > GAIN * max(self._rates[self.few])
            self.limit = self.most if gains else self.few
        self._changed.notify_all()

    def end(self) -> None:
        """Nobody waits any longer: there is no more to do, or somebody has failed."""
        with self._changed:
            self._left = []
            self._changed.notify_all()

    def says(self) -> str:
        """What was tried and chosen; empty where the trial did not come to its end."""
        few, most = self._rates[self.few], self._rates[self.most]
        if self.most == self.few or len(most) < 2:
            return ""
        tried = ", ".join(
            f"{number} converted {sum(rates) / len(rates) / 1e9:.2f} GB/s"
            for number, rates in ((self.few, few), (self.most, most))
        )
        return f"{self.limit} threads, as measured on the first gigabyte: {tried}"
