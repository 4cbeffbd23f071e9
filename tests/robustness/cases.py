"""What is run at every point: each conversion, over nothing and over an earlier output, and both proofs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.robustness.sources import GQA, clear, tm, tree, write_older
from tests.robustness.warm import Warm

TINY = replace(GQA, name="two-layers", layers=2)
NEIGHBOURS = {"notes.txt": "mine", "out.partial.txt": "mine too", "out.d/a.txt": "a foreign folder"}


@dataclass(frozen=True)
class Case:
    """A command. `out` is the flag of its output, None for a proof; `older`: something stands at OUT already."""

    name: str
    module: str
    arguments: tuple[str, ...]
    out: str | None
    older: bool = False
    exchange: bool = True  # whether the filesystem can exchange two folders
    syncs: bool = True  # False: a broken converter, to see that its faults are found
    often: bool = False  # as large runs: the thread that syncs does so all the time, and what is read is read directly

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
        if not self.syncs:
            os.fsync = lambda _: None


class Ground:
    """A folder with sources (`src`), and one that runs write into (`place`), where foreign files stand too."""

    def __init__(self, root: Path, warm: Warm, wanted: str = "", exactly: bool = False) -> None:
        """`wanted`: only cases whose names begin so, or (`exactly`) the one of that name."""
        self.root, self.warm, self.place = root, warm, root / "place"
        self.sources = root / "src"
        hf = self.sources / "hf"
        tm.write_huggingface(hf, TINY, parts=2)
        self.reset()
        four = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
        self._hf = ("llama2", "--model-path", str(hf))
        self._made(Case("", "hf_to_megatron", (*self._hf, *four), "--out"), "mt")
        self._made(Case("", "hf_to_megatron", (*self._hf, "--target", "megatron-core"), "--out"), "dist")
        self.cases = [
            case for case in self._cases(four) if (case.name == wanted if exactly else case.name.startswith(wanted))
        ]
        self.expected: dict[str, dict[str, str]] = {}
        for case in self.cases:
            self.reset(case)
            ended = warm.learn(case.line(self.place))
            if ended.code:
                raise RuntimeError(f"{case.name}: exit {ended.code}\n{ended.text}")
            self.expected[case.name] = tree(self.place / "out") if case.out else {}
        self.source_state = self.look_at_sources()

    def _made(self, case: Case, name: str) -> None:
        ended = self.warm.learn(case.line(self.place))
        if ended.code:
            raise RuntimeError(ended.text)
        shutil.move(self.place / "out", self.sources / name)

    def _cases(self, four: tuple[str, ...]) -> Iterator[Case]:
        mt, dist = str(self.sources / "mt"), str(self.sources / "dist")
        core = ("--target", "megatron-core")
        both = [
            ("import TP2 PP2", "hf_to_megatron", (*self._hf, *four), "--out"),
            ("export", "megatron_to_hf", ("--input_dir", mt, "--num_output_shards", "2"), "--output_dir"),
            ("export torch_dist", "megatron_to_hf", ("--input_dir", dist), "--output_dir"),
            ("import torch_dist", "hf_to_megatron", (*self._hf, *core), "--out"),
            ("layout to layout", "hf_to_megatron", ("llama2", "--model-path", mt), "--out"),
            ("checksums", "hf_to_megatron", (*self._hf, "--checksums"), "--out"),
            ("export with checksums", "megatron_to_hf", ("--input_dir", mt, "--checksums"), "--output_dir"),
            ("import and verify", "hf_to_megatron", (*self._hf, "--verify"), "--out"),
        ]
        for name, module, arguments, out in both:
            yield Case(name, module, arguments, out)
            yield Case(f"{name} --overwrite", module, arguments, out, older=True)
        name, module, arguments, out = both[0]
        yield Case(f"{name} --overwrite, no exchange", module, arguments, out, older=True, exchange=False)
        yield Case(f"as large runs, {name}", module, arguments, out, often=True)
        yield Case(f"as large runs, {name} --overwrite", module, arguments, out, older=True, often=True)
        for name, side in (("verify", mt), ("verify torch_dist", dist)):
            yield Case(name, "weights_conversion.verify", (str(self.sources / "hf"), side, "--workers", "1"), None)

    def reset(self, case: Case | None = None) -> dict[str, str] | None:
        """An empty place but for the neighbours, and what stands at OUT before: its tree."""
        clear(self.place)
        for name, text in NEIGHBOURS.items():
            (self.place / name).parent.mkdir(parents=True, exist_ok=True)
            (self.place / name).write_text(text)
        if case is None or not case.older:
            return None
        write_older(self.place / "out")
        return tree(self.place / "out")

    def look_at_sources(self) -> dict[str, tuple[int, int, int]]:
        found = {path: path.stat() for path in sorted(self.sources.rglob("*")) if path.is_file()}
        return {str(path): (s.st_ino, s.st_size, s.st_mtime_ns) for path, s in found.items()}

    def damage(self) -> str | None:
        """What has happened to files that are none of the conversion's."""
        for name, text in NEIGHBOURS.items():
            path = self.place / name
            if not path.is_file() or path.read_text() != text:
                return f"{name} was touched"
        if self.look_at_sources() != self.source_state:
            return "the source was touched"
        names = {path.name for path in self.place.iterdir()} - {name.split("/")[0] for name in NEIGHBOURS}
        strange = names - {"out", "out.partial"}
        return f"{', '.join(sorted(strange))} was left" if strange else None
