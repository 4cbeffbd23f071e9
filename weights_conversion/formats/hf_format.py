"""Hugging Face's folder of weights as a Format: safetensors are written, torch files are read too."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from weights_conversion.files import fileio
from weights_conversion.formats import huggingface
from weights_conversion.formats.format import Content, Output
from weights_conversion.layouts.placement import Placed
from weights_conversion.layouts.planners import plan_to_hf


@dataclass(frozen=True)
class HuggingFaceFormat:
    """`shards` files, balanced by bytes; the others as plan_to_hf has them."""

    shards: int = 1
    packed: Collection[str] = ()
    own_types: Collection[str] = ()
    others: Sequence[Placed] = ()
    name: str = "safetensors"
    keeps_crcs: bool = False

    def opens(self, folder: Path) -> bool:
        weights = (folder / name for name in huggingface.WEIGHT_FILES)
        return fileio.is_file(folder / "config.json") and any(fileio.is_file(path) for path in weights)

    def open(self, folder: Path, iteration: int | str = "release", weights: str = "model") -> dict[str, Placed]:
        return huggingface.read_hf(folder)

    def plan(self, content: Content) -> Output:
        plan = plan_to_hf(
            content.architecture, content.config, content.located, content.source, content.target, self.shards,
            content.dtype, packed=self.packed, own_types=self.own_types, others=self.others,
        )  # fmt: skip
        targets = [huggingface.SafetensorsTarget(file, refs) for file, refs in plan.targets.items()]
        index = {"model.safetensors.index.json": huggingface.Index(targets).text().encode()}
        return Output(plan, targets, index if len(targets) > 1 else {})
