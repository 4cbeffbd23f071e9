"""The model and its parallel layout as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property

from weights_conversion.config.parts import PARTS, GatedDelta, Mamba, Mla, Moe, Rope, RopeScaling

__all__ = ["PARTS", "GatedDelta", "Mamba", "Mla", "ModelConfig", "Moe", "Parallelism", "Rope", "RopeScaling"]

MAMBA_KERNEL = 4  # tokens that a state-space layer's convolution sees: a constant of Megatron-Core's (mamba_mixer.py)


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
    gated_delta: GatedDelta | None = None
    attention_output_gate: bool = False  # a sigmoid of a gate for each row of each query head, made as queries are
    layernorm_zero_centered_gamma: bool = False  # what norms scale by is stored minus one
    local_rope_theta: float | None = None  # of layers with a window, whose rope is not scaled; None: as the others'
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; None: by that of head_dim

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

    @property
    def window_period(self) -> int | None:
        """N where every N-th layer sees all tokens and the others have the window; None: no number says which do."""
        windowed = tuple(self.window_of(layer) is not None for layer in range(self.num_layers))
        fits = (n for n in (6, *range(1, self.num_layers + 2)) if windowed == _all_but_every(n, self.num_layers))
        return next(fits, None)

    def layer_features(self, layer: int) -> frozenset[str]:
        """What architecture rows may need of a layer; most is true of every layer."""
        if self.hybrid_layer_pattern is not None:
            return self._sub_blocks[self.hybrid_layer_pattern[layer]]
        linear = self.gated_delta is not None and self.gated_delta.layers[layer]
        attention = "gated_delta" if linear else "full_attention"
        return self._features[attention][0 if self.moe is None else 1 + self.moe.layers[layer]]

    @cached_property
    def _features(self) -> dict[str, tuple[frozenset[str], ...]]:
        return {kind: tuple(part | {kind} for part in self._mlps) for kind in ("full_attention", "gated_delta")}

    @cached_property
    def _mlps(self) -> tuple[frozenset[str], ...]:
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
        there = self._mlps[0] - {"attention", "dense"} | {"sub_blocks"}
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
        return sizes | self._expert_axes() | self._latent_axes() | self._mamba_axes() | self._delta_axes()

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

    def _delta_axes(self) -> dict[str, int]:
        if self.gated_delta is None:
            return {}
        delta = self.gated_delta
        return {
            "gated_qkv": 2 * (self.num_attention_heads + self.num_query_groups) * self.head_dim,
            "delta_key": delta.num_key_heads * delta.key_head_dim,
            "delta_value": delta.num_value_heads * delta.value_head_dim,
            "delta_key_heads": delta.num_key_heads,
            "delta_value_heads": delta.num_value_heads,
            "delta_value_dim": delta.value_head_dim,
            "delta_kernel": delta.conv_kernel_dim,
        }


def _all_but_every(number: int, layers: int) -> tuple[bool, ...]:
    return tuple((layer + 1) % number != 0 for layer in range(layers))


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
