"""Runs a checked plan from end to end: space, consistency, writing, resuming, finishing, reporting."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from weights_conversion import assembly, progress
from weights_conversion.config import ConversionError
from weights_conversion.execute import Source, Target, Written, execute, inconsistencies
from weights_conversion.placement import Placed
from weights_conversion.plan import CHUNK_BYTES, Chunk, Plan
from weights_conversion.progress import Report

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


@dataclass(frozen=True)
class Job:
    """A checked plan with everything that has to be written around its tensors."""

    plan: Plan
    report: Report
    targets: Sequence[assembly.TargetFile]
    out: Path
    files: Mapping[str, bytes | Path] = field(default_factory=dict)
    last: Mapping[str, bytes] = field(default_factory=dict)


def run(job: Job, options: RunOptions) -> Report:
    """Executes a job, or only describes it where a dry run was asked for."""
    report = job.report
    needed = assembly.output_bytes(job.targets)
    chunks = job.plan.chunks()
    report.planned(job.out, needed, [target.file for target in job.targets], memory(options.workers))
    source = Source()
    try:
        if not options.dry_run:
            assembly.check_space(job.out, needed)
        differences = inconsistencies(job.plan, source)
        if differences and not options.allow_inconsistent:
            raise ConversionError(*differences)
        report.warnings += differences
        if options.dry_run:
            return report
        _write(job, options, chunks, source, needed)
    finally:
        source.close()
    return report


def _write(job: Job, options: RunOptions, chunks: Sequence[Chunk], source: Source, needed: int) -> None:
    started = time.monotonic()
    plan_digest = assembly.digest(job.plan, job.targets, options.dtype)
    resume = assembly.prepare(job.out, plan_digest)
    held = assembly.lock(job.out)
    offsets = assembly.lay_out(job.out, job.targets, plan_digest, resume)
    refs = [ref for target in job.targets for ref in target.refs]
    journal = assembly.Journal(assembly.partial_folder(job.out) / "journal", refs)
    done = journal.load() if resume else {}
    if resume:
        job.report.notes.append(f"continued an interrupted run: {len(done)} of {len(chunks)} parts were good")
    target = Target(assembly.partial_folder(job.out) / "checkpoint", offsets)
    try:
        with progress.bar(needed, sum(w.length for writes in done.values() for w in writes)) as advance:

            def finished(number: int, _: object, written: list[Written]) -> None:
                done[number] = written
                journal.add(number, written, target.sync)
                advance(sum(w.length for w in written))

            try:
                execute(job.plan, assembly.remaining(chunks, done), source, target, options.workers, finished)
            finally:
                journal.flush(target.sync)
    finally:
        target.close()
    written = [write for writes in done.values() for write in writes]
    assembly.finish(job.out, job.targets, offsets, written, job.files, job.last, options.overwrite)
    if held >= 0:
        os.close(held)
    job.report.finished(needed, time.monotonic() - started)


def memory(workers: int) -> int:
    """Peak memory of a run, in bytes: the interpreter with torch, and each worker's buffers."""
    return BASE_BYTES + workers * 3 * CHUNK_BYTES


def main_dtype(tensors: Sequence[Placed]) -> torch.dtype:
    """The type that most of the bytes have."""
    sizes: dict[torch.dtype, int] = {}
    for placed in tensors:
        sizes[placed.dtype] = sizes.get(placed.dtype, 0) + placed.rows * placed.row_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])
