"""Cases that go on from what a killed run has left, or that find their work done: "continue, ...".

Each state is made once, by a run that is killed at a call at which the disk looks as wanted, and put back before each
point.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tests.robustness import copies
from tests.robustness.cases import Case, Ground
from tests.robustness.faults import KILL, Fault
from tests.robustness.sources import tree
from weights_conversion.output import finished

EXCHANGED, RENAMED, BETWEEN, BEHIND, HALF, FINISHED = (
    "killed after the exchange", "killed after the rename", "killed between the renames", "killed after the renames",
    "killed half written", "finished",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A command, and where it was killed. Not `noted`: OUT has no attribute that says which run wrote it."""

    of: str
    state: str
    noted: bool = True

    @property
    def name(self) -> str:
        older = " --overwrite" if self.older else ""
        return f"continue, {self.of}{older}: {self.state}{'' if self.noted else ', without attributes'}"

    @property
    def older(self) -> bool:
        return self.state in (EXCHANGED, BETWEEN, BEHIND)


PLANS = (
    Plan("import TP2 PP2", EXCHANGED),
    Plan("export", EXCHANGED),
    Plan("import TP2 PP2", RENAMED),
    Plan("export", RENAMED),
    Plan("export", RENAMED, noted=False),
    Plan("import TP2 PP2", BETWEEN),
    Plan("import TP2 PP2", BEHIND),
    Plan("import TP2 PP2", HALF),
    Plan("export", HALF),
    Plan("export", FINISHED),
)


def cases(ground: Ground, plain: Mapping[str, Case]) -> Iterator[Case]:
    """Those that are wanted, whose states it makes. `plain` are the commands, by name."""
    for plan in PLANS:
        if not ground.wants(plan.name):
            continue
        case = replace(
            plain[plan.of], name=plan.name, of=plan.of, older=plan.older, exchange=plan.state not in (BETWEEN, BEHIND)
        )
        kept = ground.root / "starts" / plan.name.replace(" ", "-")
        _make(ground, case, plan, kept)
        yield replace(case, start=kept, unnoted=not plan.noted)


def _make(ground: Ground, case: Case, plan: Plan, kept: Path) -> None:
    """Runs until the state is there, and keeps it."""
    making = replace(case, often=plan.state == HALF)  # the journal has notes only where the sync comes in between
    old = ground.reset(making)
    ended = ground.warm.run(making.line(ground.place), change=making.change)
    if ended.code:
        raise RuntimeError(f"{case.name}: exit {ended.code}\n{ended.text}")
    new = ground.expected[case.name] = tree(ground.place / "out")
    if new == old:
        raise RuntimeError(f"{case.name}: what it replaces is the same")
    if plan.state != FINISHED and not any(
        _is_there(plan.state, ground.place, old, new)
        for fault in _moments(ground, making, plan.state, ended.counts, new)
        if _killed(ground, making, fault)
    ):
        raise RuntimeError(f"{case.name}: no kill leaves that")
    if not plan.noted:
        os.removexattr(ground.place / "out", finished._NAME)
    copies.keep(ground.place, kept)


def _killed(ground: Ground, case: Case, fault: Fault) -> bool:
    ground.reset(case)
    return ground.warm.run(case.line(ground.place), fault, change=case.change).code == -9


def _moments(
    ground: Ground, case: Case, state: str, counts: Mapping[str, int], new: dict[str, str]
) -> Iterator[Fault]:  # fmt: skip
    """Where it may be: in the middle, or about the first call at which OUT is the new one, which is looked for."""
    if state == HALF:
        for number in range(counts["write"] // 2, counts["write"]):
            yield Fault("write", number, KILL)
        return
    low, high = 1, counts["changing"]
    while low < high:
        middle = (low + high) // 2
        _killed(ground, case, Fault("changing", middle, KILL))
        out = ground.place / "out"
        low, high = (low, middle) if out.exists() and tree(out) == new else (middle + 1, high)
    for number in (low - 1, low, low + 1, low - 2):
        yield Fault("changing", number, KILL)


def _is_there(state: str, place: Path, old: dict[str, str] | None, new: dict[str, str]) -> bool:
    out, partial = place / "out", place / "out.partial"
    there = tree(out) if out.exists() else None
    if state == EXCHANGED:
        return there == new and tree(partial / "checkpoint") == old
    if state in (BETWEEN, BEHIND):
        return there == (new if state == BEHIND else None) and tree(partial / "replaced") == old
    names = set(os.listdir(partial / "journal")) if (partial / "journal").exists() else set()
    if state == RENAMED:
        return there == new and {"digest", "publishing"} <= names
    notes = [path.read_bytes().split(b"\n") for path in partial.glob("journal/chunks.*")]
    return there is None and "digest" in names and sum(bool(line) for lines in notes for line in lines) > 1
