"""Many points one after the other in one forked process, which is several times as fast as a process for each.

What is found wrong there is tried again in a process of its own, and only that counts. A process in which a run has
left a thread, or a descriptor, tries no further point; a point after which a thread goes on is tried by itself.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import json
import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tests.robustness import points
from tests.robustness.cases import Case, Ground
from tests.robustness.faults import KILL, TEAR, Fault, Faults
from tests.robustness.points import Result
from tests.robustness.warm import PATIENCE, Ended

_SETTLE = 0.5  # seconds in which a run's threads have ended
_ALONE = 1  # exit code: the next point is not for a process that goes on


class Here:
    """As warm.Warm, in this very process."""

    def __init__(self, ground: Ground, case: Case) -> None:
        from weights_conversion.launch import saying, signals
        from weights_conversion.tokenizer import apart

        self._root, self.faults = ground.root, Faults()
        self._log = os.memfd_create("log")
        os.dup2(self._log, 1)
        os.dup2(self._log, 2)
        case.change()
        # The process that asks a tokenizer's library touches no file of the test's, and takes as long as all the rest.
        apart._started = functools.cache(apart._started)
        saying.open_standard_streams()
        signals.begin()
        gc.freeze()  # what is there by now is looked at no more
        self._open = _descriptors()

    def run(
        self, line: list[str], fault: Fault | None = None, *, change: Callable[[], None] | None = None
    ) -> Ended:  # fmt: skip
        """`change` has been called."""
        from weights_conversion.launch import saying

        os.ftruncate(self._log, 0)
        os.lseek(self._log, 0, os.SEEK_SET)
        main = importlib.import_module(line[0]).main
        self.faults.clear()
        self.faults.arm(self._root, fault)
        try:
            code = main(line[1:])
            saying.flush()
        except BaseException:
            code = 70
            os.write(2, traceback.format_exc().encode())
        finally:
            self.faults.disarm()
        if not _settled():
            os._exit(_ALONE)
        size = os.fstat(self._log).st_size
        text = os.pread(self._log, size, 0).decode(errors="replace")
        return Ended(code, text, self.faults.counts(), self.faults.hit())

    def is_clean(self) -> bool:
        """Whether nothing of a run is open any more."""
        if _descriptors() > self._open:
            gc.collect()  # what an exception's frames have held
        return _descriptors() <= self._open


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _settled() -> bool:
    end = time.monotonic() + _SETTLE
    while threading.active_count() > 1:
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def ends_with_its_parent() -> None:
    """This process is killed when the one that has forked it is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def tried(ground: Ground, case: Case, faults: Sequence[Fault], known: set[str]) -> Iterator[tuple[Fault, Result]]:
    """Each fault and how it ended. `known`: the states whose reruns ended right; grows."""
    together = [fault for fault in faults if fault.action not in (KILL, TEAR)]
    for fault in faults:
        if fault.action in (KILL, TEAR):
            yield fault, points.wrong(ground, case, fault, known)
    while together:
        child, pipe = _fork(ground, case, together, known)
        for found in _lines(pipe):
            result = Result(**found)
            if result.problem:
                break
            if result.state:
                known.add(result.state)
            yield together.pop(0), result
        else:
            if os.waitpid(child, 0)[1] == 0:
                continue
            child = 0
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        fault = together.pop(0)
        yield fault, points.wrong(ground, case, fault, known)


def _lines(pipe: int) -> Iterator[Mapping[str, Any]]:
    """What the child says; one empty mapping's worth of a problem where it hangs."""
    left = b""
    with os.fdopen(pipe, "rb", buffering=0) as opened:
        while True:
            if not select.select([opened], [], [], 2 * PATIENCE)[0]:
                yield asdict(Result("hung", "it hangs"))
                return
            data = opened.read(1 << 16)
            if not data:
                return
            *lines, left = (left + data).split(b"\n")
            for line in lines:
                yield json.loads(line)


def _fork(ground: Ground, case: Case, faults: Sequence[Fault], known: set[str]) -> tuple[int, int]:
    """(the process, the descriptor of what it says)."""
    mine, its = os.pipe()
    child = os.fork()
    if child:
        os.close(its)
        return child, mine
    try:
        ends_with_its_parent()
        os.close(mine)
        here = Here(ground, case)
        ground.warm = here  # pyright: ignore[reportAttributeAccessIssue]
        for fault in faults:
            result = points.wrong(ground, case, fault, known)
            os.write(its, json.dumps(asdict(result)).encode() + b"\n")
            if not here.is_clean():
                break
        os._exit(0)
    finally:
        os._exit(_ALONE)
