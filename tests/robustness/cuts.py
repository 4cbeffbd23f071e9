"""Power cuts: whatever a disk may show after one, OUT is whole or what it was, and the same command ends right."""

from __future__ import annotations

import random
from collections import Counter

from tests.robustness.cases import Case, Ground
from tests.robustness.points import again
from tests.robustness.powercut import State, recorded
from tests.robustness.sources import tree


def wrong(ground: Ground, case: Case, reruns: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Looks at every state that a cut may leave, and runs the command again on `reruns` of them."""
    old = ground.reset(case)
    record = recorded(
        ground.place, lambda notes: ground.warm.run(case.line(ground.place), record=notes, change=case.change)
    )
    if record.last().tree("out") != tree(ground.place / "out"):
        raise RuntimeError(f"{case.name}: the record does not say what the run has done")
    counts: Counter[str] = Counter()
    findings: list[str] = []
    different: dict[str, tuple[str, State]] = {}
    for where, state in record.states(seed):
        counts["states"] += 1
        if problem := _of_output(ground, case, state, old):
            findings.append(f"{case.name}, power cut after {where}: {problem}")
        if (key := state.key()) not in different:
            different[key] = (where, state)
    counts["of them different"] = len(different)
    chosen = random.Random(seed).sample(sorted(different), min(reruns, len(different)))
    for key in chosen:
        where, state = different[key]
        counts["reruns"] += 1
        state.write(ground.place)
        if problem := again(ground, case):
            findings.append(f"{case.name}, power cut after {where}: {problem}")
    return counts, findings


def _of_output(ground: Ground, case: Case, state: State, old: dict[str, str] | None) -> str | None:
    there = state.tree("out")
    if there == ground.expected[case.name] or there == old:
        return None
    if there is None:
        kept = not case.exchange and state.tree("out.partial/replaced") == old
        return None if kept else "what stood at OUT is gone"
    return f"OUT is neither whole nor what it was: {sorted(there)}"
