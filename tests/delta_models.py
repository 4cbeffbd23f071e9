"""Tiny models with layers of gated delta, as Hugging Face folders: names and shapes written down by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Delta:
    """`flat`: Qwen3.5's spelling, else Qwen3-Next's. `float32`: of decay and norm. `vision`: there is some."""

    flat: bool = True
    layers: tuple[bool, ...] = (True, True, False)  # whether each is linear
    experts: int = 0
    packed: bool = False
    predicts: bool = True
    tied: bool = False
    float32: bool = True
    vision: bool = False
    alone: bool = False  # a text model with no repository around it
    exact: bool = True  # norms come back from Megatron as they were
    hidden: int = 24
    heads: int = 4
    groups: int = 2
    head_dim: int = 8
    key_heads: int = 2
    value_heads: int = 6
    key_dim: int = 4
    value_dim: int = 6
    kernel: int = 4
    ffn: int = 20
    vocab: int = 64

    @property
    def family(self) -> str:
        return "qwen3-next" if not self.flat else "qwen3.5-moe" if self.experts else "qwen3.5"

    @property
    def root(self) -> str:
        return "model.language_model" if self.flat and not self.alone else "model"

    @property
    def kind(self) -> str:
        return {"qwen3-next": "qwen3_next", "qwen3.5": "qwen3_5_text", "qwen3.5-moe": "qwen3_5_moe_text"}[self.family]

    def config(self) -> dict[str, Any]:
        experts: dict[str, Any] = {
            "num_experts": self.experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 16,
        }
        text: dict[str, Any] = {
            "model_type": self.kind,
            "hidden_size": self.hidden,
            "num_hidden_layers": len(self.layers),
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "linear_num_key_heads": self.key_heads,
            "linear_num_value_heads": self.value_heads,
            "linear_key_head_dim": self.key_dim,
            "linear_value_head_dim": self.value_dim,
            "linear_conv_kernel_dim": self.kernel,
            "layer_types": ["linear_attention" if linear else "full_attention" for linear in self.layers],
            "hidden_act": "silu",
            "vocab_size": self.vocab,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": self.tied,
            "attention_bias": False,
            "dtype": "bfloat16",
            "eos_token_id": 5,
            "rope_parameters": {"rope_theta": 1e7, "rope_type": "default", "partial_rotary_factor": 0.25},
            **(experts if self.experts else {}),
            **({"intermediate_size": self.ffn} if not self.flat or not self.experts else {}),
            **({"attn_output_gate": True, "mtp_num_hidden_layers": int(self.predicts)} if self.flat else {}),
        }
        name = "".join(part.capitalize() for part in self.kind.removesuffix("_text").split("_")).replace(
            "Qwen35", "Qwen3_5"
        )
        if not self.flat or self.alone:
            return {"architectures": [f"{name}ForCausalLM"], **text}
        outer = {"model_type": self.kind.removesuffix("_text"), "image_token_id": 61, "vision_config": {"depth": 1}}
        return {
            "architectures": [f"{name}ForConditionalGeneration"],
            **outer,
            "tie_word_embeddings": self.tied,
            "text_config": text,
        }

    def tensors(self) -> Tensors:
        draw = torch.Generator().manual_seed(7)

        def matrix(*shape: int, scale: float = 0.2) -> Tensor:
            return (torch.randn(*shape, generator=draw) * scale).to(torch.bfloat16)

        def norm(size: int) -> Tensor:
            return (torch.randn(size, generator=draw) * 0.1).to(torch.bfloat16)

        found: Tensors = {f"{self.root}.embed_tokens.weight": matrix(self.vocab, self.hidden, scale=1.0)}
        for layer, linear in enumerate(self.layers):
            place = f"{self.root}.layers.{layer}"
            found |= self._linear(place, matrix) if linear else self._full(place, matrix, norm)
            found |= self._mlp(place, matrix, norm)
        if self.predicts:
            found |= self._full("mtp.layers.0", matrix, norm) | self._mlp("mtp.layers.0", matrix, norm)
            found["mtp.fc.weight"] = matrix(self.hidden, 2 * self.hidden)
            names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
            found |= {f"mtp.{name}.weight": norm(self.hidden) for name in names}
        found[f"{self.root}.norm.weight"] = norm(self.hidden)
        if not self.tied:
            found["lm_head.weight"] = matrix(self.vocab, self.hidden)
        if self.vision:
            found["model.visual.patch_embed.proj.weight"] = matrix(6, 3, 2, 4, 4)
            found["model.visual.blocks.0.norm1.bias"] = matrix(6)
        return found

    def _linear(self, place: str, matrix: Any) -> Tensors:
        here, h = f"{place}.linear_attn", self.hidden
        q, v, heads = self.key_heads * self.key_dim, self.value_heads * self.value_dim, self.value_heads
        kept = torch.float32 if self.float32 else torch.bfloat16
        # Around one, where a number of bfloat16 less one is one too, and back.
        spread = torch.linspace(0.51, 1.9, self.value_dim).to(torch.bfloat16)
        if self.float32:
            spread = 1 + (torch.linspace(0.51, 1.9, self.value_dim) - 1).to(torch.bfloat16).to(torch.float32)
        if not self.exact:
            spread = torch.linspace(0.03, 7.3, self.value_dim).to(kept)
        found = {
            f"{place}.input_layernorm.weight": matrix(h, scale=0.1),
            f"{here}.conv1d.weight": matrix(2 * q + v, 1, self.kernel),
            f"{here}.A_log": torch.linspace(-2.9, 0.0, heads).to(torch.bfloat16).to(kept),
            f"{here}.dt_bias": matrix(heads),
            f"{here}.norm.weight": spread.to(kept),
            f"{here}.out_proj.weight": matrix(h, v),
        }
        if not self.flat:
            names = {"in_proj_qkvz": 2 * q + 2 * v, "in_proj_ba": 2 * heads}
        else:
            names = {"in_proj_qkv": 2 * q + v, "in_proj_z": v, "in_proj_b": heads, "in_proj_a": heads}
        return found | {f"{here}.{name}.weight": matrix(rows, h) for name, rows in names.items()}

    def _full(self, place: str, matrix: Any, norm: Any) -> Tensors:
        here, d = f"{place}.self_attn", self.head_dim
        return {
            f"{place}.input_layernorm.weight": norm(self.hidden),
            f"{here}.q_proj.weight": matrix(2 * self.heads * d, self.hidden),
            f"{here}.k_proj.weight": matrix(self.groups * d, self.hidden),
            f"{here}.v_proj.weight": matrix(self.groups * d, self.hidden),
            f"{here}.o_proj.weight": matrix(self.hidden, self.heads * d),
            f"{here}.q_norm.weight": norm(d),
            f"{here}.k_norm.weight": norm(d),
        }

    def _mlp(self, place: str, matrix: Any, norm: Any) -> Tensors:
        here, h = f"{place}.mlp", self.hidden
        found = {f"{place}.post_attention_layernorm.weight": norm(h)}

        def three(where: str, width: int) -> Tensors:
            shapes = {"gate_proj": (width, h), "up_proj": (width, h), "down_proj": (h, width)}
            return {f"{where}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}

        if not self.experts:
            return found | three(here, self.ffn)
        found |= {f"{here}.gate.weight": matrix(self.experts, h), **three(f"{here}.shared_expert", 16)}
        found[f"{here}.shared_expert_gate.weight"] = matrix(1, h)
        if self.packed and not place.startswith("mtp."):
            found[f"{here}.experts.gate_up_proj"] = matrix(self.experts, 24, h)
            found[f"{here}.experts.down_proj"] = matrix(self.experts, h, 12)
            return found
        for expert in range(self.experts):
            found |= three(f"{here}.experts.{expert}", 12)
        return found


def write(folder: Path, model: Delta) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config(), indent=2))
    save_file(model.tensors(), folder / "model.safetensors", {"format": "pt"})
    return folder


DELTAS = {
    "next": Delta(flat=False, experts=4, float32=False),
    "next-tied": Delta(flat=False, experts=4, float32=False, tied=True, layers=(True, False)),
    "next-uneven": Delta(flat=False, experts=4, float32=False, layers=(False, True, True, False), predicts=False),
    "3.5": Delta(),
    "3.5-tied": Delta(tied=True, key_heads=6),
    "3.5-vision": Delta(vision=True),
    "3.5-alone": Delta(alone=True),
    "3.5-moe": Delta(experts=4, packed=True),
    "3.6": Delta(float32=False, exact=False),
    "3.6-moe": Delta(experts=4, packed=True, float32=False, predicts=False),
}
