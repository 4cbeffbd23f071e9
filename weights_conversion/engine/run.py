"""Runs a checked plan from end to end: space, consistency, writing, resuming, finishing, reporting."""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from weights_conversion import __version__, fileio, watch
from weights_conversion.engine import memory, progress, scale
from weights_conversion.engine.execute import THREADS_PER_WORKER, Written, execute, inconsistencies
from weights_conversion.engine.progress import Report
from weights_conversion.engine.streams import Source, Target
from weights_conversion.errors import ConversionError
from weights_conversion.launch import distributed
from weights_conversion.layouts.placement import TensorRef
from weights_conversion.layouts.plan import Chunk, Plan
from weights_conversion.output import assembly, finished, partial, place
from weights_conversion.output.journal import Journal
from weights_conversion.output.partial import Partial

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BASE_BYTES = 300 << 20  # an interpreter that has imported torch
DIVISIBLE_BY = 128  # Megatron's own default


@dataclass(frozen=True)
class RunOptions:
    """What both directions share."""

    dtype: str = "keep"
    dry_run: bool = False
    overwrite: bool = False
    workers: int = 2
    allow_inconsistent: bool = False
    checksums: bool = False
    verify: bool = False
    ranks: int | None = None  # of a job whose time a dry run is to predict
    rank_rate: float = 1.0  # GB/s of output that one rank converts
    filesystem_bandwidth: float | None = None  # GB/s of output that the filesystem takes while it is read too
    began: float = field(default_factory=time.monotonic)  # when the process started to get ready, for the prediction


@dataclass(frozen=True)
class Job:
    """A checked plan with everything that has to be written around its tensors.

    `prove` compares the finished folder with the source; it returns a report, or raises ConversionError.
    """

    plan: Plan
    report: Report
    targets: Sequence[assembly.TargetFile]
    out: Path
    files: Mapping[str, bytes | Path] = field(default_factory=dict)
    last: Mapping[str, bytes] = field(default_factory=dict)
    prove: Callable[[Path], str] | None = None


def run(job: Job, options: RunOptions) -> Report:
    """Executes a job (this rank's part of it, under a launcher), or only describes it where a dry run was asked for."""
    report = job.report
    ranks = distributed.current()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # a save of 512 ranks has more files than the usual limit
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = assembly.output_bytes(job.targets)
    chunks = job.plan.chunks()
    plan_digest = assembly.digest(job.plan, job.targets, options.dtype)
    small = _small_files(job)
    if ranks.size > 1:
        ranks.agree(_view(job, plan_digest, small))
    # Of the run: what another command would do otherwise, even where the weights are the same, is not continued.
    run_digest = hashlib.sha256(f"{plan_digest} {small} {options.checksums} {options.verify}".encode()).hexdigest()
    peak = peak_bytes(options.workers, chunks)
    files = [target.file for target in job.targets]
    report.planned(job.out, needed, assembly.free_space(job.out), files, peak)
    if ranks.size > 1:
        hosts = f"{ranks.hosts} host{'s' * (ranks.hosts > 1)}"
        report.notes.append(f"{ranks.size} ranks on {hosts} share the work; the memory is that of each")
    if _is_complete(job, options, run_digest):
        return report
    problems = _lacking(job, needed, peak)
    if problems and not options.dry_run:
        raise ConversionError(*problems)
    source = Source()
    try:
        if ranks.rank == 0:
            differences = inconsistencies(job.plan, source)
            if differences and not options.allow_inconsistent:
                raise ConversionError(*differences)
            report.warnings += differences
        if options.dry_run:
            report.notes += _predictions(needed, options)
            if problems:
                failure = ConversionError(*problems)
                failure.report = report.text()
                raise failure
            return report
        _write(job, options, chunks, source, run_digest, needed)
    finally:
        source.close()
    return report


def _lacking(job: Job, needed: int, peak: int) -> list[str]:
    """Why this machine cannot do it: memory (of every rank, since each has its own machine or limit), and the disk."""
    ranks, problems = distributed.current(), []
    checks = [lambda: memory.check(peak - progress.peak_memory(), -(-ranks.size // ranks.hosts))]
    if ranks.rank == 0:
        checks.append(lambda: assembly.check_space(job.out, needed))
    for check in checks:
        try:
            check()
        except ConversionError as error:
            problems += error.problems
    return problems


def _is_complete(job: Job, options: RunOptions, run_digest: str) -> bool:
    """Whether the same command has written OUT already; another OUT that is there is refused. Rank 0 decides."""
    ranks = distributed.current()
    if options.overwrite:
        return False
    if ranks.rank:
        return bool(ranks.hear("complete"))
    complete = False
    if not place.is_published(place.partial_folder(job.out), job.out):
        complete = finished.is_of(job.out, run_digest)
        if not complete and finished.is_noted(job.out):
            raise place.is_there(job.out)
    ranks.tell("complete", "yes" if complete else "")
    if complete:
        job.report.complete(job.out)
        if options.verify and not options.dry_run:
            _proof(job)(job.out)
    return complete


def _small_files(job: Job) -> str:
    """A digest of all that is written beside the weights."""
    small = hashlib.sha256()
    for name, content in sorted({**job.files, **job.last}.items()):
        data = fileio.read_whole(content, fileio.MAX_TOKENIZER_BYTES) if isinstance(content, Path) else content
        small.update(f"{name} {len(data)}\n".encode() + data)
    return small.hexdigest()


def _view(job: Job, plan_digest: str, small: str) -> dict[str, str]:
    """What decides the output, as digests: ranks that differ in one of them would write different checkpoints."""
    config = hashlib.sha256(repr(job.plan.config).encode()).hexdigest()
    return {
        "release": __version__,
        "the model's config": config,
        "configs and tokenizer files": small,
        "weight files (names, sizes, times) and plan": plan_digest,
    }


def _predictions(needed: int, options: RunOptions) -> list[str]:
    if options.ranks is None and options.filesystem_bandwidth is None:
        return []
    alone = time.monotonic() - options.began
    rate, bandwidth = options.rank_rate, options.filesystem_bandwidth
    counts = sorted({1, options.ranks or 1, *((2, 4, 8, 16, 32, 64) if options.ranks is None else ())})
    limit = f", the filesystem takes {bandwidth:g} GB/s" if bandwidth else ""
    seconds = [
        scale.predicted_seconds(
            needed, n, rate * 1e9, bandwidth and bandwidth * 1e9, scale.start_up_seconds(alone, n)
        )
        for n in counts
    ]  # fmt: skip
    said = ", ".join(f"{time:.0f} s on {n} rank{'s' * (n > 1)}" for n, time in zip(counts, seconds, strict=True))
    lines = [
        f"predicted  {said} (a rank converts {rate:g} GB/s{limit})",
        f"predicted  of these, start-up is {alone:.1f} s, as this dry run took, and three times that under torchrun",
    ]
    if bandwidth:
        lines.append(f"predicted  more than {max(1, round(bandwidth / rate + 0.49))} ranks do not help")
    return lines


@dataclass
class _Output:
    """OUT.partial, laid out: this rank's hold on it, where each tensor begins, and what is finished already."""

    hold: Partial
    offsets: Mapping[TensorRef, int]
    journal: Journal
    done: dict[int, list[Written]]


def _lay_out(job: Job, ranks: distributed.Ranks, run_digest: str, chunks: int, overwrite: bool) -> _Output:
    """Rank 0 makes the files; the others find them, and hear from it what is left to be done."""
    refs = [ref for target in job.targets for ref in target.refs]
    if ranks.rank:
        said = json.loads(ranks.hear("prepared"))
        done: dict[int, list[Written]] = {number: [] for start, stop in said["done"] for number in range(start, stop)}
        hold, offsets = assembly.join_layout(job.out, job.targets, run_digest)
        if _places(offsets) != said["places"]:
            hold.close()
            raise ConversionError(
                f"{place.partial_folder(job.out)} is not what rank 0 made; the output must be one folder on a "
                "filesystem that all nodes share"
            )
        return _Output(hold, offsets, Journal(hold.notes, refs, ranks.rank, hold.journal), done)
    hold = partial.prepare(job.out, run_digest, overwrite)
    try:
        done: dict[int, list[Written]] = {}
        if hold.resume and (offsets := _found(hold, job)) is not None:
            journal = Journal(hold.notes, refs, 0, hold.journal)
            done = {n: [] for n in range(chunks)} if hold.complete else journal.load()
            job.report.notes.append(f"continued an interrupted run: {len(done)} of {chunks} parts were good")
        else:
            offsets = assembly.lay_out(hold, job.targets, run_digest)
            journal = Journal(hold.notes, refs, 0, hold.journal)
        if ranks.size > 1:
            hold.share()
        ranks.tell("prepared", json.dumps({"done": scale.to_ranges(sorted(done)), "places": _places(offsets)}))
    except BaseException:
        hold.close()
        raise
    return _Output(hold, offsets, journal, done)


def _found(hold: Partial, job: Job) -> dict[TensorRef, int] | None:
    """The layout that an earlier run made; None where it is damaged, and new folders have taken its place."""
    try:
        return assembly.find_layout(hold, job.targets)
    except (OSError, ConversionError) as error:
        if hold.complete:
            raise ConversionError(
                f"{hold.out} was finished by the same command, and is not whole any more ({error}); --overwrite makes "
                "it again"
            ) from error
        hold.start_over()
        hold.open_folders()
        return None


def _places(offsets: Mapping[TensorRef, int]) -> str:
    return hashlib.sha256(repr(sorted((ref.file, ref.name, at) for ref, at in offsets.items())).encode()).hexdigest()


def _write(
    job: Job, options: RunOptions, chunks: Sequence[Chunk], source: Source, run_digest: str, needed: int
) -> None:  # fmt: skip
    started = time.monotonic()
    ranks = distributed.current()
    output = _lay_out(job, ranks, run_digest, len(chunks), options.overwrite)
    try:
        _convert(job, options, chunks, source, output, needed)
    finally:
        output.hold.close()
    if ranks.rank == 0:
        job.report.finished(needed, time.monotonic() - started)


def _convert(
    job: Job, options: RunOptions, chunks: Sequence[Chunk], source: Source, output: _Output, needed: int
) -> None:  # fmt: skip
    ranks, journal = distributed.current(), output.journal
    done, seen = output.done, watch.current()
    stands = seen.check if seen is not None else lambda: None
    remaining = assembly.remaining(chunks, done)
    mine = scale.share(remaining, [chunk.nbytes for _, chunk in remaining], ranks.size)[ranks.rank]
    target = Target(output.hold.shown, output.offsets, folder=output.hold.checkpoint)
    before = sum(w.length for writes in done.values() for w in writes)
    try:
        with progress.bar(needed, before) if ranks.rank == 0 else contextlib.nullcontext(lambda _: None) as advance:
            ranks.shows(advance)

            def finished(number: int, _: object, written: list[Written]) -> None:
                done[number] = written
                journal.add(number, written, target.sync)
                ranks.count(sum(w.length for w in written))

            try:
                execute(job.plan, mine, source, target, options.workers, finished, ranks.stop)
            finally:
                journal.flush(target.sync)
            ranks.check()
            stands()
            target.close()
            if ranks.rank:
                output.hold.close()  # nothing more is written here
            ranks.gather("written")
    finally:
        target.close()
    if ranks.rank:
        ranks.hear("finished")
        return
    ranks.settle()
    if ranks.size > 1 and remaining:
        done = journal.load_all(len(chunks))
    written = [write for writes in done.values() for write in writes]
    assembly.finish(
        output.hold, job.targets, output.offsets, written, job.files, job.last, options.overwrite,
        options.workers if options.checksums else 0, _proof(job) if options.verify else None, stands,
    )  # fmt: skip
    ranks.tell("finished")


def _proof(job: Job) -> Callable[[Path], None]:
    def prove(folder: Path) -> None:
        if job.prove is not None:
            text = job.prove(folder).replace(str(folder), str(job.out))
            job.report.proof += text.splitlines()

    return prove


def verified(source: Path, model: str, options: RunOptions, **stated: Any) -> Callable[[Path], str]:
    """A Job's `prove`: the finished folder against `source`; `stated` are further arguments of verify()."""

    def prove(folder: Path) -> str:
        from weights_conversion.verify import verify

        found = verify(
            source, folder, model, workers=options.workers, allow_inconsistent=options.allow_inconsistent, **stated
        )
        if not found.same:
            raise ConversionError("the output has failed its proof", *found.text().splitlines(), whole=True)
        return found.text()

    return prove


def peak_bytes(workers: int, chunks: Sequence[Chunk]) -> int:
    """Peak memory of a run, in bytes: the interpreter with torch, and the buffers of each thread that finds work."""
    largest = max((chunk.nbytes for chunk in chunks), default=0)
    return BASE_BYTES + min(workers * THREADS_PER_WORKER, len(chunks)) * 3 * largest
