"""How each side stores a model, as the forward pass needs it: names, rotary order, gate/up order and QKV grouping.

All of it is written down here a second time, apart from the converter's tables, so that a mistake there is seen here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from weights_conversion.config import ModelConfig
from weights_conversion.errors import ConversionError
from weights_conversion.verification import delta_names, post_norms
from weights_conversion.verification.names import DeltaNames, ExpertNames, LatentNames, MambaNames, Names


@dataclass(frozen=True)
class Block:
    """What a layer computes. `parallel`: attention and MLP have the same input; else one follows the other."""

    parallel: bool = False
    gated: bool = True  # activation(gate) * up; else one matrix and `activation`
    activation: str = ""  # silu where it is gated, gelu where not; or gelu_tanh, or relu2, the square of relu
    rotary: bool = True
    layer_norm: bool = False  # LayerNorm with bias; else RMSNorm
    sinks: bool = False  # each head's softmax has one logit more, which attends to nothing
    scaled_embedding: bool = False  # by the root of the hidden size
    alpha: float | None = None  # gate * sigmoid(alpha * gate) * (up + 1), both clamped; None: silu(gate) * up


BLOCKS = {  # all others are Llama's
    "falcon": Block(parallel=True, gated=False, layer_norm=True),
    "gemma3": Block(activation="gelu_tanh", scaled_embedding=True),
    "gpt-oss": Block(sinks=True, alpha=1.702),
    "nemotron-h": Block(gated=False, activation="relu2", rotary=False),
}


def block_of(config: ModelConfig) -> Block:
    return BLOCKS.get(config.family, Block())


@dataclass(frozen=True)
class Convention:
    """How one side stores a model. `dataclasses.replace` makes a hypothesis about what a writer did wrong."""

    title: str
    names: Names
    interleaved_rotary: bool  # rotate rows (2i, 2i+1) of a head; otherwise rows (i, i + head_dim/2)
    gate_first: bool  # of the two halves of a GLU, by rows or in the order of `Names.mlp_in`
    parallel: tuple[Names, ...] = ()  # with one norm in front of parallel branches, and with two; empty: cannot hold it
    grouped_qkv: bool = True  # fused QKV is [q .. q, k, v] per group; otherwise all q, all k, all v
    grouped_bias: bool = True  # the same of its bias
    embedding_first: bool = True  # of the two halves that a prediction layer's projection takes
    joins_parts: bool = False  # tensors of several parts are one; otherwise one each
    hybrid: Names | None = None  # of models whose layers are one sub-block each
    experts: Mapping[str, ExpertNames] = field(default_factory=dict, hash=False)  # by family, as the next two
    delta: Mapping[str, DeltaNames] = field(default_factory=dict, hash=False)
    norms: Mapping[str, Mapping[str, str]] = field(default_factory=dict, hash=False)

    def names_for(self, config: ModelConfig) -> Names:
        """Raises ConversionError for a model that this side cannot store."""
        if config.hybrid_layer_pattern is not None:
            if self.hybrid is not None:
                return self.hybrid
            raise ConversionError(
                f"{self.title} checkpoints cannot hold a {config.family} model, whose layers are one sub-block each; "
                "compare a Hugging Face or Megatron-Core checkpoint"
            )
        if not block_of(config).parallel:
            self._check(config)
            parts = {"experts": self.experts.get(config.family), "delta": self.delta.get(config.family)}
            own = {name: part for name, part in parts.items() if part is not None}
            return replace(self.names, **own, **self.norms.get(config.family, {}))
        if not self.parallel:
            raise ConversionError(
                f"{self.title} checkpoints cannot hold a {config.family} model, whose attention and MLP are parallel; "
                "compare a Hugging Face or Megatron-LLM checkpoint."
            )
        return self.parallel[config.num_layernorms - 1]

    def _check(self, config: ModelConfig) -> None:
        for has, name, what in (
            (config.add_qkv_bias, self.names.qkv_bias, "biases of q, k and v"),
            (config.qk_layernorm, self.names.q_norm, "norms of q and k"),
            (config.moe is not None, self.names.experts, "experts"),
            (config.mla is not None, self.names.latent, "latent attention"),
            (config.gated_delta is not None, self.delta.get(config.family), "layers of gated delta"),
        ):
            if has and not name:
                raise ConversionError(
                    f"{self.title} checkpoints cannot hold {what}, which a {config.family} model has; "
                    "compare a Hugging Face or Megatron-Core checkpoint"
                )


_HF_FALCON = Names(
    embedding="transformer.word_embeddings.weight",
    layer="transformer.h.{}.",
    attention_norm="input_layernorm.weight",
    qkv=("self_attention.query_key_value.weight",),
    dense="self_attention.dense.weight",
    mlp_norm="input_layernorm.weight",
    mlp_in=("mlp.dense_h_to_4h.weight",),
    mlp_out="mlp.dense_4h_to_h.weight",
    final_norm="transformer.ln_f.weight",
    head="lm_head.weight",
)
_HF_EXPERTS = ExpertNames(
    norm="post_attention_layernorm.weight",
    router="mlp.gate.weight",
    inner=("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
    outer="mlp.experts.{}.down_proj.weight",
    bias="mlp.gate.e_score_correction_bias",
    shared_inner=("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    shared_outer="mlp.shared_experts.down_proj.weight",
)
_HF_OF_FAMILIES = {
    "gpt-oss": ExpertNames(  # columns first, gate and up in turn: verification/whole.py knows what these names mean
        norm="post_attention_layernorm.weight",
        router="mlp.router.weight",
        router_bias="mlp.router.bias",
        inner=("mlp.experts.gate_up_proj.{}.gate", "mlp.experts.gate_up_proj.{}.up"),
        inner_bias=("mlp.experts.gate_up_proj_bias.{}.gate", "mlp.experts.gate_up_proj_bias.{}.up"),
        outer="mlp.experts.down_proj.{}",
        outer_bias="mlp.experts.down_proj_bias.{}",
    ),
    "mixtral": ExpertNames(
        norm="post_attention_layernorm.weight",
        router="block_sparse_moe.gate.weight",
        inner=("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
        outer="block_sparse_moe.experts.{}.w2.weight",
    ),
    "qwen2-moe": replace(
        _HF_EXPERTS,
        shared_inner=("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
        shared_outer="mlp.shared_expert.down_proj.weight",
        shared_gate="mlp.shared_expert_gate.weight",
    ),
}
_HF_OF_FAMILIES |= dict.fromkeys(("qwen3-next", "qwen3.5-moe"), _HF_OF_FAMILIES["qwen2-moe"])
_HF_HYBRID = Names(
    embedding="backbone.embeddings.weight",
    layer="backbone.layers.{}.",
    attention_norm="norm.weight",
    qkv=("mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.v_proj.weight"),
    dense="mixer.o_proj.weight",
    mlp_norm="norm.weight",
    mlp_in=("mixer.up_proj.weight",),
    mlp_out="mixer.down_proj.weight",
    final_norm="backbone.norm_f.weight",
    head="lm_head.weight",
    experts=ExpertNames(
        norm="norm.weight",
        router="mixer.gate.weight",
        inner=("mixer.experts.{}.up_proj.weight",),
        outer="mixer.experts.{}.down_proj.weight",
        bias="mixer.gate.e_score_correction_bias",
        shared_inner=("mixer.shared_experts.up_proj.weight",),
        shared_outer="mixer.shared_experts.down_proj.weight",
        latent_in="mixer.fc1_latent_proj.weight",
        latent_out="mixer.fc2_latent_proj.weight",
    ),
    mamba=MambaNames("norm.weight"),
)
HF = Convention(
    "Hugging Face",
    Names(
        embedding="model.embed_tokens.weight",
        layer="model.layers.{}.",
        attention_norm="input_layernorm.weight",
        qkv=("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        dense="self_attn.o_proj.weight",
        mlp_norm="post_attention_layernorm.weight",
        mlp_in=("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        mlp_out="mlp.down_proj.weight",
        final_norm="model.norm.weight",
        head="lm_head.weight",
        qkv_bias=("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        q_norm="self_attn.q_norm.weight",
        k_norm="self_attn.k_norm.weight",
        dense_bias="self_attn.o_proj.bias",
        sinks="self_attn.sinks",
        experts=_HF_EXPERTS,
        latent=LatentNames(
            norm="input_layernorm.weight",
            q="self_attn.q_proj.weight",
            q_down="self_attn.q_a_proj.weight",
            q_norm="self_attn.q_a_layernorm.weight",
            q_up="self_attn.q_b_proj.weight",
            kv_down="self_attn.kv_a_proj_with_mqa.weight",
            kv_norm="self_attn.kv_a_layernorm.weight",
            kv_up="self_attn.kv_b_proj.weight",
        ),
    ),
    interleaved_rotary=False,
    gate_first=True,
    joins_parts=True,
    hybrid=_HF_HYBRID,
    experts=_HF_OF_FAMILIES,
    delta=delta_names.HF,
    norms=post_norms.HF,
    parallel=(_HF_FALCON, replace(_HF_FALCON, attention_norm="ln_attn.weight", mlp_norm="ln_mlp.weight")),
)
META = Convention(
    "Meta",
    Names(
        embedding="tok_embeddings.weight",
        layer="layers.{}.",
        attention_norm="attention_norm.weight",
        qkv=("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"),
        dense="attention.wo.weight",
        mlp_norm="ffn_norm.weight",
        mlp_in=("feed_forward.w1.weight", "feed_forward.w3.weight"),
        mlp_out="feed_forward.w2.weight",
        final_norm="norm.weight",
        head="output.weight",
    ),
    interleaved_rotary=True,
    gate_first=True,
)
_MEGATRON_LLM = Names(
    embedding="language_model.embedding.word_embeddings.weight",
    layer="language_model.encoder.layers.{}.",
    attention_norm="input_layernorm.weight",
    qkv=("self_attention.query_key_value.weight",),
    dense="self_attention.dense.weight",
    mlp_norm="post_attention_layernorm.weight",
    mlp_in=("mlp.dense_h_to_4h.weight",),
    mlp_out="mlp.dense_4h_to_h.weight",
    final_norm="language_model.encoder.final_layernorm.weight",
    head="language_model.lm_head",
)
MEGATRON_LLM = Convention(
    "Megatron-LLM",
    _MEGATRON_LLM,
    interleaved_rotary=True,
    gate_first=False,
    parallel=(
        replace(_MEGATRON_LLM, mlp_norm="input_layernorm.weight"),
        replace(_MEGATRON_LLM, mlp_norm="mlp_layernorm.weight"),
    ),
)
_MEGATRON_CORE = Names(
    embedding="embedding.word_embeddings.weight",
    layer="decoder.layers.{}.",
    attention_norm="self_attention.linear_qkv.layer_norm_weight",
    qkv=("self_attention.linear_qkv.weight",),
    dense="self_attention.linear_proj.weight",
    mlp_norm="mlp.linear_fc1.layer_norm_weight",
    mlp_in=("mlp.linear_fc1.weight",),
    mlp_out="mlp.linear_fc2.weight",
    final_norm="decoder.final_layernorm.weight",
    head="output_layer.weight",
    qkv_bias=("self_attention.linear_qkv.bias",),
    q_norm="self_attention.q_layernorm.weight",  # spelled so by both layer specs
    k_norm="self_attention.k_layernorm.weight",
    dense_bias="self_attention.linear_proj.bias",
    sinks="self_attention.core_attention.softmax_offset",
    experts=ExpertNames(
        norm="pre_mlp_layernorm.weight",
        router="mlp.router.weight",
        router_bias="mlp.router.bias",
        inner=("mlp.experts.linear_fc1.weight{}",),
        inner_bias=("mlp.experts.linear_fc1.bias{}",),
        outer="mlp.experts.linear_fc2.weight{}",
        outer_bias="mlp.experts.linear_fc2.bias{}",
        bias="mlp.router.expert_bias",
        shared_inner=("mlp.shared_experts.linear_fc1.weight",),
        shared_outer="mlp.shared_experts.linear_fc2.weight",
        shared_gate="mlp.shared_experts.gate_weight",
        latent_in="mlp.fc1_latent_proj.weight",
        latent_out="mlp.fc2_latent_proj.weight",
    ),
    latent=LatentNames(
        norm="input_layernorm.weight",
        q="self_attention.linear_q_proj.weight",
        q_down="self_attention.linear_q_down_proj.weight",
        q_norm="self_attention.linear_q_up_proj.layer_norm_weight",
        q_up="self_attention.linear_q_up_proj.weight",
        kv_down="self_attention.linear_kv_down_proj.weight",
        kv_norm="self_attention.linear_kv_up_proj.layer_norm_weight",
        kv_up="self_attention.linear_kv_up_proj.weight",
    ),
)
MEGATRON_CORE = Convention(
    "Megatron-Core",
    _MEGATRON_CORE,
    interleaved_rotary=False,
    gate_first=True,
    delta=delta_names.CORE,
    norms=post_norms.CORE,
    hybrid=replace(
        _MEGATRON_CORE,
        final_norm="decoder.final_norm.weight",
        mamba=MambaNames("mixer.in_proj.layer_norm_weight"),
    ),
)

CONVENTIONS = {convention.title: convention for convention in (HF, META, MEGATRON_LLM, MEGATRON_CORE)}
