"""Runs a checked plan from end to end: space, consistency, writing, resuming, finishing, reporting."""

from __future__ import annotations

import contextlib
import logging
import resource
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from weights_conversion.engine import compare, identity, memory, progress, sharing, start
from weights_conversion.engine.copies import inconsistencies
from weights_conversion.engine.crew import most_threads
from weights_conversion.engine.direct import Direct
from weights_conversion.engine.execute import execute
from weights_conversion.engine.job import Job, RunOptions
from weights_conversion.engine.prediction import predictions
from weights_conversion.engine.report import Report
from weights_conversion.engine.streams import Source, Target
from weights_conversion.engine.sums import RunningSums
from weights_conversion.errors import ConversionError, Problems
from weights_conversion.errors.text import size
from weights_conversion.files import watch
from weights_conversion.files.collector import with_collector
from weights_conversion.launch import distributed, signals
from weights_conversion.layouts.placement import Written
from weights_conversion.layouts.plan import Chunk
from weights_conversion.output import assembly, beginning, finished, finishing, place, space
from weights_conversion.output.durability import Durability
from weights_conversion.output.finished import open_to_others

logger = logging.getLogger(__name__)

BASE_BYTES = 300 << 20  # an interpreter that has imported torch


def run(job: Job, options: RunOptions) -> Report:
    """Executes a job (this rank's part of it, under a launcher), or only describes it where a dry run was asked for.

    What is wrong with the plan or this machine is raised together, before anything is written; a dry run says the plan
    in front of it.
    """
    report, ranks = job.report, distributed.current()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # a save of 512 ranks has more files than the usual limit
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = sum(ref.nbytes for target in job.targets for ref in target.refs)
    chunks = job.plan.chunks()
    plan, small = identity.plan_digest(job, options.dtype), identity.small_files(job)
    if ranks.size > 1:
        ranks.agree(identity.view(job, plan, small))
    run_digest = identity.run_digest(plan, small, options)
    peak = peak_bytes(options.workers, chunks)
    report.planned(job.out, needed, space.free_space(job.out), [target.file for target in job.targets], peak)
    if ranks.size > 1:
        hosts = f"{ranks.hosts} host{'s' * (ranks.hosts > 1)}"
        report.notes.append(f"{ranks.size} ranks on {hosts} share the work; the memory is that of each")
    if ranks.rank == 0:
        report.warn()
    problems, source = Problems(), Source(direct=Direct())
    try:
        if problems.of(_is_complete, job, options, run_digest):
            return report
        _check_machine(problems, job, needed, peak)
        if ranks.rank == 0:
            _check_copies(problems, job, options, source)
        if options.dry_run:
            report.notes += predictions(needed, options)
        problems.raise_all(report.text() if options.dry_run else "")
        if not options.dry_run:
            if ranks.rank == 0:
                report.begin()
            with with_collector():
                _write(job, options, chunks, source, run_digest, needed)
    finally:
        source.close()
    return report


def _check_machine(problems: Problems, job: Job, needed: int, peak: int) -> None:
    """Memory (of every rank, since each has its own machine or limit), and the disk."""
    ranks = distributed.current()
    problems.of(memory.check, peak - memory.peak(), -(-ranks.size // ranks.hosts))
    if ranks.rank == 0:
        copied = [content for content in job.files.values() if isinstance(content, Path)]
        problems.of(place.check_apart, job.out, [*map(Path, job.plan.source_files()), *job.read, *copied])
        problems.of(space.check_space, job.out, needed)


def _check_copies(problems: Problems, job: Job, options: RunOptions, source: Source) -> None:
    differences = problems.of(inconsistencies, job.plan, source, options.workers, options.dry_run) or []
    if differences and not options.allow_inconsistent:
        problems.found += differences
    else:
        job.report.warnings += differences
        job.report.warn()


def _is_complete(job: Job, options: RunOptions, run_digest: str) -> bool:
    """Whether the same command has written OUT already; another OUT that is there is refused. Rank 0 decides."""
    ranks = distributed.current()
    if options.overwrite:
        return False
    if ranks.rank:
        return bool(ranks.hear("complete"))
    note = finished.read(job.out)
    complete = note is not None and note.run_digest == run_digest and (note.sure or _is_same(job, options))
    if complete and not options.dry_run:
        beginning.clear_away(job.out, run_digest)
    elif note is not None and note.run_digest != run_digest and not _is_left(job.out):
        raise place.is_there(job.out)
    ranks.tell("complete", "yes" if complete else "")
    if complete:
        job.report.complete(job.out)
        if options.verify and not options.dry_run:
            with with_collector():
                _proof(job)(job.out)
    return complete


def _is_left(out: Path) -> bool:
    """Whether OUT is what a killed run published, by its OUT.partial, which tells more than OUT itself."""
    return place.is_published(place.partial_folder(out), out)


def _is_same(job: Job, options: RunOptions) -> bool:
    """Whether an OUT that others may write is still what this command writes; ConversionError where it is not."""
    if options.dry_run:
        job.report.notes.append(f"{job.out} seems complete; others may write in it, so a run compares every byte first")
        return False
    logger.info("others may write in %s: comparing every byte with what this command writes", job.out)
    differs = compare.difference(job, options.checksums, options.workers)
    if differs is not None:
        raise ConversionError(
            f"{job.out} was written by the same command, and has been changed since by somebody who may write in it "
            f"({differs}); --overwrite makes it again"
        )
    job.report.notes.append(f"others may write in {job.out}: every byte was compared with what this command writes")
    return True


def _write(
    job: Job, options: RunOptions, chunks: Sequence[Chunk], source: Source, run_digest: str, needed: int
) -> None:  # fmt: skip
    started = time.monotonic()
    ranks = distributed.current()
    output = start.lay_out(job, ranks, run_digest, len(chunks), options.overwrite)
    before = needed if output.hold.complete else sum(w.length for writes in output.done.values() for w in writes)
    try:
        _convert(job, options, chunks, source, output, needed, run_digest)
    finally:
        output.hold.close()
    if ranks.rank == 0:
        job.report.finished(needed - before, time.monotonic() - started)


def _convert(
    job: Job, options: RunOptions, chunks: Sequence[Chunk], source: Source, output: start.Output, needed: int,
    run_digest: str,
) -> None:  # fmt: skip
    ranks, seen, hold = distributed.current(), watch.current(), output.hold
    stands = seen.check if seen is not None else lambda: None
    remaining = [(number, chunk) for number, chunk in enumerate(chunks) if number not in output.done]
    mine = sharing.share(remaining, [chunk.nbytes for _, chunk in remaining], ranks.size)[ranks.rank]
    target = Target(hold.shown, output.offsets, folder=hold.checkpoint)
    files = [each.file for each in job.targets]
    note = None if output.durable else lambda: hold.note_digest(run_digest)
    sums = RunningSums(hold.checkpoint, hold.shown, output.offsets if options.checksums else {})
    # Else bytes change after they are written, or others write some of them, and sums are taken of what is read back.
    in_order = options.checksums and not (job.plan.keeps_crcs or output.done or ranks.size > 1)
    try:
        with Durability(output.journal, target, files, assembly.folder_syncs(hold, files), note) as durability:
            _write_chunks(job, options, mine, source, output, target, durability, needed, sums if in_order else None)
            if ranks.rank == 0:
                ranks.settle()
                done = output.journal.load_all(len(chunks)) if ranks.size > 1 and remaining else output.done
                written = [write for writes in done.values() for write in writes]
                if hold.complete and open_to_others(hold.checkpoint):
                    _is_same(job, options)
                finishing.finish(
                    hold, job.targets, output.offsets, written, job.files, job.last, options.overwrite, durability,
                    options.workers if options.checksums else 0, _proof(job) if options.verify else None, stands,
                    sums.finish,
                )  # fmt: skip
    finally:
        target.close()
        sums.close()
    if ranks.rank:
        ranks.hear("finished")
    else:
        signals.leaves(str)
        ranks.tell("finished")


def _write_chunks(
    job: Job, options: RunOptions, mine: Sequence[tuple[int, Chunk]], source: Source, output: start.Output,
    target: Target, durability: Durability, needed: int, sums: RunningSums | None,
) -> None:  # fmt: skip
    """This rank's share of the chunks. Rank 0 comes back when all ranks have written theirs."""
    ranks, seen = distributed.current(), watch.current()
    before = counted = sum(w.length for writes in output.done.values() for w in writes)
    with progress.bar(needed, before) if ranks.rank == 0 else contextlib.nullcontext(lambda _: None) as advance:

        def show(count: int) -> None:
            nonlocal counted
            counted += count
            advance(count)

        ranks.shows(show)
        if ranks.rank == 0:
            signals.leaves(lambda: _left_behind(output.hold.path, counted, needed))

        def finished(number: int, _: object, written: list[Written]) -> None:
            output.done[number] = written
            durability.add(number, written)
            ranks.count(sum(w.length for w in written))

        said = execute(job.plan, mine, source, target, options.workers, finished, ranks.stop, sums)
        job.report.notes += [said] if said else []
        durability.stop()
        if ranks.size > 1:  # what this rank has written is noted before the others build upon it
            durability.flush()
        ranks.check()
        if seen is not None:
            seen.check()
        if ranks.rank:
            target.close()
            output.hold.close()  # nothing more is written here
        ranks.gather("written")


def _left_behind(partial: Path, done: int, needed: int) -> str:
    drop = shlex.join(["rm", "-r", str(partial)])
    return f"; {partial} takes the space of all {size(needed)}, of which {size(done)} are done; to drop it: {drop}"


def _proof(job: Job) -> Callable[[Path], None]:
    def prove(folder: Path) -> None:
        if job.prove is not None:
            text = job.prove(folder).replace(str(folder), str(job.out))
            job.report.proof += text.splitlines()

    return prove


def peak_bytes(workers: int, chunks: Sequence[Chunk]) -> int:
    """Peak memory of a run, in bytes: the interpreter with torch, and the buffers of each thread that finds work."""
    sizes = [chunk.nbytes for chunk in chunks]
    return BASE_BYTES + min(most_threads(workers, sum(sizes)), len(sizes)) * 3 * max(sizes, default=0)
