"""Runs of the scripts in forks of an interpreter that has imported all they need: a twentieth of a second each."""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.robustness.faults import Fault, Faults

PATIENCE = 60.0  # seconds, after which a run counts as hanging


@dataclass(frozen=True)
class Ended:
    """How a run has ended. `code` is negative for a signal; None: it did not end."""

    code: int | None
    text: str
    counts: Mapping[str, int]
    hit: str


@dataclass
class Started:
    """A run that goes on. `log` is an open file in memory."""

    process: int
    log: int
    slot: int


class Warm:
    """Forks runs of scripts (`line`: the module's name and its arguments) that touch files below `root`."""

    def __init__(self, root: Path) -> None:
        self.root, self.faults = root, Faults()
        self._modules = root.with_name(root.name + ".modules")

    def learn(self, line: list[str]) -> Ended:
        """Runs it once, and imports here whatever it has imported."""
        ended = self.finish(self._start(line, None, 0, -1, None, {}, list_modules=True))
        for name in self._modules.read_text().split() if self._modules.exists() else []:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        return ended

    def run(
        self, line: list[str], fault: Fault | None = None, *, record: int = -1, change: Callable[[], None] | None = None
    ) -> Ended:
        return self.finish(self.start(line, fault, record=record, change=change))

    def start(
        self, line: list[str], fault: Fault | None = None, *, slot: int = 0, record: int = -1,
        change: Callable[[], None] | None = None, environment: Mapping[str, str] | None = None,
    ) -> Started:  # fmt: skip
        """`change` is called in the fork before the run."""
        return self._start(line, fault, slot, record, change, environment or {})

    def _start(
        self, line: list[str], fault: Fault | None, slot: int, record: int, change: Callable[[], None] | None,
        environment: Mapping[str, str], list_modules: bool = False,
    ) -> Started:  # fmt: skip
        self.faults.clear(slot)
        log = os.memfd_create("log")
        child = os.fork()
        if child:
            return Started(child, log, slot)
        try:
            os.environ.update(environment)
            os.dup2(log, 1)
            os.dup2(log, 2)
            from weights_conversion import cli

            main = importlib.import_module(line[0]).main
            if change is not None:
                change()

            def whole() -> int:
                code = main(line[1:])
                if list_modules:
                    self._modules.write_text("\n".join(sys.modules))
                return code

            self.faults.arm(self.root, fault, slot, record)
            cli.script(whole)
        except BaseException:
            import traceback

            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(70)

    def finish(self, run: Started, patience: float = PATIENCE) -> Ended:
        handle = os.pidfd_open(run.process)
        hangs = not select.select([handle], [], [], patience)[0]
        os.close(handle)
        if hangs:
            os.kill(run.process, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(run.process, 0)[1])
        size = os.fstat(run.log).st_size
        text = os.pread(run.log, size, 0).decode(errors="replace")
        os.close(run.log)
        return Ended(None if hangs else code, text, self.faults.counts(run.slot), self.faults.hit(run.slot))
