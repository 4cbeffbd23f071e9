"""Measures imports and exports against a plain copy of the same files, pair by pair.

A random model of the given shape is made in --folder (and removed at the end, unless --keep). Each contender then runs
--pairs times, each time right after `cp -r; sync` of the files that it reads (or right before, in every second round),
so that a disk whose speed drifts meets both. Both sides include the fsync of everything written. What a run wrote is
removed before the next one begins. Caches are warm (they hold the source and nothing else) or, with --cold, empty.

Each run begins on a machine that has been idle for --settle seconds, as when someone types the command: the disk has
discarded what was removed, and a virtual machine has given freed memory back. Without this pause what is measured is
the run before: a copy takes a page of memory for each page it writes, and on a virtual machine with free page reporting
one that was given back costs several times more than one that was freed a moment ago, or that holds another file.

Results are added to --json, by shape and cache; what is measured again replaces what was there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import measure, report, shapes

PYTHON = sys.executable
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Contender:
    """A conversion that is measured: the command without its source and output, which are appended."""

    name: str
    command: tuple[str, ...]
    source: str  # "model" (Hugging Face) or "checkpoint" (Megatron-LLM, TP 1)
    source_option: tuple[str, ...] = ()
    out_option: tuple[str, ...] = ()
    syncs: bool = True  # by itself; otherwise `sync` follows and is part of its time


def contenders(shape: shapes.Shape, workers: int | None) -> list[Contender]:
    threads = () if workers is None else ("--workers", str(workers))
    importing = ("llama2", *threads)
    exporting = ("--model", "llama2", "--no_tokenizer", *threads)
    shards = max(2, -(-shape.nbytes // SHARD_BYTES))
    layout = ("--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "4")
    page_cache = (PYTHON, "-m", "benchmarks.through_page_cache")
    baseline = (PYTHON, "-m", "benchmarks.baseline")
    to_megatron, to_hf = (PYTHON, "hf_to_megatron.py"), (PYTHON, "megatron_to_hf.py")
    source, out = ("--model-path",), ("--out",)
    root, folder = ("--input_dir",), ("--output_dir",)
    return [
        Contender("import-tp1", (*to_megatron, *importing), "model", source, out),
        Contender("import-tp8-pp4", (*to_megatron, *importing, *layout), "model", source, out),
        Contender("import-page-cache", (*page_cache, "hf_to_megatron", *importing), "model", source, out),
        Contender("import-baseline", (*baseline, "import"), "model", syncs=False),
        Contender("export-1", (*to_hf, *exporting), "checkpoint", root, folder),
        Contender("export-5gb", (*to_hf, *exporting, "--num_output_shards", str(shards)), "checkpoint", root, folder),
        Contender("export-page-cache", (*page_cache, "megatron_to_hf", *exporting), "checkpoint", root, folder),
        Contender("export-baseline", (*baseline, "export"), "checkpoint", syncs=False),
    ]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Bench:
    """Runs in one folder, which holds `model`, `checkpoint`, and for a moment `out`."""

    def __init__(self, folder: Path, cold: bool, settle: float) -> None:
        self.folder, self.cold, self.settle, self.cache_method = folder, cold, settle, ""
        self.out = folder / "out"

    def clear(self) -> None:
        for left in (self.out, self.out.with_name("out.partial")):
            if left.exists():
                shutil.rmtree(left)
        os.sync()

    def prepare(self, source: Path) -> None:
        self.clear()
        self.cache_method = measure.cool(self.folder)
        if not self.cold:
            measure.warm(source)
            self.cache_method += ", then the source read once"
        time.sleep(self.settle)

    def copy(self, source: Path) -> dict[str, Any]:
        self.prepare(source)
        copied = measure.run(("cp", "-r", str(source), str(self.out)))
        return {"copy": asdict(copied), "sync": asdict(measure.run(("sync",)))}

    def convert(self, contender: Contender, source: Path) -> dict[str, Any]:
        self.prepare(source)
        command = (
            *contender.command, *contender.source_option, str(source), *contender.out_option, str(self.out),
        )  # fmt: skip
        cost = asdict(measure.run(command))
        if not contender.syncs:
            cost["seconds"] += measure.run(("sync",)).seconds
        return {"run": cost}

    def pair(self, contender: Contender, number: int) -> dict[str, Any]:
        source = self.folder / contender.source
        if number % 2:
            found = self.convert(contender, source) | self.copy(source)
        else:
            found = self.copy(source) | self.convert(contender, source)
        self.clear()
        return {"name": contender.name, "round": number, **found}


def check_disk(folder: Path, shape: shapes.Shape, exports: bool, present: int) -> str | None:
    """What is missing for the model, the checkpoint that exports read, one output, and 5 % of it all."""
    needed = int((3 if exports else 2) * shape.nbytes * 1.05) - present
    free = shutil.disk_usage(folder).free
    if needed > free:
        return f"{folder} needs {needed / 1e9:.1f} GB of free space for this, and has {free / 1e9:.1f} GB"
    return None


def make_sources(folder: Path, shape: shapes.Shape, layers: int | None, exports: bool) -> None:
    """Writes what is not there yet: the model, and the checkpoint that exports read."""
    model, checkpoint = folder / "model", folder / "checkpoint"
    if not shapes.is_written(model, shape):
        for stale in (model, checkpoint):
            shutil.rmtree(stale, ignore_errors=True)
        say(f"writing a random {shape.name} with {shape.layers} layers, {shape.nbytes / 1e9:.2f} GB")
        asked = () if layers is None else ("--layers", str(layers))
        measure.run((PYTHON, "-m", "benchmarks.shapes", str(model), "--shape", shape.name, *asked))
    if exports and not (checkpoint / "latest_checkpointed_iteration.txt").is_file():
        say("importing it for the exports")
        measure.run((PYTHON, "hf_to_megatron.py", "llama2", "--model-path", str(model), "--out", str(checkpoint)))


def start_up(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of --help beside a bare interpreter's, and of a dry run of 70B's whole shape beside `import torch`."""
    sparse = folder / "sparse-70b"
    shutil.rmtree(sparse, ignore_errors=True)
    measure.run((PYTHON, "-m", "benchmarks.shapes", str(sparse), "--shape", "70b", "--sparse"))
    bare, importing = (PYTHON, "-c", "pass"), (PYTHON, "-c", "import torch")
    dry = ("hf_to_megatron.py", "llama2", "--model-path", str(sparse), "--out", str(folder / "out"), "--dry-run")
    layout = ("--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "4")
    measured: tuple[tuple[str, Sequence[str], str, Sequence[str]], ...] = (
        ("hf_to_megatron.py --help", (PYTHON, "hf_to_megatron.py", "--help"), "a bare interpreter", bare),
        ("megatron_to_hf.py --help", (PYTHON, "megatron_to_hf.py", "--help"), "a bare interpreter", bare),
        ("--dry-run, 70B", (PYTHON, *dry), "import torch", importing),
        ("--dry-run, 70B, TP 8 x PP 4", (PYTHON, *dry, *layout), "import torch", importing),
    )
    found = {}
    for name, command, reference_name, reference in measured:
        pairs = []
        for _ in range(rounds + 1):  # the first fills the caches and is dropped
            pairs.append((measure.run(reference).seconds, measure.run(command).seconds))
        pairs = pairs[1:]
        found[name] = {
            "seconds": median(ours for _, ours in pairs),
            "reference": reference_name,
            "reference_seconds": median(other for other, _ in pairs),
            "difference": median(ours - other for other, ours in pairs),
            "ratio": median(ours / other for other, ours in pairs),
        }
        say(f"{name}: {found[name]['seconds']:.2f} s, {reference_name} {found[name]['reference_seconds']:.2f} s")
    shutil.rmtree(sparse)
    return found


def store(path: Path, session: dict[str, Any]) -> list[dict[str, Any]]:
    """Adds a session to the JSON file; returns all, this one last.

    What an earlier session of the same shape, cache and machine measured, and this one has not, stays.
    """
    sessions = json.loads(path.read_text())["sessions"] if path.is_file() else []
    key = ("shape", "cache", "settle_seconds")
    kept = [other for other in sessions if any(other.get(name) != session[name] for name in key)]
    for other in sessions:
        if other not in kept and other["machine"] == session["machine"]:
            measured = {pair["name"] for pair in session["pairs"]}
            pairs = [pair for pair in other["pairs"] if pair["name"] not in measured]
            session = {**other, **session, "pairs": [*pairs, *session["pairs"]]}
    sessions = [*kept, session | {"summary": report.summarise(session)}]
    path.write_text(json.dumps({"sessions": sessions}, indent=1) + "\n")
    return sessions


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=shapes.SHAPES, default="7b")
    parser.add_argument("--layers", type=int, metavar="N", help="layers, a multiple of 4 (default: the shape's)")
    parser.add_argument("--folder", type=Path, required=True, help="where to work, on the filesystem to be measured")
    parser.add_argument("--pairs", type=int, default=5, metavar="N", help="of each contender (default: 5)")
    parser.add_argument(
        "--settle", type=float, default=10.0, metavar="SECONDS", help="idle before every run (default: 10)"
    )
    parser.add_argument("--cold", action="store_true", help="empty the page cache before every run")
    names = ", ".join(report.TITLES)
    parser.add_argument(
        "--only", metavar="NAME,...", help=f"some of: {names}; start (default: all, start with warm caches only)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="of the conversions (default: the scripts' own)")
    parser.add_argument("--keep", action="store_true", help="leave model and checkpoint for the next run")
    parser.add_argument("--json", type=Path, metavar="FILE", default=measure.REPOSITORY / "benchmarks" / "results.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw all sessions of the JSON file (matplotlib)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    shape = shapes.find_shape(args.shape, args.layers)
    if shape.layers % 4:
        parser.error(f"--layers must be a multiple of 4 (one contender has 4 pipeline stages), not {shape.layers}")
    chosen = args.only.split(",") if args.only else [*report.TITLES, *([] if args.cold else ["start"])]
    if unknown := set(chosen) - {*report.TITLES, "start"}:
        parser.error(f"--only: no such contender: {', '.join(sorted(unknown))}")
    runs = [contender for contender in contenders(shape, args.workers) if contender.name in chosen]
    exports = any(contender.source == "checkpoint" for contender in runs)

    args.folder.mkdir(parents=True, exist_ok=True)
    folder = args.folder.resolve()
    present = sum(path.stat().st_size for name in ("model", "checkpoint") for path in measure.files(folder / name))
    if runs and (problem := check_disk(folder, shape, exports, present)):
        say(f"error: {problem}")
        return 1
    bench = Bench(folder, args.cold, args.settle)
    session: dict[str, Any] = {
        "shape": asdict(shape),
        "bytes": shape.nbytes,
        "cache": "cold" if args.cold else "warm",
        "settle_seconds": args.settle,
        "machine": measure.machine(folder),
        "pairs": [],
    }
    try:
        if "start" in chosen:
            session["start"] = start_up(folder, args.pairs)
        if runs:
            make_sources(folder, shape, args.layers, exports)
        for number in range(args.pairs):
            for contender in runs:
                pair = bench.pair(contender, number)
                session["pairs"].append(pair)
                copied = pair["copy"]["seconds"] + pair["sync"]["seconds"]
                ratio = pair["run"]["seconds"] / copied
                say(
                    f"pair {number + 1} of {args.pairs}, {contender.name}: {pair['run']['seconds']:.2f} s, "
                    f"{report.COPY} {copied:.2f} s, ratio {ratio:.2f}"
                )
                store(args.json, session | {"cache_method": bench.cache_method})
        sessions = store(args.json, session | {"cache_method": bench.cache_method})
    except measure.Failed as error:
        say(f"error: {error}")
        return 1
    finally:
        shutil.rmtree(bench.out, ignore_errors=True)
        if not args.keep:
            for name in ("model", "checkpoint"):
                shutil.rmtree(folder / name, ignore_errors=True)
    print(report.text(sessions[-1]))
    if args.plot:
        report.plot(sessions, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
