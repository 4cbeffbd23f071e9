"""Tiny random models with experts, as their families' published repositories spell them."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, field
from typing import Any

import tiny_models as tm
import torch
from core_experts import Experts
from torch import Tensor


@dataclass(frozen=True)
class Mixture(tm.Tiny):
    """`model_type` is transformers'. `changes` go into config.json, whose sizes the tensors have."""

    model_type: str = "qwen3_moe"
    layers: int = 2
    heads: int = 4
    groups: int = 2
    eps: float = 1e-6
    theta: float = 1e6
    vocab: int = 250
    dtype: torch.dtype = torch.float32
    changes: tuple[tuple[str, Any], ...] = field(default=(), hash=False)

    @property
    def tied(self) -> bool:
        return dict(self.changes).get("tie_word_embeddings", False)

    def config(self, spelling: int = 4) -> dict[str, Any]:
        common: dict[str, Any] = {
            "architectures": [_CLASSES[self.model_type]],
            "model_type": self.model_type,
            "bos_token_id": 1,
            "eos_token_id": self.eos,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "max_position_embeddings": self.max_positions,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.groups,
            "rms_norm_eps": self.eps,
            "rope_theta": self.theta,
            "tie_word_embeddings": False,
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            "vocab_size": self.vocab,
        }
        return common | _OWN[self.model_type] | dict(self.changes)

    @functools.lru_cache(maxsize=64)  # noqa: B019 as in tiny_models
    def tensors(self) -> dict[str, Tensor]:
        config, generator = self.config(), torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        experts = Experts.from_hf(config)
        assert experts is not None
        head = config.get("head_dim") or self.hidden // self.heads

        def matrix(rows: int, columns: int) -> Tensor:
            return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(self.dtype)

        def near(size: int, middle: float = 1.0) -> Tensor:
            return (middle + 0.2 * torch.randn(size, generator=generator)).to(self.dtype)

        tensors = {"model.embed_tokens.weight": matrix(self.vocab, self.hidden), "model.norm.weight": near(self.hidden)}
        if not self.tied:
            tensors["lm_head.weight"] = matrix(self.vocab, self.hidden)
        for layer in range(self.layers):
            p = f"model.layers.{layer}."
            for name, heads in (("q", self.heads), ("k", self.groups), ("v", self.groups)):
                tensors[f"{p}self_attn.{name}_proj.weight"] = matrix(heads * head, self.hidden)
                if config.get("attention_bias") or self.model_type == "qwen2_moe":
                    tensors[f"{p}self_attn.{name}_proj.bias"] = near(heads * head, 0.0)
            tensors[f"{p}self_attn.o_proj.weight"] = matrix(self.hidden, self.heads * head)
            if self.model_type == "qwen3_moe" or config.get("use_qk_norm"):
                tensors |= {f"{p}self_attn.{name}_norm.weight": near(head) for name in "qk"}
            tensors |= {f"{p}{name}_layernorm.weight": near(self.hidden) for name in ("input", "post_attention")}
            if experts.layers[layer]:
                tensors |= {p + name: value for name, value in experts.random(layer, self.hidden, matrix).items()}
            else:
                tensors |= {f"{p}mlp.{name}_proj.weight": matrix(self.ffn, self.hidden) for name in ("gate", "up")}
                tensors[f"{p}mlp.down_proj.weight"] = matrix(self.hidden, self.ffn)
        return tensors


_CLASSES = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
_OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02, "sliding_window": None},
    "qwen2_moe": {
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 24,
        "norm_topk_prob": False,
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "shared_expert_intermediate_size": 44,
        "sliding_window": 32768,
        "use_sliding_window": False,
    },
    "qwen3_moe": {
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 24,
        "mlp_only_layers": [],
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "rope_scaling": None,
    },
    "glm4_moe": {
        "attention_bias": True,
        "first_k_dense_replace": 1,
        "head_dim": 24,
        "moe_intermediate_size": 24,
        "n_group": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 2,
        "partial_rotary_factor": 0.5,
        "rope_scaling": None,
        "routed_scaling_factor": 2.5,
        "topk_group": 1,
        "use_qk_norm": True,
    },
}
GROUPED = (("n_group", 2), ("topk_group", 1), ("num_experts_per_tok", 2), ("use_qk_norm", False))
MODELS: dict[str, Mixture] = {
    model.name: model
    for model in (
        Mixture("mixtral", "mixtral", model_type="mixtral"),
        Mixture("mixtral-bf16", "mixtral", model_type="mixtral", layers=4, dtype=torch.bfloat16),
        Mixture("qwen2-moe", "qwen2-moe", model_type="qwen2_moe"),
        Mixture("qwen2-moe-mixed", "qwen2-moe", model_type="qwen2_moe", layers=4, changes=(
            ("decoder_sparse_step", 2), ("norm_topk_prob", True), ("tie_word_embeddings", True),
        )),
        Mixture("qwen3-moe", "qwen3-moe"),
        Mixture("qwen3-moe-mixed", "qwen3-moe", layers=4, changes=(
            ("mlp_only_layers", [2]), ("norm_topk_prob", False), ("num_experts_per_tok", 1), ("num_experts", 8),
        )),
        Mixture("glm4-moe", "glm4-moe", model_type="glm4_moe", eps=1e-5, layers=3),
        Mixture("glm4-moe-groups", "glm4-moe", model_type="glm4_moe", eps=1e-5, layers=4, changes=GROUPED),
    )
}  # fmt: skip
