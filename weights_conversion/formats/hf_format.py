"""Hugging Face's folder of weights as a Format: safetensors are written, torch files are read too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from weights_conversion.formats import huggingface
from weights_conversion.formats.format import Content, Output
from weights_conversion.layouts.placement import Placed
from weights_conversion.layouts.planners import plan_to_hf


@dataclass(frozen=True)
class HuggingFaceFormat:
    """`shards` files, balanced by bytes; `packed`: all experts of a layer in one tensor."""

    shards: int = 1
    packed: bool = False
    name: str = "safetensors"
    keeps_crcs: bool = False

    def opens(self, folder: Path) -> bool:
        weights = (folder / name for name in huggingface.WEIGHT_FILES)
        return (folder / "config.json").is_file() and any(path.is_file() for path in weights)

    def open(self, folder: Path, iteration: int | str = "release", weights: str = "model") -> dict[str, Placed]:
        return huggingface.read_hf(folder)

    def plan(self, content: Content) -> Output:
        plan = plan_to_hf(
            content.architecture, content.config, content.located, content.source, content.target, self.shards,
            content.dtype, packed=self.packed,
        )  # fmt: skip
        targets = [huggingface.SafetensorsTarget(file, refs) for file, refs in plan.targets.items()]
        index = {"model.safetensors.index.json": huggingface.Index(targets).text().encode()}
        return Output(plan, targets, index if len(targets) > 1 else {})
