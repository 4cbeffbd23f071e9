"""The model and its parallel layout as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property

MAMBA_KERNEL = 4  # tokens that a state-space layer's convolution sees: a constant of Megatron-Core's (mamba_mixer.py)


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
    window_layers: tuple[bool, ...] | None = None  # which layers have the window, where not all of them have it
    tie_word_embeddings: bool = False
    num_layernorms: int = 1
    rope_scaling: RopeScaling | None = None  # beside or instead of the linear factor: Llama 3's, or yarn
    add_qkv_bias: bool = False
    qk_layernorm: bool = False  # an RMSNorm over each head of q and of k, in front of the rotary embedding
    rotary_percent: float = 1.0  # the part of each head that turns
    moe: Moe | None = None
    mla: Mla | None = None
    mtp_num_layers: int = 0  # multi-token prediction
    # Where each layer is one sub-block, its symbol: M state space, * attention, - MLP, E experts
    hybrid_layer_pattern: str | None = None
    mamba: Mamba | None = None

    @property
    def rope(self) -> Rope:
        scaling = self.rope_scaling
        if scaling is None:
            kind = "linear" if self.rope_scaling_factor != 1.0 else "default"
            return Rope(self.rope_theta, kind, self.rope_scaling_factor)
        return Rope(self.rope_theta, **asdict(scaling))

    def window_of(self, layer: int) -> int | None:
        """The tokens that attention of a layer sees, its own included; None: all."""
        return self.sliding_window if self.window_layers is None or self.window_layers[layer] else None

    def layer_features(self, layer: int) -> frozenset[str]:
        """What architecture rows may need of a layer; most is true of every layer."""
        if self.hybrid_layer_pattern is not None:
            return self._sub_blocks[self.hybrid_layer_pattern[layer]]
        return self._features[0 if self.moe is None else 1 + self.moe.layers[layer]]

    @cached_property
    def _features(self) -> tuple[frozenset[str], ...]:
        """Of a layer of a model without experts; and of a dense layer and one of experts in a model with them."""
        stated = {
            "untied": not self.tie_word_embeddings,
            "shared_norm": self.num_layernorms == 1,
            "two_norms": self.num_layernorms == 2,
            "qkv_bias": self.add_qkv_bias,
            "qk_norms": self.qk_layernorm,
            "mixed_windows": self.window_layers is not None,
            "attention": self.mla is None,
            "mla": self.mla is not None,
            "q_lora": self.mla is not None and self.mla.q_lora_rank is not None,
            "q_whole": self.mla is not None and self.mla.q_lora_rank is None,
        }
        there = frozenset(name for name, has in stated.items() if has)
        return there | {"dense"}, there | {"dense"}, there | self._of_experts()

    def _of_experts(self) -> frozenset[str]:
        if self.moe is None:
            return frozenset()
        of_experts = {
            "moe": True,
            "expert_bias": self.moe.expert_bias,
            "shared_experts": self.moe.shared_ffn_hidden_size > 0,
            "shared_gate": self.moe.shared_gate,
            "biased": self.moe.biased,
            "clamped": self.moe.clamp is not None,
            "latent_experts": self.moe.latent_size is not None,
        }
        return frozenset(name for name, has in of_experts.items() if has)

    @cached_property
    def _sub_blocks(self) -> dict[str, frozenset[str]]:
        """Of a layer that is one sub-block, by its symbol."""
        there = self._features[0] - {"attention", "dense"} | {"sub_blocks"}
        kinds = {"M": {"mamba"}, "*": {"attention"}, "-": {"dense"}, "E": self._of_experts()}
        return {symbol: there | features for symbol, features in kinds.items()}

    @cached_property
    def axes(self) -> dict[str, int]:
        """Sizes of the named axes that architecture rows use."""
        sizes = {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "glu": 2 * self.ffn_hidden_size,
            "head_dim": self.head_dim,
            "heads": self.num_attention_heads,
            "q": self.num_attention_heads * self.head_dim,
            "kv": self.num_query_groups * self.head_dim,
            "qkv": (self.num_attention_heads + 2 * self.num_query_groups) * self.head_dim,
            "one": 1,
            "two_hidden": 2 * self.hidden_size,
        }
        return sizes | self._expert_axes() | self._latent_axes() | self._mamba_axes()

    def _expert_axes(self) -> dict[str, int]:
        if self.moe is None:
            return {}
        expert, shared = self.moe.ffn_hidden_size, self.moe.shared_ffn_hidden_size
        return {
            "experts": self.moe.num_experts,
            "expert_ffn": expert,
            "expert_glu": 2 * expert,
            "expert_in": self.moe.latent_size or self.hidden_size,
            "shared_ffn": shared,
            "shared_glu": 2 * shared,
        }

    def _latent_axes(self) -> dict[str, int]:
        if self.mla is None:
            return {}
        heads, mla = self.num_attention_heads, self.mla
        return {
            "q_rank": mla.q_lora_rank or 0,
            "kv_rank": mla.kv_lora_rank,
            "kv_down": mla.kv_lora_rank + mla.qk_pos_emb_head_dim,
            "mla_q": heads * (mla.qk_head_dim + mla.qk_pos_emb_head_dim),
            "mla_kv": heads * (mla.qk_head_dim + mla.v_head_dim),
            "mla_out": heads * mla.v_head_dim,
        }

    def _mamba_axes(self) -> dict[str, int]:
        if self.mamba is None:
            return {}
        return {
            "mamba_heads": self.mamba.num_heads,
            "mamba_inner": self.mamba.num_heads * self.mamba.head_dim,
            "mamba_states": self.mamba.num_groups * self.mamba.state_dim,
            "mamba_kernel": MAMBA_KERNEL,
        }


@dataclass(frozen=True)
class Parallelism:
    """How a Megatron checkpoint is cut: tensor ranks, pipeline stages, and virtual stages (chunks) on each of them.

    `layers`: how many each chunk of each stage holds, in the order of the layers (the first chunk of every stage, then
    the second); empty where all hold the same number.
    `hybrid`: a HybridModel of what a GPTModel holds, whose layers are two of Megatron's each: `layers` counts those.
    `expert` counts the ranks that experts are dealt to, `expert_tensor` those that cut each of them (None: `tensor`).
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    layers: tuple[int, ...] = ()
    expert: int = 1
    expert_tensor: int | None = None
    hybrid: bool = False

    @property
    def experts_tensor(self) -> int:
        """Ranks that each expert's tensors are cut among: as many as other tensors', unless said otherwise."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    def __str__(self) -> str:
        virtual = f" VPP {self.virtual}" if self.virtual > 1 else ""
        expert = f" EP {self.expert}" if self.expert > 1 else ""
        cut = f" ETP {self.experts_tensor}" if self.experts_tensor != self.tensor else ""
        uneven = f" of {', '.join(map(str, self.layers))} layers" if self.layers else ""
        return f"TP {self.tensor} PP {self.pipeline}{virtual}{expert}{cut}{uneven}"
