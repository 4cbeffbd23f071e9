"""The straightforward conversion that ours is compared with: load everything, convert everything, save everything.

`python -m benchmarks.baseline import HF_FOLDER OUT` writes one torch file in Megatron-LLM's layout (TP 1, PP 1),
`python -m benchmarks.baseline export MEGATRON_ROOT OUT` one safetensors file. Nothing is checked, no config and no
tokenizer is written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "release/mp_rank_00/model_optim_rng.pt"


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Rotary halves next to each other: (heads, 2, head_dim/2, hidden) -> (heads, head_dim/2, 2, hidden)."""
    rows, hidden = weight.shape
    return weight.view(rows // head_dim, 2, head_dim // 2, hidden).transpose(1, 2).reshape(rows, hidden)


def halve(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleave`."""
    rows, hidden = weight.shape
    return weight.view(rows // head_dim, head_dim // 2, 2, hidden).transpose(1, 2).reshape(rows, hidden)


def import_model(source: Path, out: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["hidden_size"] // heads
    weights: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        weights |= load_file(file)
    encoder: dict[str, Tensor] = {"final_layernorm.weight": weights["model.norm.weight"]}
    for layer in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{layer}", f"layers.{layer}"
        q = interleave(weights[f"{old}.self_attn.q_proj.weight"], head_dim)
        k = interleave(weights[f"{old}.self_attn.k_proj.weight"], head_dim)
        v = weights[f"{old}.self_attn.v_proj.weight"]
        fused = torch.cat([part.view(groups, -1, part.shape[1]) for part in (q, k, v)], dim=1)
        encoder[f"{new}.self_attention.query_key_value.weight"] = fused.reshape(-1, fused.shape[2])
        encoder[f"{new}.self_attention.dense.weight"] = weights[f"{old}.self_attn.o_proj.weight"]
        glu = [weights[f"{old}.mlp.{name}_proj.weight"] for name in ("up", "gate")]
        encoder[f"{new}.mlp.dense_h_to_4h.weight"] = torch.cat(glu)
        encoder[f"{new}.mlp.dense_4h_to_h.weight"] = weights[f"{old}.mlp.down_proj.weight"]
        for name in ("input_layernorm", "post_attention_layernorm"):
            encoder[f"{new}.{name}.weight"] = weights[f"{old}.{name}.weight"]
    language_model = {
        "embedding": {"word_embeddings": {"weight": weights["model.embed_tokens.weight"]}},
        "encoder": encoder,
        "lm_head": weights["lm_head.weight"],
    }
    path = out / FILE
    path.parent.mkdir(parents=True)
    torch.save({"checkpoint_version": 3.0, "iteration": "release", "model": {"language_model": language_model}}, path)


def export_model(source: Path, out: Path) -> None:
    """`source` is a checkpoint that our import wrote; its args tell the heads."""
    content: dict[str, Any] = torch.load(source / FILE, map_location="cpu", weights_only=False)
    args, language_model = content["args"], content["model"]["language_model"]
    heads, groups = args.num_attention_heads, args.num_attention_heads_kv
    head_dim = args.hidden_size // heads
    encoder = language_model["encoder"]
    weights: dict[str, Tensor] = {
        "model.embed_tokens.weight": language_model["embedding"]["word_embeddings"]["weight"],
        "model.norm.weight": encoder["final_layernorm.weight"],
        "lm_head.weight": language_model["lm_head"],
    }
    for layer in range(args.num_layers):
        old, new = f"layers.{layer}", f"model.layers.{layer}"
        fused = encoder[f"{old}.self_attention.query_key_value.weight"]
        fused = fused.view(groups, heads // groups + 2, head_dim, fused.shape[1])
        q, k, v = (part.reshape(-1, part.shape[-1]) for part in fused.split([heads // groups, 1, 1], dim=1))
        weights[f"{new}.self_attn.q_proj.weight"] = halve(q, head_dim)
        weights[f"{new}.self_attn.k_proj.weight"] = halve(k, head_dim)
        weights[f"{new}.self_attn.v_proj.weight"] = v
        weights[f"{new}.self_attn.o_proj.weight"] = encoder[f"{old}.self_attention.dense.weight"]
        up, gate = encoder[f"{old}.mlp.dense_h_to_4h.weight"].chunk(2)
        weights |= {f"{new}.mlp.up_proj.weight": up.contiguous(), f"{new}.mlp.gate_proj.weight": gate.contiguous()}
        weights[f"{new}.mlp.down_proj.weight"] = encoder[f"{old}.mlp.dense_4h_to_h.weight"]
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{new}.{name}.weight"] = encoder[f"{old}.{name}.weight"]
    out.mkdir()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    direction, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    {"import": import_model, "export": export_model}[direction](source, out)
