"""What a run is given: the options that both directions share, and a checked plan with all that stands around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from weights_conversion.engine.report import Report
from weights_conversion.layouts.plan import Plan
from weights_conversion.output.assembly import TargetFile

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class RunOptions:
    """What both directions share."""

    dtype: str = "keep"
    mtp: str = "keep"  # or "drop": without layers that predict further tokens
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

    `prove` compares the finished folder with the source; it returns a report, or raises ConversionError. `read` are
    folders and files that are read beside those of the plan and of `files`.
    """

    plan: Plan
    report: Report
    targets: Sequence[TargetFile]
    out: Path
    files: Mapping[str, bytes | Path] = field(default_factory=dict)
    last: Mapping[str, bytes] = field(default_factory=dict)
    prove: Callable[[Path], str] | None = None
    read: Sequence[Path] = ()
