"""What is run at every point: each conversion, over nothing and over an earlier output, and both proofs."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

from tests.robustness import copies, moves
from tests.robustness.access import Access, dress
from tests.robustness.sources import GQA, clear, tm, tree
from tests.robustness.warm import Warm

TINY = replace(GQA, name="two-layers", layers=2)
FOUR = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
CORE = ("--target", "megatron-core")
NEIGHBOURS = {"notes.txt": "mine", "out.partial.txt": "mine too", "out.d/a.txt": "a foreign folder"}


@dataclass(frozen=True)
class Case:
    """A command. `out` is the flag of its output, None for a proof; `older`: it is told to overwrite, and another
    model's output stands at OUT."""

    name: str
    module: str
    arguments: tuple[str, ...]
    out: str | None
    older: bool = False
    exchange: bool = True  # whether the filesystem can exchange two folders
    lacks: str = ""  # a broken converter, to see that its faults are found: one of LACKING
    often: bool = False  # as large runs: the thread that syncs does so all the time, and what is read is read directly
    move: moves.Move | None = field(default=None, compare=False)  # what somebody else does meanwhile
    of: str = ""  # the command's name, where the case's has more in it
    start: Path | None = None  # what an earlier run of the command has left, as copies.keep keeps it
    unnoted: bool = False  # nothing says which run wrote what is at OUT, which a rerun then refuses
    refused: bool = False  # whatever happens: its source is what it would replace

    @property
    def command(self) -> str:
        return self.of or self.name

    @property
    def trouble(self) -> int:
        return 2 if self.out is None else 1

    def line(self, place: Path) -> list[str]:
        if self.out is None:
            return [self.module, *self.arguments]
        further = ["--overwrite"] if self.older else []
        return [self.module, *self.arguments, self.out, str(place / "out"), "--workers", "1", *further]

    def change(self) -> None:
        if not self.exchange:
            from weights_conversion.output import publish

            publish.exchange = lambda *_: False
        if self.often:
            from weights_conversion.engine import direct
            from weights_conversion.output import durability

            direct.LEAST_BYTES, direct.cached_bytes = 1, lambda *_: 0
            durability.FIRST_SECONDS = durability.SYNC_SECONDS = 0.002
        if self.lacks:
            LACKING[self.lacks]()
        if self.move is not None:
            moves.hook(self.move)


def _syncs() -> None:
    os.fsync = lambda _: None


def _watch() -> None:
    from weights_conversion.files import watch

    watch.Watch.check = lambda self: None


def _stamps() -> None:
    from weights_conversion.engine import identity

    identity.watch = SimpleNamespace(Stamp=SimpleNamespace(of=lambda status: status.st_size))


def _sync_errors() -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        with contextlib.suppress(OSError):
            real(descriptor)

    os.fsync = fsync


def _mark() -> None:
    from weights_conversion.output import finished

    finished.mark = lambda *_: None


LACKING = {"sync": _syncs, "sync-errors": _sync_errors, "mark": _mark, "watch": _watch, "stamps": _stamps}


class Ground:
    """A folder with sources (`src`), and one that runs write into (`place`), where foreign files stand too."""

    def __init__(self, root: Path, warm: Warm, wanted: str = "", exactly: bool = False) -> None:
        """`wanted`: only cases whose names begin so, or (`exactly`) the one of that name."""
        from tests.robustness import moving, refused, starts

        self.root, self.warm, self.place = root, warm, root / "place"
        self._wanted, self._exactly = wanted, exactly
        self.sources = root / "src"
        hf = self.sources / "hf"
        tm.write_huggingface(hf, TINY, parts=2)
        self.reset()
        self._hf = ("llama2", "--model-path", str(hf))
        self.make_megatron(hf, self.sources)
        self._plain = {case.name: case for case in self._cases()}
        self.cases = [case for case in self._plain.values() if self.wants(case.name)]
        self.cases += moving.cases(self, self._plain)
        self.expected: dict[str, dict[str, str]] = {}
        self.moved: dict[str, dict[str, str] | None] = {}  # what is expected of what has moved
        self.has_attributes = _has_attributes(self.sources)
        self.access: Access | None = None  # to what stands at OUT before a run
        self.cases += starts.cases(self, self._plain)
        self.cases += refused.cases(self, self._plain)
        for case in self.cases:
            self._learn(case)
            if case.move is not None:
                self.moved[case.name] = moving.learn(self, case)
        self.source_state = self.look_at_sources()

    def _learn(self, case: Case) -> None:
        """What its output is; where it goes on from something, that is the one of a run from the beginning."""
        self.reset(case)
        ended = self.warm.learn(case.line(self.place))
        found = tree(self.place / "out") if case.out else {}
        if ended.code != int(case.refused) or self.expected.setdefault(case.name, found) != found:
            raise RuntimeError(f"{case.name}: exit {ended.code}\n{ended.text}")

    def wants(self, name: str) -> bool:
        return name == self._wanted if self._exactly else name.startswith(self._wanted)

    def make_megatron(self, hf: Path, into: Path) -> None:
        """Rank files (`mt`) and a torch_dist folder (`dist`) of a model."""
        for name, further in (("mt", FOUR), ("dist", CORE)):
            case = Case("", "hf_to_megatron", ("llama2", "--model-path", str(hf), *further), "--out")
            ended = self.warm.learn(case.line(self.place))
            if ended.code:
                raise RuntimeError(ended.text)
            shutil.move(self.place / "out", into / name)

    def _cases(self) -> Iterator[Case]:
        mt, dist = str(self.sources / "mt"), str(self.sources / "dist")
        both = [
            ("import TP2 PP2", "hf_to_megatron", (*self._hf, *FOUR), "--out"),
            ("export", "megatron_to_hf", ("--input_dir", mt, "--num_output_shards", "2"), "--output_dir"),
            ("export torch_dist", "megatron_to_hf", ("--input_dir", dist), "--output_dir"),
            ("import torch_dist", "hf_to_megatron", (*self._hf, *CORE), "--out"),
            ("layout to layout", "hf_to_megatron", ("llama2", "--model-path", mt), "--out"),
            ("checksums", "hf_to_megatron", (*self._hf, "--checksums"), "--out"),
            ("export with checksums", "megatron_to_hf", ("--input_dir", mt, "--checksums"), "--output_dir"),
            ("import and verify", "hf_to_megatron", (*self._hf, "--verify"), "--out"),
        ]
        for name, module, arguments, out in both:
            yield Case(name, module, arguments, out)
            yield Case(f"{name} --overwrite", module, arguments, out, older=True, of=name)
        name, module, arguments, out = both[0]
        yield Case(f"{name} --overwrite, no exchange", module, arguments, out, older=True, exchange=False, of=name)
        yield Case(f"as large runs, {name}", module, arguments, out, often=True, of=name)
        yield Case(f"as large runs, {name} --overwrite", module, arguments, out, older=True, often=True, of=name)
        for name, side in (("verify", mt), ("verify torch_dist", dist)):
            yield Case(name, "weights_conversion.verify", (str(self.sources / "hf"), side, "--workers", "1"), None)

    def reset(self, case: Case | None = None) -> dict[str, str] | None:
        """An empty place but for the neighbours, and what stands at OUT before: its tree."""
        clear(self.place)
        if case is not None and case.move is not None:
            case.move.prepare()
        for name, text in NEIGHBOURS.items():
            (self.place / name).parent.mkdir(parents=True, exist_ok=True)
            (self.place / name).write_text(text)
        self.access = None
        if case is None or not (case.older or case.start):
            return None
        copies.put_back(case.start or self._older(case.command), self.place)
        stands = self.stands()
        self.access = Access.of(stands) if stands else None
        return tree(stands) if stands else None

    def stands(self) -> Path | None:
        """What is OUT, or was until a run was ended between its two renames."""
        return next(filter(Path.exists, (self.place / "out", self.place / "out.partial" / "replaced")), None)

    def _older(self, command: str) -> Path:
        """What the command makes of another model of the same shapes, shared with others; made once."""
        kept, sources = self.root / "older" / command, self.root / "older sources"
        if kept.exists():
            return kept
        if not sources.exists():
            hf = tm.write_huggingface(sources / "hf", replace(TINY, name="older"), parts=2)
            self.make_megatron(hf, sources)
        case = self._plain[command]
        theirs = {str(self.sources / name): str(sources / name) for name in ("hf", "mt", "dist")}
        ended = self.warm.run(replace(case, arguments=tuple(theirs.get(a, a) for a in case.arguments)).line(self.place))
        if ended.code:
            raise RuntimeError(f"{command}, of another model: exit {ended.code}\n{ended.text}")
        dress(self.place / "out")
        copies.keep(self.place, kept)
        return kept

    def look_at_sources(self) -> dict[str, tuple[int, int, int]]:
        found = {path: path.stat() for path in sorted(self.sources.rglob("*")) if path.is_file()}
        return {str(path): (s.st_ino, s.st_size, s.st_mtime_ns) for path, s in found.items()}

    def damage(self, further: Collection[str] = ()) -> str | None:
        """What has happened to files that are none of the conversion's; `further` names may stand there too."""
        for name, text in NEIGHBOURS.items():
            path = self.place / name
            if not path.is_file() or path.read_text() != text:
                return f"{name} was touched"
        if self.look_at_sources() != self.source_state:
            return "the source was touched"
        names = {path.name for path in self.place.iterdir()} - {name.split("/")[0] for name in NEIGHBOURS}
        strange = names - {"out", "out.partial", *further}
        return f"{', '.join(sorted(strange))} was left" if strange else None


def _has_attributes(folder: Path) -> bool:
    """Whether a finished OUT can be known again on this filesystem."""
    try:
        os.setxattr(folder, "user.tried", b"1")
    except OSError:
        return False
    os.removexattr(folder, "user.tried")
    return True
