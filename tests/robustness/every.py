"""All points of the cases, by several processes, evenly: whenever it ends, each kind of call was tried of each case."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tests.robustness import batch, moving, points
from tests.robustness.cases import Case, Ground
from tests.robustness.faults import ACTIONS, Fault
from tests.robustness.progress import Progress
from tests.robustness.warm import Warm

ROUNDS = 24


@dataclass(frozen=True)
class Choice:
    """Which points: of cases whose names begin with `case`, `kind` of call, what happens to it ("" for any)."""

    case: str
    exactly: bool
    kind: str
    action: str
    seed: int
    sample: int
    minutes: float
    only_count: bool
    lacks: str

    @classmethod
    def of(cls, options: argparse.Namespace) -> Choice:
        o = options
        return cls(o.case, o.exactly, o.kind, o.action or "", o.seed, o.sample, o.minutes, o.list, o.without)

    def points(self, case: Case, counts: Mapping[str, int]) -> list[Fault]:
        """In an order that is random and always the same, also where one process counts a call more than another."""
        found = [fault for fault in points.faults(counts) if self.has(fault)]
        return sorted(found, key=lambda fault: self.place(case, fault))[: self.sample or None]

    def place(self, case: Case, fault: Fault) -> int:
        return zlib.crc32(f"{self.seed} {case.name} {fault}".encode())

    def has(self, fault: Fault) -> bool:
        return self.kind in ("", fault.kind) and self.action in ("", ACTIONS[fault.action])


def _work(root: Path, choice: Choice, progress: Progress, turn: int, jobs: int) -> None:
    """The share of process `turn` of `jobs`."""
    warm = Warm(root)
    warm.faults.begin()
    ground = Ground(root, warm, choice.case, choice.exactly)
    plan: list[tuple[Case, list[Fault]]] = []
    for case in (replace(case, lacks=choice.lacks) for case in ground.cases):
        old = ground.reset(case)
        ended = ground.warm.run(case.line(ground.place), change=case.change)
        if turn == 0 and case.move is not None and (problem := moving.undisturbed(ground, case, ended, old)):
            _found(progress, problem)
        faults = choice.points(case, ended.counts)
        if turn == 0 and case.name not in progress.totals:
            progress.note("total", case.name, len(faults))
        plan.append((case, [fault for fault in faults if (case.name, str(fault)) not in progress.done]))
    known: set[str] = set()
    end = time.monotonic() + choice.minutes * 60 if choice.minutes else float("inf")
    for which in range(0 if choice.only_count else ROUNDS):
        for number, (case, faults) in enumerate(plan):
            due = (number + which) % jobs == turn
            mine = [fault for fault in faults if due and choice.place(case, fault) % ROUNDS == which]
            for fault, result in batch.tried(ground, case, mine, known):
                if result.problem:
                    _found(progress, result.problem)
                progress.note("point", case.name, str(fault), result.how, int(result.rerun))
                if time.monotonic() > end:
                    return


def _found(progress: Progress, problem: str) -> None:
    progress.note("finding", problem)
    sys.stderr.write(f"{problem}\n")


def run(root: Path, choice: Choice, progress: Progress, jobs: int) -> int:
    """Forks the processes and waits for them; how many did not come to their end."""
    processors = sorted(os.sched_getaffinity(0))
    children = []
    for turn in range(jobs):
        child = os.fork()
        if not child:
            try:
                batch.ends_with_its_parent()
                os.sched_setaffinity(0, {processors[turn % len(processors)]})  # its threads need not meet elsewhere
                _work(root / str(turn) / "ground", choice, progress, turn, jobs)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(child)
    try:
        return sum(os.waitpid(child, 0)[1] != 0 for child in children)
    except BaseException:  # before their folders are removed
        for child in children:
            os.kill(child, signal.SIGKILL)
        raise
