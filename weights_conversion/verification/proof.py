"""The whole verification: open both sides, compare configs, weights and forward passes, explain."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from weights_conversion.configs import moe
from weights_conversion.files import fileio
from weights_conversion.files.fileio import MAX_INDEX_BYTES, is_there, read_whole, sha256
from weights_conversion.files.watch import Watch, watching
from weights_conversion.formats import integrity
from weights_conversion.mapping.dialects import HF
from weights_conversion.output.file_sums import NAME as CHECKSUMS
from weights_conversion.sources.detect import detect
from weights_conversion.verification import causes, exact, together
from weights_conversion.verification.hf_values import misread
from weights_conversion.verification.padding import check_padding
from weights_conversion.verification.report import ConfigField, Verification
from weights_conversion.verification.sides import (
    NUMBER_FIELDS,
    SHAPE_FIELDS,
    Model,
    adopt_assumed,
    choose_family,
    common_vocabulary,
    open_model,
    same_shapes,
    shown,
)


def prove(
    source: Path, checkpoint: Path, model: str | None, *, workers: int, exact_only: bool,
    source_iters: int | str | None, checkpoint_iters: int | str | None, allow_inconsistent: bool,
    fields: Mapping[str, Any] | None, true_vocab_size: int | None, weights: str,
    adapter: Path | None, adapter_alpha: float | None, mtp: str = "keep", unread: bool = True,
) -> Verification:  # fmt: skip
    """See weights_conversion.verify.verify."""
    started = time.monotonic()
    with watching(Watch("nothing is proven")) as seen:
        result = _prove(
            source, checkpoint, model, workers, exact_only, source_iters, checkpoint_iters, allow_inconsistent, fields,
            true_vocab_size, weights, adapter, adapter_alpha, mtp, unread,
        )  # fmt: skip
        seen.check()  # what has changed meanwhile is neither the same nor different
    result.seconds = time.monotonic() - started
    return result


def _prove(
    source: Path, checkpoint: Path, model: str | None, workers: int, exact_only: bool, source_iters: int | str | None,
    checkpoint_iters: int | str | None, allow_inconsistent: bool, fields: Mapping[str, Any] | None,
    true_vocab_size: int | None, weights: str, adapter: Path | None,
    adapter_alpha: float | None, mtp: str = "keep", unread: bool = True,
) -> Verification:  # fmt: skip
    one_side, other_side = detect(source, source_iters), detect(checkpoint, checkpoint_iters)
    source, source_iters = one_side.root, one_side.iteration
    checkpoint, checkpoint_iters = other_side.root, other_side.iteration
    family = model or choose_family(source, checkpoint, source_iters, checkpoint_iters)
    one, two = common_vocabulary(
        open_model(
            source,
            family,
            source_iters,
            fields=fields,
            true_vocab_size=true_vocab_size,
            weights=weights,
            adapter=adapter,
            adapter_alpha=adapter_alpha,
            mtp=mtp,
        ),
        open_model(checkpoint, family, checkpoint_iters, mtp=mtp),
    )
    for side in (one, two) if unread else (two,):
        if side.files is not None:
            side.files.check_unread()
    of_source, of_checkpoint = adopt_assumed(one, two), adopt_assumed(two, one)
    result = Verification(family, of_source, of_checkpoint, ())
    _compare_configs(result, one, two)
    result.notes += _router_types(one, two)
    result.notes += [f"source: {note}" for note in (*one_side.notes, *one.contradicted, *one.notes)]
    result.notes += [f"checkpoint: {note}" for note in (*other_side.notes, *two.notes)]
    result.config_problems += [f"the checkpoint contradicts itself: {sentence}" for sentence in two.contradicted]
    for name, side in (("source", one), ("checkpoint", two)):
        problems, unknown = misread(side.path, side.config) if side.dialect.name == HF.name else ([], [])
        result.config_problems += [f"{name}: {sentence}" for sentence in problems]
        result.notes += [f"{name}: {sentence}" for sentence in unknown]
    if same_shapes(of_source.config, of_checkpoint.config):
        _compare_weights(result, workers, exact_only, allow_inconsistent)
    result.checksums = check_checksums(checkpoint, workers)
    stated = integrity.problems(two.files.folder, workers) if two.files is not None else None
    if stated is not None:
        result.checksums = [*(result.checksums or []), *stated]
    return result


def _router_types(one: Model, two: Model) -> list[str]:
    """A note on routers that two runs compute in different types, which a Hugging Face side does not state."""
    stated = [model.files.args for model in (one, two) if model.files is not None and model.config.moe is not None]
    found = [args[moe.ROUTER_DTYPE] for args in stated if moe.ROUTER_DTYPE in args]
    if len(found) < 2 or found[0] == found[1]:
        return []
    return [
        f"moe_router_dtype is {found[0]} in the source and {found[1]} in the checkpoint: scores of experts are rounded "
        "otherwise, so that a token between two experts may get another one; --moe-router-dtype of a run decides"
    ]


def _compare_weights(result: Verification, workers: int, exact_only: bool, allow_inconsistent: bool) -> None:
    pair = exact.pair(result.source, result.checkpoint)
    if exact_only:
        found = exact.compare(pair, workers)
    else:
        found, result.numeric = together.compare(pair, workers)
    result.exact = found
    if allow_inconsistent:
        result.notes += found.source_copies
        found.source_copies = []
    for model, name in ((result.source, "source"), (result.checkpoint, "checkpoint")):
        problems, kinds = check_padding(pair, model)
        result.notes += [f"{name}: {sentence}" for sentence in kinds]
        if model is result.checkpoint and model.release:
            found.padding += problems
        else:  # training moves these rows, and a source is taken as it is
            result.notes += [f"{name}: {sentence}" for sentence in problems]
    if any(of_source and of_checkpoint for of_source, of_checkpoint in found.nonfinite.values()):
        result.notes.append("both sides hold NaN or infinities; the models may be broken alike")
    result.causes, places = causes.explain(pair, found)
    result.notes += places


def _compare_configs(result: Verification, one: Model, two: Model) -> None:
    """`one` and `two` as their files say it; a value that only one side states is no disagreement, but noted."""
    fields = []
    for name in (*SHAPE_FIELDS, *NUMBER_FIELDS, "vocab_size"):
        of_source, of_checkpoint = getattr(one.config, name), getattr(two.config, name)
        assumed = tuple(side for side, model in (("source", one), ("checkpoint", two)) if name in model.assumed)
        same = of_source == of_checkpoint
        if name == "vocab_size" and not same:
            # Rows that an import added for new tokens: they are checked as padding is.
            same = two.dialect.megatron and of_checkpoint > of_source
            if same:
                more = of_checkpoint - of_source
                result.notes.append(f"checkpoint: {of_checkpoint} rows are tokens, {more} more than the source has")
        if not same and assumed and name != "vocab_size":
            stated = one if "checkpoint" in assumed else two
            silent = " and the ".join(assumed)
            value = shown(getattr(stated.config, name))
            result.notes.append(f"{name} is {value} by one side; the {silent} does not state it")
            same = True
        if not same:
            result.config_problems.append(
                f"{name} is {shown(of_source, of_checkpoint)} in the source and "
                f"{shown(of_checkpoint, of_source)} in the checkpoint"
            )
        fields.append(ConfigField(name, of_source, of_checkpoint, same, assumed))
    result.config = tuple(fields)


def check_checksums(folder: Path, workers: int) -> list[str] | None:
    """What is wrong by the checkpoint's own checksums.sha256, or None where it has none.

    Raises ConversionError for a listing that is no regular file: whoever put it there would switch the check off.
    """
    listing = folder / CHECKSUMS
    if not is_there(listing):
        return None
    problems, wanted = [], []
    text = read_whole(listing, MAX_INDEX_BYTES).decode("utf-8", "replace")
    for number, line in enumerate(text.splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
        path = Path(match[2]) if match else Path()
        if not match or path.is_absolute() or ".." in path.parts:
            problems.append(f"{CHECKSUMS} line {number} is not '<sha256>  <path below this folder>'")
        elif not fileio.is_file(folder / path):
            problems.append(f"{path} is missing, {CHECKSUMS} names it")
        else:
            wanted.append((path, match[1].lower()))
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda entry: sha256(folder / entry[0]), wanted)
        problems += [
            f"{path} is not what {CHECKSUMS} says: it was changed after it was written"
            for (path, expected), actual in zip(wanted, found, strict=True)
            if actual != expected
        ]
    return problems
