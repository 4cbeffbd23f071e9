"""Runs during which somebody else moves the source or takes the place (moves.py): their cases, and their points.

A run behind whose back the source has moved never ends well: exit 1 (a proof: 2), one sentence that names what has
moved (or what the fault has hit), and at OUT what was there before. Then the same command runs on the source as it
stands, where that is a whole model, and must give that model's bytes; and, once more behind the same fault, on the
first source again, in new files, and must give the first model's. Of neither may anything come into the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.robustness import moves, points, states
from tests.robustness.access import Access, taken_over
from tests.robustness.cases import TINY, Case, Ground
from tests.robustness.faults import FAIL, Fault
from tests.robustness.sources import tm, tree
from tests.robustness.warm import Ended


@dataclass(frozen=True)
class Plan:
    """A case: what its command reads, which files of that move, how and when."""

    of: str  # the command's name
    what: str
    way: str
    moment: str
    files: str  # a pattern; of what is taken, its name
    older: bool = False
    often: bool = False

    @property
    def name(self) -> str:
        older = " --overwrite" if self.older else ""
        large = "as large runs, " if self.often else ""
        return f"moving, {large}{self.of}{older}: {self.what} {self.way}"


_HF, _RANKS = "*-00001-of-*.safetensors", "release/*/*.pt"
PLANS = (
    Plan("import TP2 PP2", "a weight file", "rewritten in place", "half", _HF),
    Plan("import TP2 PP2", "a weight file", "rewritten in place", "written", _HF, often=True),
    Plan("import TP2 PP2", "a weight file", "replaced", "written", _HF, older=True),
    Plan("import TP2 PP2", "a weight file", "removed", "half", _HF),
    Plan("import TP2 PP2", "config.json", "replaced", "half", "config.json", older=True),
    Plan("import TP2 PP2", "tokenizer.model", "replaced", "written", "tokenizer.model"),
    Plan("export", "the ranks", "rewritten in place", "half", _RANKS, often=True),
    Plan("export", "the ranks", "replaced", "written", _RANKS, older=True),
    Plan("export", "a rank", "truncated", "half", "release/mp_rank_01_001/*.pt"),
    Plan("export torch_dist", "the weight files", "rewritten in place", "half", "release/*.distcp"),
    Plan("import and verify", "a weight file", "replaced", "half", _HF),
    Plan("import and verify", "a weight file", "rewritten in place", "compared", _HF),
    Plan("verify", "a weight file", "rewritten in place", "compared", _HF),
    Plan("import TP2 PP2", "OUT", "taken", "written", "out"),
    Plan("import TP2 PP2", "OUT", "taken", "written", "out", older=True),
    Plan("import TP2 PP2", "OUT.partial", "taken", "half", "out.partial"),
)  # fmt: skip
_READS = {"export": "mt", "export torch_dist": "dist"}


def cases(ground: Ground, plain: dict[str, Case]) -> Iterator[Case]:
    """Those that are wanted; `plain` are the commands, by name, whose sources do not move."""
    wanted = [plan for plan in PLANS if ground.wants(plan.name)]
    if not wanted:
        return
    sources = _sources(ground)
    for plan in wanted:
        reads = _READS.get(plan.of, "hf")
        source = sources[reads]
        if plan.way == "taken":
            move: moves.Move = moves.Taken(source, ground.place, plan.files, ground.root / "aside", plan.moment)
        else:
            names = [path.relative_to(source.folder).as_posix() for path in sorted(source.folder.glob(plan.files))]
            move = moves.Files(source, names, plan.way, plan.moment)
        before, after = str(ground.sources / reads), str(source.folder)
        arguments = tuple(after if argument == before else argument for argument in plain[plan.of].arguments)
        yield replace(
            plain[plan.of],
            name=plan.name,
            arguments=arguments,
            older=plan.older,
            often=plan.often,
            move=move,
            of=plan.of,
        )


def _sources(ground: Ground) -> dict[str, moves.Source]:
    """Copies of the sources, which may become those of another model of the same sizes."""
    others = ground.root / "others"
    hf = tm.write_huggingface(others / "hf", replace(TINY, name="another"), parts=2)
    ground.make_megatron(hf, others)
    config = replace(TINY, name="another", eps=1e-6).config()
    tm.write_json(hf / "config.json", config)
    (hf / "tokenizer.model").write_bytes(tm.sentencepiece_model(312))
    return {
        name: moves.Source(ground.root / "moving" / name, ground.sources / name, others / name)
        for name in ("hf", "mt", "dist")
    }


def learn(ground: Ground, case: Case) -> dict[str, str] | None:
    """What the command makes of what has moved; None where that is no model."""
    ground.reset(case)
    if not _move(case).is_valid:
        return None
    _move(case).act()
    ended = ground.warm.learn(case.line(ground.place))
    found = tree(ground.place / "out") if case.out else {}
    if (ended.code if case.out else 1 - (ended.code or 0)) or (case.out and found == ground.expected[case.name]):
        raise RuntimeError(f"{case.name}: exit {ended.code} with what has moved\n{ended.text}")
    return found


def wrong(ground: Ground, case: Case, fault: Fault, known: set[str] | None = None) -> points.Result:
    """As points.wrong."""
    old = ground.reset(case)
    ended = ground.warm.run(case.line(ground.place), fault, change=case.change)
    if not ended.hit:
        return points.Result("not reached")
    moved = _settled(_move(case), ended)
    problem, state, rerun = after(ground, case, fault, ended, old, moved), "", False
    if problem is None and case.out:
        state = f"{case.name} {states.digest(ground.place, of_any_run=True)} {moved}"
        rerun = known is None or state not in known
        problem = _again(ground, case, fault, moved, old) if rerun else None
    if problem is None:
        if known is not None and state:
            known.add(state)
        return points.Result(points.how(ended), None, state, rerun)
    now = "it has moved" if moved else "it has not moved yet"
    said = f"{case.name}: {fault} ({ended.hit}; {now}): {problem}\n    it said: {ended.text.strip()[-600:]}"
    return points.Result(points.how(ended), said, rerun=rerun)


def undisturbed(ground: Ground, case: Case, ended: Ended, old: dict[str, str] | None) -> str | None:
    """What is wrong after the run without a fault."""
    problem = after(ground, case, None, ended, old, _settled(_move(case), ended))
    return f"{case.name}: without a fault: {problem}\n    it said: {ended.text.strip()[-600:]}" if problem else None


def _move(case: Case) -> moves.Move:
    if case.move is None:
        raise ValueError(f"nothing moves in {case.name}")
    return case.move


def _settled(move: moves.Move, ended: Ended) -> bool:
    """Whether it has moved; what a kill, by another thread, has cut off is done here."""
    move.armed = False
    moved = move.has_happened()
    if moved and ended.code == -9:
        move.act()
    return moved


def after(
    ground: Ground, case: Case, fault: Fault | None, ended: Ended, old: dict[str, str] | None, moved: bool
) -> str | None:  # fmt: skip
    """What is wrong after a run that something moves in, unless it ends before."""
    if ended.code not in (case.trouble, -9):
        return f"exit {ended.code}"
    if not moved and fault is None:
        return "nothing has moved"
    if "Traceback" in ended.text:
        return "a traceback"
    if damage := _move(case).damage() or ground.damage(_move(case).left()):
        return damage
    if ended.code == case.trouble and (problem := _unsaid(ground, case, fault, ended, moved)):
        return problem
    return _of_output(ground, case, old)


def _of_output(ground: Ground, case: Case, old: dict[str, str] | None) -> str | None:
    """OUT is what it was; where another's has come there, its move has looked at that."""
    out = ground.place / "out"
    if case.out is None or (out.name in _move(case).left() and _move(case).has_happened()):
        return None
    there = tree(out) if out.exists() else None
    if there != old:
        return f"OUT is not what it was: {sorted(there or ())}"
    return taken_over(ground.access, Access.of(out), "", False) if ground.access else None


def _unsaid(ground: Ground, case: Case, fault: Fault | None, ended: Ended, moved: bool) -> str | None:
    lines = [line for line in ended.text.splitlines() if line.startswith("error:")]
    if len(lines) != 1:
        return f"{len(lines)} sentences"
    if moved and any(name in lines[0] for name in _move(case).names()):
        return None
    if fault is None or fault.action != FAIL:
        return "the sentence does not name what has moved"
    return points.unsaid(ended, ground.root, fault)


def _again(ground: Ground, case: Case, fault: Fault, moved: bool, old: dict[str, str] | None) -> str | None:
    """What is wrong after the same command on what has moved, and on what it was."""
    move, expected = _move(case), ground.expected[case.name]
    if isinstance(move, moves.Taken):
        problem = _refused(ground, case, old) if moved else None
        if moved and not problem:
            move.taken_back()
        return problem or points.again(ground, case)
    move.act()
    new = ground.moved[case.name]
    problem = _refused(ground, case, old) if new is None else points.again(ground, case, expected=new)
    if problem or (problem := move.damage()):
        return f"on what has moved: {problem}"
    ground.reset(case)
    ended = ground.warm.run(case.line(ground.place), fault, change=case.change)
    if _settled(move, ended):
        move.prepare()
        move.armed = False
    problem = points.again(ground, case, expected=expected) or move.damage()
    return f"on what it was: {problem}" if problem else None


def _refused(ground: Ground, case: Case, old: dict[str, str] | None) -> str | None:
    """What is wrong after the same command where it cannot end well."""
    ended = ground.warm.run(case.line(ground.place), change=case.change)
    lines = [line for line in ended.text.splitlines() if line.startswith("error:")]
    if ended.code != 1 or len(lines) != 1 or "Traceback" in ended.text:
        return f"exit {ended.code}, {len(lines)} sentences: {ended.text.strip()[-400:]}"
    if not any(Path(name).name in lines[0] for name in _move(case).names()):
        return f"the refusal does not name what has moved: {lines[0]}"
    return _move(case).damage() or ground.damage(_move(case).left()) or _of_output(ground, case, old)
