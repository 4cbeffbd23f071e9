"""What both command lines share: option spellings and common options. Imports no torch."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

from weights_conversion.architectures import FAMILIES
from weights_conversion.cli import arguments
from weights_conversion.files import fileio


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def iteration(text: str) -> int | str:
    """A number that names iter_0000000 or a later one, or "release"."""
    if text != "release" and not (text.isascii() and text.isdecimal() and len(text) <= 12):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor release")
    return text if text == "release" else int(text)


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def cores() -> int:
    """Cores that this process may use (a batch job's share, not the machine's), at most 4."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(available, 4))


def window(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


# Flags that state a value which a Megatron checkpoint has lost, by ModelConfig field.
FIELDS: dict[str, Callable[[str], Any]] = {
    "rope_theta": positive_float,
    "rope_scaling_factor": positive_float,
    "layernorm_epsilon": positive_float,
    "max_position_embeddings": positive,
}


_MEANINGS = {
    "rope_theta": "base of the rotary frequencies",
    "rope_scaling_factor": "by which positions are divided (linear scaling)",
    "layernorm_epsilon": "epsilon of the norms",
    "max_position_embeddings": "longest context",
}


def add_fields(parser: argparse.ArgumentParser) -> None:
    values = parser.add_argument_group(
        "values that a Megatron checkpoint may have lost", "they outrank its manifest and its args"
    )
    for name, kind in FIELDS.items():
        values.add_argument(f"--{name}", type=kind, metavar="X", help=_MEANINGS[name])
    values.add_argument("--sliding_window_size", type=window, metavar="N", help="window of attention; 0: no window")


def stated_fields(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """The ModelConfig fields that the user has stated."""
    fields = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    if args.sliding_window_size is not None:
        if args.model is not None and not FAMILIES[args.model].windowed and args.sliding_window_size:
            windowed = " and ".join(f"{name}'s" for name, family in FAMILIES.items() if family.windowed)
            parser.error(f"--sliding_window_size is {windowed}, {args.model} has none")
        fields["sliding_window"] = args.sliding_window_size or None
    return fields


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(began=time.monotonic())
    work = parser.add_argument_group("the work")
    work.add_argument(
        "--dtype", type=arguments.dtype, choices=("keep", "bfloat16", "float16", "float32"), default="keep",
        help="type of the written weights, or bf16, fp16, fp32 (default: as they are)",
    )  # fmt: skip
    work.add_argument(
        "--mtp", choices=("keep", "drop"), default="keep",
        help="layers that predict further tokens (multi-token prediction): kept, or left out (default: keep)",
    )  # fmt: skip
    work.add_argument("--dry-run", action="store_true", help="print the plan (files, bytes, memory, disk) and stop")
    work.add_argument("--overwrite", action="store_true", help="replace an existing output")
    work.add_argument(
        "--workers", type=positive, default=cores(), metavar="N", help="threads (default: cores, at most 4)"
    )
    work.add_argument(
        "--verify", action="store_true",
        help="afterwards, prove the output: weights bit by bit, configs, and a forward pass, against the source; what "
        "fails is named OUT.unverified",
    )  # fmt: skip
    work.add_argument(
        "--json", type=arguments.path, metavar="FILE", help="write the report, or what was wrong, as JSON"
    )  # fmt: skip
    work.add_argument("--checksums", action="store_true", help="write checksums.sha256 into the output")
    work.add_argument(
        "--allow-inconsistent", action="store_true",
        help="where ranks hold different values of one parameter, take rank 0's instead of refusing",
    )  # fmt: skip
    prediction = parser.add_argument_group("prediction of the time, with --dry-run")
    prediction.add_argument(
        "--ranks", type=positive, metavar="R",
        help="with --dry-run: predict the time on R ranks of torchrun or srun (default: some numbers of ranks)",
    )  # fmt: skip
    prediction.add_argument(
        "--rank-rate", type=positive_float, metavar="GB/s",
        help="for the prediction: what one rank converts, as the report of a one-process run says (default: 1)",
    )  # fmt: skip
    prediction.add_argument(
        "--filesystem-bandwidth", type=positive_float, metavar="GB/s",
        help="for the prediction: how fast the filesystem is written while as much is read from it",
    )  # fmt: skip


RUN_OPTIONS = (
    "dtype", "mtp", "dry_run", "overwrite", "workers", "allow_inconsistent", "checksums", "verify", "ranks",
    "rank_rate", "filesystem_bandwidth", "began",
)  # fmt: skip


def check_common(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with exit code 2 where what `add_common` has added does not fit together."""
    if args.json is not None and not fileio.is_folder(args.json.absolute().parent):
        parser.error(f"--json {args.json}: its folder does not exist")
    given = [name for name in ("ranks", "rank_rate", "filesystem_bandwidth") if getattr(args, name) is not None]
    if given and not args.dry_run:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        parser.error(f"{options} predicts a time with --dry-run; start a job of many ranks with torchrun or srun")


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of engine.run.RunOptions, from what `add_common` has added."""
    return {name: getattr(args, name) for name in RUN_OPTIONS if getattr(args, name) is not None}
