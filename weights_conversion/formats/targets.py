"""The files of an import: a torch file per rank, or torch_dist's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from weights_conversion.config import ModelConfig, Parallelism
from weights_conversion.formats import bridge_files, dist_index, dist_writer, megatron, torch_files
from weights_conversion.formats.core_forms import Form
from weights_conversion.layouts import dist
from weights_conversion.layouts.plan import Plan
from weights_conversion.layouts.rank_files import Rank, rank_folder
from weights_conversion.output.assembly import TargetFile


def dist_targets(
    plan: Plan, config: ModelConfig, args: Mapping[str, Any], form: Form, vocabulary: int, dtype: torch.dtype,
    divisible_by: int, *, stacked: bool = True,
) -> tuple[list[TargetFile], dict[str, bytes | Path]]:  # fmt: skip
    """The .distcp files, and the small files around them."""
    targets = [dist_writer.DistFileTarget(file, refs) for file, refs in plan.targets.items()]
    is_hybrid = form.pattern is not None and config.hybrid_layer_pattern is None
    stacked = stacked and not is_hybrid
    names = list(dist.extra_states((step.instance for step in plan.steps), config, stacked=stacked))
    if is_hybrid:
        names = list(map(dist.hybrid_key, names))
    if is_hybrid or config.hybrid_layer_pattern is not None:
        names.append("output_layer._extra_state/shard_0_1")
    states, entries = dist_writer.extra_states(names)
    stated: dict[str, Any] | None = None if form.bridge else dict(args)
    if form.release == "0.19":
        common = dist_writer.common_state(stated, 0)
        entries[dist_writer.COMMON_STATE] = (dist_writer.EXTRA_STATES, len(states), len(common))
        states += common
    inside: dict[str, bytes] = {
        dist_writer.EXTRA_STATES: states,
        dist_index.METADATA: dist_writer.metadata(targets, entries),
        **dist_writer.small_files(stated, 0, apart=form.release != "0.19"),
    }
    files: dict[str, bytes | Path] = {f"{form.folder}/{name}": content for name, content in inside.items()}
    if form.bridge:
        files |= bridge_files.files(config, args, vocabulary, dtype, divisible_by)
    return list(targets), files


def rank_file(folder: str, parallel: Parallelism) -> Callable[[Rank], str]:
    """The path of each rank's file below the checkpoint's root."""
    return lambda rank: f"{folder}/{rank_folder(rank, parallel)}/model_optim_rng.pt"


def rank_targets(plan: Plan, args: Mapping[str, Any], iteration: int | str, *, flat: bool = False) -> list[TargetFile]:
    """One torch file per rank."""
    return [
        torch_files.TorchFileTarget(file, megatron.rank_content(refs, args, iteration, flat=flat), refs)
        for file, refs in plan.targets.items()
    ]
