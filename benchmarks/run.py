"""Measures conversions against what the disk can do, in one run and in alternation.

A random model of the given shape is made in --folder, and a checkpoint of it (removed at the end, unless --keep). In
every round each contender runs once in each setting, in an order that turns from round to round, so that a disk whose
speed drifts meets all. First come the disk's own rates (preallocated, direct, two threads, one fsync), then `cp -r;
sync`, then conversions and proofs. All include the fsync of everything written. What was written is removed before the
next run. Each run's ratio is to the disk's own rate in the same setting and round.

Settings: warm and cold sources; a disk on which every fsync takes 0.3 s longer, and one that takes no more than --cap
GB/s (both by a library that is built on the spot and loaded into everything that is measured, raw writes too); a
control group of 700 MB, where one can be made (root). What is promised runs in every round, the rest in the first
ones (contenders.rounds_of). After --minutes nothing more begins. Each run is in --json as soon as it has ended.

Each run begins on a machine that has been idle for --settle seconds, as when someone types the command: a virtual
machine that gives its free memory back makes a page of it cost several times more than one freed a moment ago.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import group, measure, report, shapes, slow
from benchmarks.contenders import EXTRA, Contender, Setting, contenders, rounds_of, settings

PYTHON = sys.executable


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Bench:
    """Runs in one folder, which holds `model`, `checkpoint`, and for a moment `out`."""

    def __init__(self, folder: Path, settle: float, library: slow.Library | None) -> None:
        self.folder, self.settle, self.library, self.cache_method = folder, settle, library, ""
        self.out = folder / "out"
        self._places = {name: str(folder / name) for name in ("model", "checkpoint", "out")}

    def clear(self) -> None:
        for left in (self.out, self.out.with_name("out.partial")):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
        os.sync()

    def run(self, contender: Contender, setting: Setting) -> dict[str, Any]:
        self.clear()
        reads = [Path(self._placed(name)) for name in contender.reads]
        self._prepare_cache(reads, setting.cold)
        time.sleep(self.settle)
        environment = self._environment(setting)
        with group.limit(setting.memory) as joining:
            line = [*joining, *(self._placed(word) for word in contender.command)]
            cost = asdict(measure.run(line, environment))
        if not contender.syncs:
            cost["seconds"] += measure.run(("sync",), environment).seconds
        self.clear()
        return cost

    def _prepare_cache(self, reads: Sequence[Path], cold: bool) -> None:
        """What is read stands in the page cache, and nothing else of ours; or nothing does."""
        for name in ("{model}", "{checkpoint}"):
            path = Path(self._placed(name))
            if cold or (reads and path not in reads):
                self.cache_method = measure.cool(path)
        for path in () if cold else reads:
            measure.warm(path)

    def _placed(self, word: str) -> str:
        for name, place in self._places.items():
            word = word.replace(f"{{{name}}}", place)
        return word

    def _environment(self, setting: Setting) -> Mapping[str, str]:
        if setting.slow == slow.Slow() or self.library is None:
            return os.environ
        return self.library.environment(setting.slow)


def check_disk(folder: Path, shape: shapes.Shape, present: int) -> str | None:
    """What is missing for the model, the checkpoint, one output, and 5 % of it all."""
    needed = int(3 * shape.nbytes * 1.05) - present
    free = shutil.disk_usage(folder).free
    if needed > free:
        return f"{folder} needs {needed / 1e9:.1f} GB of free space for this, and has {free / 1e9:.1f} GB"
    return None


def make_sources(folder: Path, shape: shapes.Shape, layers: int | None) -> None:
    """Writes what is not there yet: the model, and its checkpoint (TP 1)."""
    model, checkpoint = folder / "model", folder / "checkpoint"
    if not shapes.is_written(model, shape):
        for stale in (model, checkpoint):
            shutil.rmtree(stale, ignore_errors=True)
        say(f"writing a random {shape.name} with {shape.layers} layers, {shape.nbytes / 1e9:.2f} GB")
        asked = () if layers is None else ("--layers", str(layers))
        measure.run((PYTHON, "-m", "benchmarks.shapes", str(model), "--shape", shape.name, *asked))
    if not (checkpoint / "latest_checkpointed_iteration.txt").is_file():
        say("importing it")
        measure.run((PYTHON, "hf_to_megatron.py", "llama2", "--model-path", str(model), "--out", str(checkpoint)))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=shapes.SHAPES, default="7b")
    parser.add_argument("--layers", type=int, metavar="N", help="layers, a multiple of 4 (default: the shape's)")
    parser.add_argument("--folder", type=Path, required=True, help="where to work, on the filesystem to be measured")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each contender (default: 5)")
    parser.add_argument("--minutes", type=float, default=60.0, help="then no further run begins (default: 60)")
    parser.add_argument(
        "--settle", type=float, default=3.0, metavar="SECONDS", help="idle before every run (default: 3)"
    )
    parser.add_argument("--cap", type=float, default=0.5, metavar="GB/S", help="of the slowest setting (default: 0.5)")
    parser.add_argument("--settings", default="warm,cold,sync,cap,memory", help="some of these (default: all)")
    parser.add_argument(
        "--only", metavar="NAME,...",
        help="some of: " + ", ".join(one.name for one in contenders(shapes.SHAPES["7b"]))
        + f" (default: all but {', '.join(EXTRA)}); the disk's own rates always are",
    )  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="leave model and checkpoint for the next run")
    parser.add_argument("--json", type=Path, metavar="FILE", default=measure.REPOSITORY / "benchmarks" / "results.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the result (matplotlib)")
    return parser


def _chosen(args: argparse.Namespace, shape: shapes.Shape) -> list[tuple[Setting, Contender]]:
    """What runs in one round, in order."""
    known = {one.name: one for one in contenders(shape)}
    places = {one.name: one for one in settings(args.cap * 1e9)}
    names = args.only.split(",") if args.only else [name for name in known if name not in EXTRA]
    wanted = args.settings.split(",")
    if unknown := [*(set(names) - set(known)), *(set(wanted) - set(places))]:
        raise SystemExit(f"no such contender or setting: {', '.join(sorted(unknown))}")
    pairs = []
    for setting in (places[name] for name in wanted):
        here = [known[n] for n in names if setting.name in (known[n].settings or wanted) and not known[n].is_raw]
        limits = {one.limit or setting.limit for one in here}
        pairs += [(setting, one) for one in known.values() if one in here or (one.is_raw and one.name in limits)]
    return pairs


def _possible(pairs: list[tuple[Setting, Contender]]) -> list[tuple[Setting, Contender]]:
    """Without the control group, where none can be made."""
    if problem := group.problem():
        say(f"without the setting memory: {problem}")
        return [pair for pair in pairs if pair[0].memory is None]
    return pairs


def _measure(
    bench: Bench, pairs: Sequence[tuple[Setting, Contender]], args: argparse.Namespace, result: dict[str, Any],
    until: float,
) -> None:  # fmt: skip
    """The `pairs` of every round: begun at another one each time, and backwards in every second round.

    Each run is added to `result`, which is then written. None begins after `until` (time.monotonic).
    """
    result["runs"], rounds = [], args.rounds
    for number in range(rounds):
        wanted = [pair for pair in pairs if number < rounds_of(pair[0].name, pair[1].name, rounds)]
        turned = [*wanted[number % len(wanted) :], *wanted[: number % len(wanted)]]
        for setting, contender in turned if number % 2 == 0 else turned[::-1]:
            if time.monotonic() > until:
                say(f"{args.minutes:g} minutes are over: what is left of {rounds} rounds is left out")
                return
            cost = bench.run(contender, setting)
            result["runs"].append({"round": number, "setting": setting.name, "name": contender.name, **cost})
            result["cache_method"] = bench.cache_method
            args.json.write_text(json.dumps(result, indent=1) + "\n")
            say(f"{number + 1} of {rounds}, {setting.name}, {contender.name}: {cost['seconds']:.2f} s")


def main(argv: list[str] | None = None) -> int:
    until = time.monotonic()
    parser = build_parser()
    args = parser.parse_args(argv)
    until += args.minutes * 60
    shape = shapes.find_shape(args.shape, args.layers)
    if shape.layers % 4:
        parser.error(f"--layers must be a multiple of 4 (one contender has 4 pipeline stages), not {shape.layers}")
    pairs = _possible(_chosen(args, shape))
    args.folder.mkdir(parents=True, exist_ok=True)
    folder = args.folder.resolve()
    present = sum(path.stat().st_size for name in ("model", "checkpoint") for path in measure.files(folder / name))
    if problem := check_disk(folder, shape, present):
        say(f"error: {problem}")
        return 1
    result: dict[str, Any] = {
        "shape": asdict(shape), "bytes": shape.nbytes, "settle_seconds": args.settle, "cap": args.cap * 1e9,
        "machine": measure.machine(folder),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as built:
        needs = any(setting.slow != slow.Slow() for setting, _ in pairs)
        bench = Bench(folder, args.settle, slow.Library(Path(built)) if needs else None)
        try:
            make_sources(folder, shape, args.layers)
            _measure(bench, pairs, args, result, until)
        except measure.Failed as error:
            say(f"error: {error}")
            return 1
        finally:
            bench.clear()
            if not args.keep:
                for name in ("model", "checkpoint"):
                    shutil.rmtree(folder / name, ignore_errors=True)
    if not result["runs"]:
        return 1
    print(report.text(result))
    if args.plot:
        try:
            report.plot(result, args.plot)
        except ImportError as error:
            say(f"no plot ({error}): python -m benchmarks.report {args.json} --plot {args.plot} draws it where that is")
    return 0


if __name__ == "__main__":
    sys.exit(main())
