"""Tiny GPT-OSS models by transformers, and what Megatron-Core stores of them, written down apart from the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

SHARED = Path(__file__).resolve().parents[2] / "shared" / "golden"
YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
    "max_position_embeddings": 131072, "rope_parameters": YARN, "pad_token_id": None,
}  # fmt: skip


def model(seed: int = 7, **changes: Any) -> GptOssForCausalLM:
    """Of random bfloat16 values in float32, large enough that biases, sinks and the clamp are felt."""
    torch.manual_seed(seed)
    made = GptOssForCausalLM(GptOssConfig(**{**SIZES, **changes})).float().eval()
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            scale = 1.0 if name.endswith(("sinks", "bias", "gate_up_proj")) else 0.2
            value = torch.randn(tensor.shape) * scale + (1.0 if "norm" in name else 0.0)
            tensor.copy_(value.to(torch.bfloat16))
    return made


def write(folder: Path, made: GptOssForCausalLM | None = None, config: dict[str, Any] | None = None) -> Path:
    """A Hugging Face folder in bfloat16, its config.json with `config` on top."""
    (made or model()).to(torch.bfloat16).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def in_megatron(hf: dict[str, Tensor], heads: int = 4, groups: int = 2) -> dict[str, Tensor]:
    """Tensors of each layer and expert, {layer, expert} by number: as TEGroupedMLP names them, unstacked."""
    found = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    if "lm_head.weight" in hf:
        found["output_layer.weight"] = hf["lm_head.weight"]
    for layer in range(sum(name.endswith(".sinks") for name in hf)):
        there, here = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias"):
            q, k, v = (hf[f"{there}self_attn.{name}_proj.{kind}"].unflatten(0, (groups, -1)) for name in "qkv")
            found[f"{here}self_attention.linear_qkv.{kind}"] = torch.cat([q, k, v], dim=1).flatten(0, 1)
            found[f"{here}self_attention.linear_proj.{kind}"] = hf[f"{there}self_attn.o_proj.{kind}"]
            found[f"{here}mlp.router.{kind}"] = hf[f"{there}mlp.router.{kind}"]
        found[f"{here}self_attention.core_attention.softmax_offset"] = hf[f"{there}self_attn.sinks"]
        found[f"{here}self_attention.linear_qkv.layer_norm_weight"] = hf[f"{there}input_layernorm.weight"]
        found[f"{here}pre_mlp_layernorm.weight"] = hf[f"{there}post_attention_layernorm.weight"]
        inner, outer = hf[f"{there}mlp.experts.gate_up_proj"], hf[f"{there}mlp.experts.down_proj"]
        inner_bias, outer_bias = (hf[f"{there}mlp.experts.{name}_proj_bias"] for name in ("gate_up", "down"))
        for expert in range(len(inner)):
            ours = f"{here}mlp.experts."
            gate, up = inner[expert][:, 0::2], inner[expert][:, 1::2]
            found[f"{ours}linear_fc1.weight{expert}"] = torch.cat([gate, up], dim=1).T.contiguous()
            found[f"{ours}linear_fc1.bias{expert}"] = torch.cat([inner_bias[expert][0::2], inner_bias[expert][1::2]])
            found[f"{ours}linear_fc2.weight{expert}"] = outer[expert].T.contiguous()
            found[f"{ours}linear_fc2.bias{expert}"] = outer_bias[expert]
    return found
