"""SIGINT and SIGTERM: they end a run from wherever it is, with a sentence and an exit code of their own."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from weights_conversion.launch import saying

STOPPED = {
    130: "interrupted: the same command continues where this one stopped",
    143: "terminated: the same command continues where this one stopped",
}


class Terminated(BaseException):
    """SIGTERM, as a scheduler sends it before it kills."""


STUCK_SECONDS = 12.0  # after a signal, in which a read or write may still come back


_left: Callable[[], str] = str  # what an interrupted run leaves, as the end of its sentence
_begun = False  # whether `Signals` has been entered in this process


def begin() -> None:
    """Before the work begins (torch takes a moment to be imported), a signal ends the process at once.

    Within `Signals` that says when, and after it none does: what has been converted stands, and the exit code says so.
    """
    global _begun
    _begun = False
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _outside)


def leaves(what: Callable[[], str]) -> None:
    """From now on a signal's sentence ends with `what`, which may not touch the disk: it may be what hangs."""
    global _left
    _left = what


def stopped(code: int) -> int:
    """Says that a signal has ended the run, whose exit code is `code`, and what it leaves."""
    saying.say(STOPPED[code] + _left())
    return code


def _outside(signum: int, frame: FrameType | None) -> None:
    if not _begun:
        code = 130 if signum == signal.SIGINT else 143
        stopped(code)
        saying.flush()
        os._exit(code)


class Signals:
    """Within its block, SIGINT and SIGTERM (where they are not ignored) end the run from wherever it is, once.

    What they raise is dropped by Python where it hits a destructor or a callback; then it is raised again. A thread in
    a read or write that never ends, as of a filesystem whose server is gone, would keep the process for ever: after
    STUCK_SECONDS `stuck` is called with the exit code.
    """

    def __init__(self, stuck: Callable[[int], None]) -> None:
        self._asked = self._noticed = 0  # the signal, as the main thread and as the watching one have seen it
        self._left = threading.Event()
        self._stuck = stuck
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        global _begun
        leaves(str)
        if threading.current_thread() is not threading.main_thread():
            return
        _begun = True
        self._hook, sys.unraisablehook = sys.unraisablehook, self._dropped
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            if number == signal.SIGALRM or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._stop)
        self._news, end = os.pipe()
        os.set_blocking(end, False)
        self._wakeup = signal.set_wakeup_fd(end, warn_on_full_buffer=False), end
        threading.Thread(target=self._watch, daemon=True, name="signals").start()

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._before:
            before, end = self._wakeup
            signal.set_wakeup_fd(before, warn_on_full_buffer=False)
            os.close(end)  # which the watching thread reads as the end
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.unraisablehook = self._hook
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        if (signum == signal.SIGALRM) == bool(self._asked):
            self._asked = self._asked or signum
            raise KeyboardInterrupt if self._asked == signal.SIGINT else Terminated

    def _watch(self) -> None:
        # The C library's handler writes here even while the main thread is in a call that does not come back, and
        # Python's own handler has to wait for it.
        with os.fdopen(self._news, "rb", buffering=0) as news:  # to the end, for Python complains of a closed one
            deadline = float("inf")
            while time.monotonic() < deadline and not self._left.is_set():
                if select.select([news], [], [], 0.5)[0]:
                    seen = [number for number in news.read(64) if number in (signal.SIGINT, signal.SIGTERM)]
                    if seen and not self._noticed:
                        self._noticed, deadline = seen[0], time.monotonic() + STUCK_SECONDS
            if not self._left.is_set():
                self._stuck(130 if self._noticed == signal.SIGINT else 143)
            self._left.wait()

    def _dropped(self, unraisable: Any) -> None:
        if self._asked and isinstance(unraisable.exc_value, (KeyboardInterrupt, Terminated)):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        else:
            self._hook(unraisable)
