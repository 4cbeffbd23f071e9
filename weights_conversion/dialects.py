"""The three things in which HF, Meta, Megatron-LLM and Megatron-Core differ: names, rotary order, gate/up order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Dialect:
    """`renames` maps the names that architecture rows use (HF's, or Megatron-LLM's) to this dialect's own.

    `interleaved` says that rotary pairs are neighbouring rows of a head (else: the head's two halves). `up_first` says
    that a fused GLU stores [up ; gate] (else [gate ; up]); it means nothing for HF and Meta, which store them apart.
    """

    name: str
    interleaved: bool
    up_first: bool = False
    renames: Mapping[str, str] = field(default_factory=dict, hash=False)

    def spell(self, name: str) -> str:
        """`name` as this dialect spells it; a name without an entry is spelled the same."""
        return self.renames.get(name, name)

    def spellings(self, name: str) -> tuple[str, ...]:
        """Every name under which a rank file holds it: Megatron-Core's norms have two."""
        spelled = self.spell(name)
        return (spelled, CORE_LOCAL_NORMS[spelled]) if spelled in CORE_LOCAL_NORMS else (spelled,)


HF = Dialect("Hugging Face", interleaved=False)

META = Dialect(
    "Meta",
    interleaved=True,
    renames={
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.layers.{}.input_layernorm.weight": "layers.{}.attention_norm.weight",
        "model.layers.{}.self_attn.q_proj.weight": "layers.{}.attention.wq.weight",
        "model.layers.{}.self_attn.k_proj.weight": "layers.{}.attention.wk.weight",
        "model.layers.{}.self_attn.v_proj.weight": "layers.{}.attention.wv.weight",
        "model.layers.{}.self_attn.o_proj.weight": "layers.{}.attention.wo.weight",
        "model.layers.{}.post_attention_layernorm.weight": "layers.{}.ffn_norm.weight",
        "model.layers.{}.mlp.gate_proj.weight": "layers.{}.feed_forward.w1.weight",
        "model.layers.{}.mlp.up_proj.weight": "layers.{}.feed_forward.w3.weight",
        "model.layers.{}.mlp.down_proj.weight": "layers.{}.feed_forward.w2.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "output.weight",
    },
)

MEGATRON_LLM = Dialect("Megatron-LLM", interleaved=True, up_first=True)

# Megatron-Core names its layer norms by the module that holds them: Transformer-Engine fuses each into the linear layer
# behind it, the local layer spec keeps them apart. torch_dist stores the Transformer-Engine spelling for both.
_CORE_NAMES = {
    "embedding.word_embeddings.weight": "embedding.word_embeddings.weight",
    "encoder.layers.{}.input_layernorm.weight": "decoder.layers.{}.self_attention.linear_qkv.layer_norm_weight",
    "encoder.layers.{}.self_attention.query_key_value.weight": "decoder.layers.{}.self_attention.linear_qkv.weight",
    "encoder.layers.{}.self_attention.dense.weight": "decoder.layers.{}.self_attention.linear_proj.weight",
    "encoder.layers.{}.post_attention_layernorm.weight": "decoder.layers.{}.mlp.linear_fc1.layer_norm_weight",
    "encoder.layers.{}.mlp.dense_h_to_4h.weight": "decoder.layers.{}.mlp.linear_fc1.weight",
    "encoder.layers.{}.mlp.dense_4h_to_h.weight": "decoder.layers.{}.mlp.linear_fc2.weight",
    "encoder.final_layernorm.weight": "decoder.final_layernorm.weight",
    "lm_head": "output_layer.weight",
}
CORE_LOCAL_NORMS = {
    "decoder.layers.{}.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.{}.input_layernorm.weight",
    "decoder.layers.{}.mlp.linear_fc1.layer_norm_weight": "decoder.layers.{}.pre_mlp_layernorm.weight",
}

MEGATRON_CORE = Dialect("Megatron-Core", interleaved=False, renames=_CORE_NAMES)
