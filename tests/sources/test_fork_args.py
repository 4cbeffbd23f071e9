"""Args that forks of Megatron-LLM add: refused where they change the forward pass, as Megatron-Core's are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
from conftest import run
from megatron_files import write_checkpoint
from naive_layout import megatron_ranks

MODEL = tm.MODELS["llama2-gqa"]


def trained(folder: Path, **args: Any) -> Path:
    ranks = megatron_ranks(MODEL.config(), MODEL.tensors(), 1, 1, rows=MODEL.vocab)
    write_checkpoint(folder, ranks, tm.training_args(MODEL, 1, 1, rows=MODEL.vocab) | args, 7)
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [("logits_soft_cap", 30.0), ("qk_layernorm", True), ("rotary_percent", 0.5), ("num_experts", 8),
     ("attention_scale", 0.1), ("embedding_multiplier", 12.0), ("softmax_scale", 0.2)],
)  # fmt: skip
def test_refused_by_name(name: str, value: Any, to_hf, to_megatron, tmp_path: Path) -> None:
    root = trained(tmp_path / "m", **{name: value})
    options = ("--model", "llama2", "--no_tokenizer")
    to_hf("--input_dir", root, "--output_dir", tmp_path / "out", *options).refused(name)
    to_megatron("llama2", "--model-path", root, "--out", tmp_path / "new").refused(name)
    hf = tm.write_huggingface(tmp_path / "hf", MODEL)
    assert run("weights_conversion.verify", hf, root).code == 2


def test_values_of_no_consequence_pass(to_hf, tmp_path: Path) -> None:
    args = {"logits_soft_cap": None, "qk_layernorm": False, "rotary_percent": 1.0, "num_experts": None, "metrics": []}
    root = trained(tmp_path / "m", **args, use_flash_attn=True, embedding_multiplier=1.0)
    to_hf("--input_dir", root, "--output_dir", tmp_path / "out", "--model", "llama2", "--no_tokenizer").succeeded()
