"""Tiny Gemma 3 models by transformers, and what Megatron-Bridge stores of them, written down apart from the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
SIZES: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 12,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_parameters": ROPES,
}  # fmt: skip
OUTER = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "image_token_index": 66,
    "mm_tokens_per_image": 4,
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 8, "num_hidden_layers": 1},
}
VISION = {
    "vision_tower.vision_model.embeddings.patch_embedding.weight": (8, 3, 2, 2),
    "vision_tower.vision_model.post_layernorm.weight": (8,),
    "multi_modal_projector.mm_input_projection_weight": (8, 24),
    "multi_modal_projector.mm_soft_emb_norm.weight": (8,),
}
NORMS = {
    "input_layernorm": "self_attention.linear_qkv.layer_norm_weight",
    "self_attn.q_norm": "self_attention.q_layernorm.weight",
    "self_attn.k_norm": "self_attention.k_layernorm.weight",
    "post_attention_layernorm": "self_attention.linear_proj.post_layernorm.weight",
    "pre_feedforward_layernorm": "mlp.linear_fc1.layer_norm_weight",
    "post_feedforward_layernorm": "mlp.linear_fc2.post_layernorm.weight",
}


def model(seed: int = 7, **changes: Any) -> Gemma3ForCausalLM:
    """Of random bfloat16 values in float32; norms are spread around zero, as they are stored."""
    torch.manual_seed(seed)
    made = Gemma3ForCausalLM(Gemma3TextConfig(**{**SIZES, **changes})).float().eval()
    made.config._attn_implementation = "eager"
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            tensor.copy_((torch.randn(tensor.shape) * (0.3 if "norm" in name else 0.15)).to(torch.bfloat16))
    return made


def write(folder: Path, made: Gemma3ForCausalLM | None = None, config: dict[str, Any] | None = None) -> Path:
    """A Hugging Face folder in bfloat16, its config.json with `config` on top; ... takes a key away."""
    (made or model()).to(torch.bfloat16).save_pretrained(folder)
    path = folder / "config.json"
    said = json.loads(path.read_text()) | (config or {})
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))
    return folder


def with_vision(folder: Path, within: bool = False) -> Path:
    """A repository around the text model of `write`: as the hub has it, or (`within`) as newer releases name it."""
    write(folder)
    text = json.loads((folder / "config.json").read_text())
    text.pop("architectures")
    (folder / "config.json").write_text(json.dumps({**OUTER, "text_config": text}))
    (folder / "preprocessor_config.json").write_text('{"do_resize": true}')
    torch.manual_seed(11)
    others = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in VISION.items()}
    tensors = {in_repository(name, within): tensor for name, tensor in stored(folder).items()}
    tensors |= {f"model.{name}" if within else name: tensor for name, tensor in others.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def in_repository(name: str, within: bool) -> str:
    return name.replace("model.", "model.language_model.", 1) if within else f"language_model.{name}"


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def in_bridge(hf: dict[str, Tensor], groups: int = 2) -> dict[str, Tensor]:
    """Tensors of torch_dist, layers stacked: norms as they are, queries and keys and values by groups."""
    layers = sum(name.endswith("q_norm.weight") for name in hf)

    def stacked(*names: str) -> list[list[Tensor]]:
        return [[hf[f"model.layers.{layer}.{name}.weight"] for name in names] for layer in range(layers)]

    def grouped(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)

    qkv = stacked("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    glu = stacked("mlp.gate_proj", "mlp.up_proj")
    found = {
        "self_attention.linear_qkv.weight": torch.stack(list(map(grouped, qkv))),
        "self_attention.linear_proj.weight": torch.stack([one for (one,) in stacked("self_attn.o_proj")]),
        "mlp.linear_fc1.weight": torch.stack([torch.cat(pair) for pair in glu]),
        "mlp.linear_fc2.weight": torch.stack([one for (one,) in stacked("mlp.down_proj")]),
        **{here: torch.stack([one for (one,) in stacked(there)]) for there, here in NORMS.items()},
    }
    return {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        **{f"decoder.layers.{name}": tensor for name, tensor in found.items()},
    }
