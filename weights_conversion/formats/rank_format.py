"""Megatron's rank files (--ckpt-format torch) as a Format: one torch file per rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from weights_conversion.config import Parallelism
from weights_conversion.files import fileio
from weights_conversion.formats import megatron, torch_files
from weights_conversion.formats.format import Content, Output
from weights_conversion.layouts.planners import plan_to_megatron
from weights_conversion.layouts.rank_files import Rank, rank_folder, stage_ranks
from weights_conversion.mapping.dialects import MEGATRON_CORE, MEGATRON_CORE_EACH


@dataclass(frozen=True)
class RankFormat:
    """`grouped`: experts are stored for TEGroupedMLP, not one by one."""

    parallel: Parallelism = Parallelism()
    grouped: bool = False
    name: str = "torch"
    keeps_crcs: bool = True  # torch.save archives keep one of every record

    def opens(self, folder: Path) -> bool:
        return not fileio.is_file(folder / ".metadata")

    def open(self, folder: Path, iteration: int | str = "release", weights: str = "model") -> megatron.RankFiles:
        return megatron.open_rank_files(folder, iteration, weights)

    def plan(self, content: Content) -> Output:
        core = content.target is MEGATRON_CORE
        each = content.config.moe is not None and not self.grouped
        plan = plan_to_megatron(
            content.architecture, content.config, content.located, content.source,
            MEGATRON_CORE_EACH if each else content.target, self.parallel, content.vocabulary, content.dtype,
            rank_file("release", self.parallel), content.new_rows,
        )  # fmt: skip
        iteration = 0 if core else "release"
        writers = _writers("release", self.parallel)
        targets = [
            torch_files.TorchFileTarget(
                file,
                megatron.rank_content(refs, {**content.args, "rank": writers[file]}, iteration, flat=core),
                refs,
            )
            for file, refs in plan.targets.items()
        ]
        return Output(replace(plan, keeps_crcs=self.keeps_crcs), targets)


def _writers(folder: str, parallel: Parallelism) -> dict[str, int]:
    """Each rank file's number, as training leaves it in args.rank: a file in another's folder is told by it alone.

    Of the experts' two halves, or of two halves of any matrix, shapes and names are the same.
    """
    ranks = (Rank(tp, pp, ep) for pp in range(parallel.pipeline) for tp, ep in stage_ranks(parallel))
    return {rank_file(folder, parallel)(rank): number for number, rank in enumerate(ranks)}


def rank_file(folder: str, parallel: Parallelism) -> Callable[[Rank], str]:
    """The path of each rank's file below the checkpoint's root."""
    return lambda rank: f"{folder}/{rank_folder(rank, parallel)}/model_optim_rng.pt"
