"""Megatron-Core's torch_dist as a Format: .distcp files, and the small files around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from weights_conversion.files import fileio
from weights_conversion.formats import bridge_files, dist_index, dist_writer
from weights_conversion.formats.core_forms import Form
from weights_conversion.formats.format import Content, Output
from weights_conversion.formats.torch_dist import DistCheckpoint, open_dist
from weights_conversion.layouts import dist
from weights_conversion.layouts.plan import Plan
from weights_conversion.layouts.planners import plan_to_dist


@dataclass(frozen=True)
class DistFormat:
    """`stacked`: the layers along a leading axis. `written` is the weights' type, `divisible_by` what rows pad to."""

    form: Form = field(default_factory=Form)
    stacked: bool = True
    written: torch.dtype = torch.bfloat16
    divisible_by: int = 1
    name: str = "torch_dist"
    keeps_crcs: bool = True  # each item is a torch.save archive

    def opens(self, folder: Path) -> bool:
        return fileio.is_file(folder / dist_index.METADATA)

    def open(self, folder: Path, iteration: int | str = "release", weights: str = "model") -> DistCheckpoint:
        return open_dist(folder, iteration, weights)

    def plan(self, content: Content) -> Output:
        own = content.config.hybrid_layer_pattern is not None
        plan = plan_to_dist(
            content.architecture, content.config, content.located, content.source, content.target, content.vocabulary,
            content.dtype, self.form.folder, content.new_rows, stacked=self.stacked and not own,
            hybrid=self.form.pattern is not None and not own,
        )  # fmt: skip
        targets = [dist_writer.DistFileTarget(file, refs) for file, refs in plan.targets.items()]
        return Output(replace(plan, keeps_crcs=self.keeps_crcs), targets, self._small(content, plan, targets))

    def _small(
        self, content: Content, plan: Plan, targets: Sequence[dist_writer.DistFileTarget]
    ) -> dict[str, bytes | Path]:
        """The index, the args, and what Transformer-Engine is to find of each module."""
        form, config = self.form, content.config
        own = config.hybrid_layer_pattern is not None
        is_hybrid = form.pattern is not None and not own
        instances = (step.instance for step in plan.steps)
        names = list(dist.extra_states(instances, config, stacked=self.stacked and not own and not is_hybrid))
        if is_hybrid:
            names = list(map(dist.hybrid_key, names))
        if is_hybrid or own:
            names.append("output_layer._extra_state/shard_0_1")
        states, entries = dist_writer.extra_states(names)
        stated: dict[str, Any] | None = None if form.bridge else dict(content.args)
        if form.release == "0.19":
            common = dist_writer.common_state(stated, 0)
            entries[dist_writer.COMMON_STATE] = (dist_writer.EXTRA_STATES, len(states), len(common))
            states += common
        inside: dict[str, bytes] = {
            dist_writer.EXTRA_STATES: states,
            dist_index.METADATA: dist_writer.metadata(targets, entries),
            **dist_writer.small_files(stated, 0, apart=form.release != "0.19"),
        }
        files: dict[str, bytes | Path] = {f"{form.folder}/{name}": data for name, data in inside.items()}
        if form.bridge:
            files |= bridge_files.files(config, content.args, content.vocabulary, self.written, self.divisible_by)
        return files
