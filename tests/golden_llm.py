"""The golden cases that Megatron-LLM wrote, and what each of them is made of."""

from __future__ import annotations

from typing import Any

import tiny_models as tm
import torch
from conftest import GOLDEN
from naive_layout import meta_to_huggingface

# core-* and bridge-* are Megatron-Core's: test_golden_core.py, and the tests of adapters
CASES = sorted(
    path.parent.name for path in GOLDEN.glob("*/case.json") if not path.parent.name.startswith(("core-", "bridge-"))
)
FOLDERS = sorted(f"{case}/{path.name}" for case in CASES for path in (GOLDEN / case).glob("megatron-*"))


class Case:
    def __init__(self, name: str):
        self.folder = GOLDEN / name
        self.facts = tm.read_json(self.folder / "case.json")
        self.family: str = self.facts["family"]
        self.meta = (self.folder / "meta").exists()

    @property
    def source_arguments(self) -> list[Any]:
        return ["--cache-dir", self.folder / "meta"] if self.meta else ["--model-path", self.folder / "hf"]

    @property
    def config(self) -> dict[str, Any]:
        if not self.meta:
            return tm.read_json(self.folder / "hf" / "config.json")
        facts = self.facts
        return {
            "model_type": "llama",
            "num_hidden_layers": facts["layers"],
            "hidden_size": facts["hidden"],
            "num_attention_heads": facts["heads"],
            "vocab_size": facts["vocab"],
        }

    @property
    def huggingface(self) -> tm.Tensors:
        if not self.meta:
            return tm.read_huggingface(self.folder / "hf")
        parts = [torch.load(path, weights_only=True) for path in sorted((self.folder / "meta").glob("*.pth"))]
        return meta_to_huggingface(parts, self.facts["heads"], self.facts["kv"])
