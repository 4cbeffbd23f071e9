"""Layers that predict further tokens (multi-token prediction), left out of a source where the user asks for it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from weights_conversion.config import ModelConfig
from weights_conversion.formats.megatron import RankFiles
from weights_conversion.formats.torch_dist import DistCheckpoint
from weights_conversion.layouts.placement import Placed

KEEP, DROP = "keep", "drop"
_HF_LAYER = re.compile(r"(?:model|model\.language_model)\.layers\.(\d{1,6})\.")
_MEGATRON = re.compile(r"(?:model\d*\.)?mtp\.")
_Value = TypeVar("_Value")


def without(config: ModelConfig, tensors: Mapping[str, Placed]) -> tuple[ModelConfig, dict[str, Placed], str]:
    """A Hugging Face model without them, and a note. They are layers behind the last one, or `mtp.*`."""
    left = {
        name
        for name in tensors
        if name.startswith("mtp.") or ((at := _HF_LAYER.match(name)) and int(at[1]) >= config.num_layers)
    }
    kept = {name: tensor for name, tensor in tensors.items() if name not in left}
    return dataclasses.replace(config, mtp_num_layers=0), kept, _note(len(left))


def without_in_files(files: RankFiles | DistCheckpoint) -> tuple[RankFiles | DistCheckpoint, str]:
    """A Megatron checkpoint without them, and a note. The stage that has them embeds too, and need not any more."""
    args = {**files.args, "mtp_num_layers": 0}
    if isinstance(files, DistCheckpoint):
        kept, left = _apart(files.stored)
        adapters, more = _apart(files.adapters)
        return dataclasses.replace(files, args=args, stored=kept, adapters=adapters), _note(len(left) + len(more))
    names: set[str] = set()
    ranks = {}
    for rank, tensors in files.ranks.items():
        ranks[rank], left = _apart(tensors)
        names |= left
        if left and rank.pipeline:
            tables = [name for name in tensors if name.endswith(".embedding.word_embeddings.weight")]
            ranks[rank] = {name: ref for name, ref in ranks[rank].items() if name not in tables}
    return dataclasses.replace(files, args=args, ranks=ranks), _note(len(names))


def _apart(tensors: Mapping[str, _Value]) -> tuple[dict[str, _Value], set[str]]:
    left = set(_of_prediction(tensors))
    return {name: tensor for name, tensor in tensors.items() if name not in left}, left


def _of_prediction(names: Iterable[str]) -> Iterable[str]:
    return (name for name in names if _MEGATRON.match(name))


def _note(count: int) -> str:
    if not count:
        return "prediction the source has no layers that predict further tokens (--mtp drop)"
    return f"prediction the layers that predict further tokens are left out (--mtp drop): {count} tensors"
