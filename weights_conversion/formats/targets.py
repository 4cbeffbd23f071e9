"""The files of an import: a torch file per rank, or torch_dist's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weights_conversion.config import ModelConfig, Parallelism
from weights_conversion.formats import dist_index, dist_writer, megatron, torch_files
from weights_conversion.layouts import dist
from weights_conversion.layouts.plan import Plan
from weights_conversion.layouts.rank_files import Rank, rank_folder
from weights_conversion.output.assembly import TargetFile


def dist_targets(
    plan: Plan, config: ModelConfig, args: Mapping[str, Any], *, stacked: bool = True
) -> tuple[list[TargetFile], dict[str, bytes | Path]]:
    """The .distcp files, and the small files around them."""
    targets = [dist_writer.DistFileTarget(file, refs) for file, refs in plan.targets.items()]
    names = dist.extra_states((step.instance for step in plan.steps), config, stacked=stacked)
    states, entries = dist_writer.extra_states(list(names))
    files: dict[str, bytes | Path] = {
        f"release/{dist_writer.EXTRA_STATES}": states,
        f"release/{dist_index.METADATA}": dist_writer.metadata(targets, entries),
    }
    files |= {f"release/{name}": content for name, content in dist_writer.small_files(dict(args), 0).items()}
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
