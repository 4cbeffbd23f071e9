"""How many layers each pipeline stage of a Megatron-Core checkpoint of rank files holds, where they are unequal.

Megatron-Core deals layers to the stages in turn, chunk after chunk, and by args gives each of them another number
(get_num_layers_to_build in megatron/core/transformer/transformer_block.py, pipeline_parallel_layer_layout.py). The
files show the same numbers; both must agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from weights_conversion.config import Parallelism
from weights_conversion.errors import ConversionError
from weights_conversion.formats.hybrid import pattern_of
from weights_conversion.layouts.rank_files import chunk_key
from weights_conversion.mapping.hybrid import PATTERN, stages

LAYOUT = "pipeline_model_parallel_layout"
_FIRST = ("decoder_first_pipeline_num_layers", "num_layers_in_first_pipeline_stage", "first_pipeline_num_layers")
_LAST = ("decoder_last_pipeline_num_layers", "num_layers_in_last_pipeline_stage", "last_pipeline_num_layers")
_EMBEDDING, _LOSS = "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"
ARGS = (LAYOUT, *_FIRST, *_LAST, _EMBEDDING, _LOSS)
_LAYER = re.compile(r"(model\d*)\.decoder\.layers\.(\d+)\.")
_GROUP, _CHARACTER = re.compile(r"\(([^)]+)\)\*(\d+)"), re.compile(r"(.)\*(\d+)")
_LONGEST = 1 << 16  # characters of a layout once its products are written out


def layers_of(
    names: Mapping[int, Iterable[str]], args: Mapping[str, Any], lost: Mapping[str, str], parallel: Parallelism,
    folder: Path,
) -> tuple[int, ...]:  # fmt: skip
    """Layers of each chunk of each stage, in the order of the layers; empty where all hold the same number.

    `names`: pipeline stage -> the names of its tensors, "modelN." in front; `lost`: args that are no plain values, and
    their types. Raises ConversionError where args and files disagree.
    """
    if LAYOUT in lost:
        raise ConversionError(f"the args of {folder} have {LAYOUT} of type {lost[LAYOUT]}, where text was expected")
    held, stated = _held(names, parallel), _stated(args, parallel, folder)
    uneven = len(set(held)) > 1
    if stated is None:  # no args that say how many layers there are at all
        return held if uneven else ()
    if (uneven or len(set(stated)) > 1) and held != stated:
        flags = ", ".join(f"{name} {args[name]!r}" for name in ARGS if args.get(name) not in (None, False))
        raise ConversionError(
            f"the pipeline stages of {folder} hold {_shown(held, parallel)} layers, where its args (num_layers "
            f"{args['num_layers']}, {parallel}{', ' if flags else ''}{flags}) say {_shown(stated, parallel)}; was the "
            "copy complete, and are all files of one run?"
        )
    return held if uneven else ()


def _shown(layers: tuple[int, ...], parallel: Parallelism) -> str:
    """Numbers of layers by stage, those of a stage's chunks joined by +."""
    stages = (layers[stage :: parallel.pipeline] for stage in range(parallel.pipeline))
    return ", ".join("+".join(map(str, chunks)) for chunks in stages)


def _held(names: Mapping[int, Iterable[str]], parallel: Parallelism) -> tuple[int, ...]:
    found: dict[tuple[str, int], set[str]] = {}
    for stage, stored in names.items():
        for name in stored:
            if match := _LAYER.match(name):
                found.setdefault((match[1], stage), set()).add(match[2])
    return tuple(
        len(found.get((chunk_key(chunk, parallel), stage), ()))
        for chunk in range(parallel.virtual)
        for stage in range(parallel.pipeline)
    )


def _stated(args: Mapping[str, Any], parallel: Parallelism, folder: Path) -> tuple[int, ...] | None:
    """The numbers by Megatron-Core's rule; None where args do not say how many layers there are."""
    count = args.get("num_layers")
    if not isinstance(count, int):
        return None
    layout = args.get(LAYOUT)
    if layout is not None:
        return _laid_out(layout, parallel, folder)
    pattern = pattern_of(args)
    if pattern is not None and (cut := stages(pattern)):
        if len(cut) != parallel.pipeline * parallel.virtual:
            raise ConversionError(
                f"the args of {folder} have {PATTERN} {pattern[:60]!r}, which has {len(cut)} stages, where {parallel} "
                "was expected"
            )
        return cut
    first, last = _number(args, _FIRST, folder), _number(args, _LAST, folder)
    if first is not None or last is not None:
        return _ends(count, first, last, parallel)
    extra = bool(args.get(_EMBEDDING)), bool(args.get(_LOSS))
    each = (count + sum(extra)) // (parallel.pipeline * parallel.virtual)
    layers = [each] * (parallel.pipeline * parallel.virtual)
    layers[0] -= extra[0]
    layers[-1] -= extra[1]
    return tuple(layers)


def _number(args: Mapping[str, Any], names: Iterable[str], folder: Path) -> int | None:
    for name in names:
        value = args.get(name)
        if value is not None:
            if type(value) is int and 0 <= value < 1 << 31:
                return value
            raise ConversionError(f"the args of {folder} have {name} {value!r}, where a number of layers was expected")
    return None


def _ends(count: int, first: int | None, last: int | None, parallel: Parallelism) -> tuple[int, ...]:
    """The first and the last stage have layers of their own number, the others share what is left."""
    stages = [0] * parallel.pipeline
    between = parallel.pipeline - (first is not None) - (last is not None)
    if between > 0:
        stages = [max(count - (first or 0) - (last or 0), 0) // between] * parallel.pipeline
    if first is not None:
        stages[0] = first
    if last is not None:
        stages[-1] = last
    return tuple(layers // parallel.virtual for _ in range(parallel.virtual) for layers in stages)


def _laid_out(layout: Any, parallel: Parallelism, folder: Path) -> tuple[int, ...]:
    """A layout as "Ett|(tt|)*2tL": a character an embedding, a layer (t) or the loss, a bar between stages."""
    problem = f"the args of {folder} have {LAYOUT} {str(layout)[:80]!r}, "
    text = _written_out(layout.replace(",", "")) if isinstance(layout, str) else None
    if text is None or not re.fullmatch(r"[EtmL|]+", text):
        raise ConversionError(f"{problem}where a layout as Ett|tttt|ttL was expected")
    stages = text.split("|")
    if len(stages) != parallel.pipeline * parallel.virtual:
        raise ConversionError(f"{problem}which has {len(stages)} stages, where {parallel} was expected")
    return tuple(stage.count("t") for stage in stages)


def _written_out(text: str) -> str | None:
    """`text` without products; None where that is longer than any layout."""
    for pattern in (_GROUP, _CHARACTER):
        if sum(len(each[1]) * int(each[2][:9]) for each in pattern.finditer(text)) > _LONGEST:
            return None
        text = pattern.sub(lambda match: match[1] * int(match[2]), text)
    return text
