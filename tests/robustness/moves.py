"""What somebody else does while a run goes on: moves the source that it reads, or takes the place that it writes into.

It happens inside the run, once, at a moment that is always the same; none of its calls counts or fails as the run's.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.robustness.faults import Faults
from tests.robustness.sources import clear, tree

MOMENTS = ("half", "written", "compared")
WAYS = ("rewritten in place", "replaced", "removed", "truncated")
STRANGER = 2001  # a user, where root runs the tests
Stamp = tuple[int, int, int, int]


class Move(Protocol):
    """Something that happens at `moment` of the next run, if `armed`."""

    moment: str
    armed: bool

    @property
    def is_valid(self) -> bool:
        """Whether the same command ends well afterwards, and with another output."""
        ...

    def prepare(self) -> None:
        """All is as it was before it happened, but for the times and inodes of what it has changed."""
        ...

    def act(self) -> None: ...

    def has_happened(self) -> bool: ...

    def damage(self) -> str | None:
        """What a run has done to the moved thing, or to what stands beside it."""
        ...

    def names(self) -> Sequence[str]:
        """The paths of which a sentence about it may name one."""
        ...

    def left(self) -> set[str]:
        """Names in the place of runs, which it may have put there."""
        ...


class Source:
    """A source that is nobody's but these cases', and its files as they are and as they may become."""

    def __init__(self, folder: Path, original: Path, other: Path) -> None:
        self.folder = folder
        self.original, self.other = _contents(original), _contents(other)
        self.stamps: dict[str, Stamp] = {}
        self.restore()

    def restore(self) -> None:
        """What has changed gets its old bytes, in a new file."""
        for name, data in self.original.items():
            path = self.folder / name
            if name not in self.stamps or _stamp(path) != self.stamps[name]:
                self.put(path, data)
                self.stamps[name] = _stamp(path) or (0, 0, 0, 0)

    def put(self, path: Path, data: bytes) -> None:
        """A new file in the place of one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = self.folder.with_name(f"{self.folder.name}.new")  # not in it: a kill may come in between
        new.write_bytes(data)
        new.replace(path)

    def is_original(self, name: str) -> bool:
        return _stamp(self.folder / name) == self.stamps[name]


@dataclass
class Files:
    """Files of a source move, one of `WAYS`, into those of the other model, or into `data`."""

    source: Source
    wanted: Sequence[str]
    way: str
    moment: str
    data: bytes | None = None
    armed: bool = False

    @property
    def is_valid(self) -> bool:
        return self.way in WAYS[:2]

    def prepare(self) -> None:
        self.source.restore()
        self.armed = True

    def act(self) -> None:
        for name in self.wanted:
            path, new = self.source.folder / name, self.data or self.source.other[name]
            if self.way == "rewritten in place":
                with path.open("r+b") as file:
                    file.write(new)
                    file.truncate()
            elif self.way == "replaced":
                self.source.put(path, new)
            elif self.way == "removed":
                path.unlink(missing_ok=True)
            else:
                os.truncate(path, len(self.source.original[name]) // 8)

    def has_happened(self) -> bool:
        return any(not self.source.is_original(name) for name in self.wanted)

    def damage(self) -> str | None:
        there = {path.relative_to(self.source.folder).as_posix() for path in self.source.folder.rglob("*")}
        if strange := {name for name in there if (self.source.folder / name).is_file()} - set(self.source.original):
            return f"{', '.join(strange)} was left in the moved source"
        moved = self.has_happened()
        for name, before in self.source.original.items():
            path = self.source.folder / name
            if not (moved and name in self.wanted):
                if not self.source.is_original(name):
                    return f"{path} was touched"
            elif self.way == "removed":
                if path.exists():
                    return f"{path} is there again"
            else:
                new = self.data or self.source.other[name]
                if path.read_bytes() != (before[: len(before) // 8] if self.way == "truncated" else new):
                    return f"{path}, as it was moved, was touched"
        return None

    def names(self) -> Sequence[str]:
        return [str(self.source.folder / name) for name in self.wanted]

    def left(self) -> set[str]:
        return set()


@dataclass
class Taken:
    """What stands at a name beside the neighbours is taken away, if anything does, and another's folder comes there."""

    source: Source  # which does not move
    place: Path
    name: str  # "out" or "out.partial"
    aside: Path
    moment: str
    armed: bool = False
    is_valid: bool = field(default=False, init=False)

    def prepare(self) -> None:
        self.source.restore()
        clear(self.aside)
        theirs = self.aside / "theirs"
        (theirs / "inner").mkdir(parents=True)
        (theirs / "thesis.txt").write_text("years")
        (theirs / "inner" / "model.safetensors").write_text("of another")
        if os.geteuid() == 0:
            for path in (theirs, *theirs.rglob("*")):
                os.chown(path, STRANGER, STRANGER)
        self.before = tree(theirs)
        self.armed = True

    def act(self) -> None:
        if not (self.aside / "theirs").exists():
            return
        if (self.place / self.name).exists():
            (self.place / self.name).rename(self.aside / "away")
        (self.aside / "theirs").rename(self.place / self.name)

    def has_happened(self) -> bool:
        return not (self.aside / "theirs").exists()

    def damage(self) -> str | None:
        folder = self.place / self.name if self.has_happened() else self.aside / "theirs"
        return None if tree(folder) == self.before else f"{folder}, which is another's, was touched"

    def taken_back(self) -> None:
        """Its owner takes it away again."""
        shutil.rmtree(self.place / self.name)

    def names(self) -> Sequence[str]:
        return [str(self.place / self.name)]

    def left(self) -> set[str]:
        return {self.name}


def hook(move: Move) -> None:
    """In a process of runs: puts the move into what they call."""
    faults = Faults()

    def happens() -> None:
        if move.armed:
            move.armed = False
            with faults.apart():
                move.act()

    if move.moment == "compared":
        from weights_conversion.verification import together

        _after(together, "compare", happens)
        return
    from weights_conversion.engine import run

    if move.moment == "written":
        _after(run, "execute", happens)
        return
    execute = run.execute

    def halfway(plan: Any, chunks: Sequence[Any], source: Any, target: Any, workers: int, done: Any, *rest: Any) -> str:
        """Behind half of the chunks."""
        finished = itertools.count(1)

        def counted(*what: Any) -> None:
            done(*what)
            if next(finished) == len(chunks) // 2:
                happens()

        return execute(plan, chunks, source, target, workers, counted, *rest)

    run.execute = halfway


def _after(module: Any, name: str, happens: Callable[[], None]) -> None:
    function = getattr(module, name)

    def then(*arguments: Any, **named: Any) -> Any:
        found = function(*arguments, **named)
        happens()
        return found

    setattr(module, name, then)


def _contents(folder: Path) -> Mapping[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
