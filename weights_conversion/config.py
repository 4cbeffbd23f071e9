"""The model and its parallel layout as plain values."""

from __future__ import annotations

from dataclasses import dataclass

FAMILIES = ("codellama", "falcon", "llama", "llama2", "mistral")


@dataclass(frozen=True)
class ModelConfig:
    """Every hyper-parameter that decides a shape or a number of the forward pass.

    The names are Megatron-Core's. `vocab_size` is the number of embedding rows in the Hugging Face model, padding that
    only a parallel layout needs not included. `num_layernorms` counts the norms in front of falcon's parallel
    attention and MLP (1: shared, 2: one each); it is 1 for the sequential families, whose second norm stands behind
    the attention.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rope_theta: float = 10000.0
    rope_scaling_factor: float = 1.0  # linear scaling: positions are divided by it
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    num_layernorms: int = 1

    @property
    def axes(self) -> dict[str, int]:
        """Sizes of the named axes that architecture rows use."""
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "glu": 2 * self.ffn_hidden_size,
            "q": self.num_attention_heads * self.head_dim,
            "kv": self.num_query_groups * self.head_dim,
            "qkv": (self.num_attention_heads + 2 * self.num_query_groups) * self.head_dim,
        }


@dataclass(frozen=True)
class Parallelism:
    """How a Megatron checkpoint is cut: tensor ranks, pipeline stages, and virtual stages (chunks) on each of them."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1

    def __str__(self) -> str:
        virtual = f" VPP {self.virtual}" if self.virtual > 1 else ""
        return f"TP {self.tensor} PP {self.pipeline}{virtual}"
