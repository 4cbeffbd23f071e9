"""Digests of all that decides an output: by them a run is continued, known to be done, and the same on every rank."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from weights_conversion import __version__
from weights_conversion.engine.job import Job, RunOptions
from weights_conversion.files import fileio, watch
from weights_conversion.layouts.placement import TensorRef


def plan_digest(job: Job, dtype: str) -> str:
    """Changes with everything that decides an output byte: sources (by their stamps), plan, options, releases."""
    plan = job.plan
    whole = (__version__, torch.__version__, dtype, plan.new_rows, plan.source, plan.target, plan.config)
    sha = hashlib.sha256(repr(whole).encode())
    for file in plan.source_files():
        sha.update(f"{file} {watch.Stamp.of(os.stat(file))}\n".encode())
    for step in plan.steps:
        sha.update(repr(step).encode())
    for target in job.targets:
        sha.update(f"{target.file} {target.refs} {getattr(target, 'content', None)}\n".encode())
    return sha.hexdigest()


def run_digest(plan: str, small: str, options: RunOptions) -> str:
    """Of the run: what another command would do otherwise, even where the weights are the same, is not continued."""
    return hashlib.sha256(f"{plan} {small} {options.checksums} {options.verify}".encode()).hexdigest()


def small_files(job: Job) -> str:
    """A digest of all that is written beside the weights."""
    small = hashlib.sha256()
    for name, content in sorted({**job.files, **job.last}.items()):
        data = fileio.read_whole(content, fileio.MAX_TOKENIZER_BYTES) if isinstance(content, Path) else content
        small.update(f"{name} {len(data)}\n".encode() + data)
    return small.hexdigest()


def view(job: Job, plan: str, small: str) -> dict[str, str]:
    """What decides the output, as digests: ranks that differ in one of them would write different checkpoints."""
    config = hashlib.sha256(repr(job.plan.config).encode()).hexdigest()
    return {
        "release": __version__,
        "the model's config": config,
        "configs and tokenizer files": small,
        "weight files (names, sizes, times) and plan": plan,
    }


def places(offsets: Mapping[TensorRef, int]) -> str:
    """Of where each tensor begins in its file."""
    return hashlib.sha256(repr(sorted((ref.file, ref.name, at) for ref, at in offsets.items())).encode()).hexdigest()
