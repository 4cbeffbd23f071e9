"""Digests of all that decides an output: by them a run is continued, known to be done, and the same on every rank."""

from __future__ import annotations

import hashlib
import marshal
import os
from collections.abc import Mapping
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from weights_conversion import __version__
from weights_conversion.engine.job import Job, RunOptions
from weights_conversion.files import fileio, watch
from weights_conversion.layouts.placement import Block, Placed, TensorRef
from weights_conversion.layouts.plan import CHUNK_BYTES


def plan_digest(job: Job, dtype: str) -> str:
    """Changes with everything that decides an output byte: sources (by their stamps), plan, options, releases."""
    plan = job.plan
    whole = (__version__, CHUNK_BYTES, torch.__version__, dtype, plan.new_rows, plan.source, plan.target, plan.config)
    sha = hashlib.sha256(repr(whole).encode())
    for file in plan.source_files():
        sha.update(f"{file} {watch.Stamp.of(os.stat(file))}\n".encode())
    said: dict[int, bytes] = {}  # of the few rows that the steps share
    for step in plan.steps:
        row = step.instance.row
        sha.update(said.get(id(row)) or said.setdefault(id(row), repr(row).encode()))
        sha.update(f"{step.instance.index} {step.instance.offset} {step.units} {step.added}\n".encode())
        for side in (step.source, step.target):
            for placed in side:
                _add_placed(sha, placed)
    for target in job.targets:
        sha.update(f"{target.file} {_without_refs(getattr(target, 'content', None))}\n".encode())
        dtypes = {ref.dtype: str(ref.dtype) for ref in target.refs}
        refs = tuple((ref.name, dtypes[ref.dtype], ref.shape) for ref in target.refs)
        sha.update(marshal.dumps(refs, _BY_VALUE))
    return sha.hexdigest()


# All of a block but the type of its tensor: plain values, which marshal writes a hundred times as fast as repr does.
_OF_BLOCK = attrgetter(
    *(f"ref.{each.name}" for each in fields(TensorRef) if each.compare and each.name != "dtype"),
    *(each.name for each in fields(Block) if each.name != "ref"),
)
_BY_VALUE = 2  # marshal's last version whose bytes do not depend on which equal objects are one


def _add_placed(sha: hashlib._Hash, placed: Placed) -> None:
    """Feeds every field of a placed tensor, of which there are hundreds of thousands with a million blocks."""
    blocks = tuple(tuple(map(_OF_BLOCK, copy)) for copy in placed.copies)
    dtypes = {block.ref.dtype for copy in placed.copies for block in copy}
    stored = str(*dtypes) if len(dtypes) == 1 else str([block.ref.dtype for copy in placed.copies for block in copy])
    said = (placed.name, str(placed.dtype), stored, placed.rows, placed.columns, blocks)
    try:
        sha.update(marshal.dumps(said, _BY_VALUE))
    except ValueError:  # a decoder among them
        sha.update(repr(said).encode())
    for delta in placed.deltas:
        sha.update(f"{delta.scale}\n".encode())
        _add_placed(sha, delta.below)
        _add_placed(sha, delta.above)


def _without_refs(content: Any) -> Any:
    """The content of a file without its tensors, which are said by name."""
    if isinstance(content, Mapping):
        return {key: _without_refs(value) for key, value in content.items() if not isinstance(value, TensorRef)}
    return content


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
