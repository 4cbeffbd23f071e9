"""The parts of a model's config: rope, experts, and what layers may be beside full attention."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Rope scaling of kind "llama3" or "yarn", by transformers' names and defaults (modeling_rope_utils.py).

    `attention_factor` None: yarn's own, 0.1 ln(factor) + 1.
    """

    kind: str
    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float = 1.0  # llama3's two
    high_freq_factor: float = 4.0
    attention_factor: float | None = None  # yarn's four
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None  # DeepSeek's two, which scale the softmax
    mscale_all_dim: float | None = None


@dataclass(frozen=True)
class Rope:
    """Everything that decides the angles of a rotary embedding: `kind` is default, linear, llama3 or yarn."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclass(frozen=True)
class Moe:
    """Experts and their router, in Megatron-Core's words (moe_ffn_hidden_size is `ffn_hidden_size` here).

    `layers` says of each layer whether it has experts (else: a dense MLP of ModelConfig.ffn_hidden_size).
    `biased`: router and experts have biases, as the output projection of attention then has. `clamp` bounds the gate
    from above and the up projection on both sides.
    `pre_softmax`: scores are made of all logits and not renormalised after top-k (Hugging Face's norm_topk_prob
    false). `scaling_factor` None: 1. Without groups `num_groups` and `group_topk` are None. `shared_ffn_hidden_size`
    is that of all shared experts together, 0 without any; `shared_gate`: a sigmoid of one row scales them.
    `latent_size`: the experts work on projections of so many rows; None: on the hidden states themselves.
    """

    num_experts: int
    ffn_hidden_size: int
    topk: int
    layers: tuple[bool, ...]
    pre_softmax: bool = False
    score_function: str = "softmax"
    scaling_factor: float | None = None
    expert_bias: bool = False
    num_groups: int | None = None
    group_topk: int | None = None
    shared_ffn_hidden_size: int = 0
    shared_gate: bool = False
    biased: bool = False
    clamp: float | None = None
    latent_size: int | None = None

    @property
    def everywhere(self) -> bool:
        """Whether every layer has experts: then one integer says it, and torch_dist stacks the layers."""
        return all(self.layers)


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention, sizes in Megatron-Core's words. `q_lora_rank` None: q is projected at once."""

    kv_lora_rank: int
    qk_head_dim: int  # of a head, without rope (qk_nope_head_dim)
    qk_pos_emb_head_dim: int  # of a head, with rope (qk_rope_head_dim)
    v_head_dim: int
    q_lora_rank: int | None = None


@dataclass(frozen=True)
class Mamba:
    """State-space layers (Mamba 2), sizes in Megatron-Core's words: the heads of a group share B and C."""

    state_dim: int
    head_dim: int
    num_groups: int
    num_heads: int


@dataclass(frozen=True)
class GatedDelta:
    """Linear attention by the gated delta rule, in Megatron-Core's words (linear_num_key_heads and so on).

    `layers` says of each layer whether it has it (else: full attention).
    """

    layers: tuple[bool, ...]
    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel_dim: int


PARTS = {"moe": Moe, "mla": Mla, "mamba": Mamba, "gated_delta": GatedDelta}  # fields of ModelConfig that have parts
