"""GLM-4.5 with a layer that predicts further tokens: kept both ways, in both formats, on ranks of experts too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

HIDDEN, LAYERS = 48, 3
RANKS = ("--ckpt-format", "torch", "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 3,
         "--expert-model-parallel-size", 2)  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Laid out as the hub's: one layer more than config.json counts, with copies of both tables."""
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=128, hidden_size=HIDDEN, intermediate_size=80, moe_intermediate_size=16, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, n_routed_experts=4, num_experts_per_tok=2,
        n_shared_experts=1, first_k_dense_replace=1, use_qk_norm=True, attention_bias=True, n_group=1, topk_group=1,
    )  # fmt: skip
    folder = tmp_path / "source"
    Glm4MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if name.endswith("e_score_correction_bias"):
            tensors[name] = torch.rand(tensors[name].shape)
        if name.startswith(f"model.layers.{LAYERS - 1}."):
            further = torch.randn(tensors[name].shape).to(tensors[name].dtype)
            tensors[name.replace(f"layers.{LAYERS - 1}.", f"layers.{LAYERS}.")] = further
    prefix = f"model.layers.{LAYERS}."
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{prefix}{name}.weight"] = torch.randn(HIDDEN).bfloat16()
    tensors[f"{prefix}eh_proj.weight"] = torch.randn(HIDDEN, 2 * HIDDEN).bfloat16()
    tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_nextn_predict_layers": 1}))
    return folder


@pytest.mark.parametrize("options", [(), RANKS], ids=["torch_dist", "rank files"])
def test_kept_both_ways(source: Path, tmp_path: Path, to_megatron, to_hf, options: tuple) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    to_megatron("glm4-moe", "--model-path", source, "--out", out, "--verify", *options).succeeded()
    to_hf("--input_dir", out, "--output_dir", back, "--no_tokenizer").succeeded()
    wanted, found = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_copy_of_a_table_that_differs_is_refused(source: Path, tmp_path: Path, to_megatron) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors[f"model.layers.{LAYERS}.embed_tokens.weight"][5] += 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    to_megatron("glm4-moe", "--model-path", source, "--out", tmp_path / "out").refused("embed_tokens", "differs")
