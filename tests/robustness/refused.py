"""Cases that are refused whatever fails: the source is OUT itself, or stands in it, and would be replaced.

Each ends with exit 1 in one sentence, and the source is as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from tests.robustness import copies, points, states
from tests.robustness.access import Access
from tests.robustness.cases import Case, Ground
from tests.robustness.faults import FAIL, Fault
from tests.robustness.sources import tree
from tests.robustness.warm import Ended

ITSELF, INSIDE = (
    "refused, layout to layout: the source is OUT",
    "refused, layout to layout: the source is a link into OUT",
)
_OF = "layout to layout"


def cases(ground: Ground, plain: Mapping[str, Case]) -> Iterator[Case]:
    """Those that are wanted, with what stands at OUT."""
    if not any(map(ground.wants, (ITSELF, INSIDE))):
        return
    kept, linked, megatron = ground.root / "starts" / "source", ground.sources / "linked", ground.sources / "mt"
    kept.mkdir(parents=True)
    copies.copy(megatron, kept / "out")
    linked.mkdir()
    for path in megatron.iterdir():  # all but the weights stands elsewhere
        if path.is_file():
            (linked / path.name).write_bytes(path.read_bytes())
    (linked / "release").symlink_to(ground.place / "out" / "release")
    for name, source in ((ITSELF, ground.place / "out"), (INSIDE, linked)):
        if ground.wants(name):
            arguments = tuple(str(source) if word == str(megatron) else word for word in plain[_OF].arguments)
            yield replace(plain[_OF], name=name, of=_OF, arguments=arguments, older=True, start=kept, refused=True)


def wrong(ground: Ground, case: Case, fault: Fault, known: set[str] | None = None) -> points.Result:
    """As points.wrong."""
    old = ground.reset(case)
    ended = ground.warm.run(case.line(ground.place), fault, change=case.change)
    if not ended.hit:
        return points.Result("not reached")
    problem, state, rerun = _after(ground, case, fault, ended, old), "", False
    if problem is None:
        state = f"{case.name} {states.digest(ground.place)}"
        rerun = known is None or state not in known
        problem = again(ground, case, old) if rerun else None
    if problem is None:
        if known is not None:
            known.add(state)
        return points.Result(points.how(ended), None, state, rerun)
    said = f"{case.name}: {fault} ({ended.hit}): {problem}\n    it said: {ended.text.strip()[-600:]}"
    return points.Result(points.how(ended), said, rerun=rerun)


def again(ground: Ground, case: Case, old: dict[str, str] | None) -> str | None:
    """What is wrong where nothing fails but the command."""
    ended = ground.warm.run(case.line(ground.place), change=case.change)
    problem = _after(ground, case, None, ended, old)
    if problem is None and (ground.place / "out.partial").exists():
        problem = "OUT.partial was left"
    return f"without a fault: {problem}: {ended.text.strip()[-400:]}" if problem else None


def _after(
    ground: Ground, case: Case, fault: Fault | None, ended: Ended, old: dict[str, str] | None
) -> str | None:  # fmt: skip
    out = ground.place / "out"
    if not out.exists() or tree(out) != old or Access.of(out) != ground.access:
        return "the source was touched"
    if ended.code not in (1, -9):
        return f"exit {ended.code}"
    if "Traceback" in ended.text:
        return "a traceback"
    if ended.code == 1 and (problem := _unsaid(ground.root, out, fault, ended)):
        return problem
    return ground.damage()


def _unsaid(root: Path, out: Path, fault: Fault | None, ended: Ended) -> str | None:
    lines = [line for line in ended.text.splitlines() if line.startswith("error:")]
    if len(lines) != 1:
        return f"{len(lines)} sentences"
    if f"{out} holds the source" in ended.text:
        return None
    if fault is None or fault.action != FAIL:
        return "the sentence does not say that OUT holds the source"
    return points.unsaid(ended, root, fault)
