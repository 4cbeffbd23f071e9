"""What sets HF, Meta, Megatron-LLM and Megatron-Core apart: names, rotary order, gate/up order, what they can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Dialect:
    """`renames` maps the names that architecture rows use (HF's, or Megatron-Core's) to this dialect's own.

    `interleaved` says that rotary pairs are neighbouring rows of a head (else: the head's two halves). `up_first` says
    that a fused GLU stores [up ; gate] (else [gate ; up]); it means nothing for HF and Meta, which store them apart.
    `alone` is what rows have behind model., and names of this dialect have not; `outside` what these have in front.

    `megatron` says that tensors are Megatron's (fused), not HF's (apart). The rest is about the two Megatrons: below
    `model`, a rank file's names begin with `prefix`; `tied_head` is the last stage's copy of a tied embedding;
    `alternatives` are second spellings of (respelled) names, by the first; `dist_alternatives` those of torch_dist.
    """

    name: str
    interleaved: bool
    up_first: bool = False
    renames: Mapping[str, str] = field(default_factory=dict, hash=False)
    alone: str = ""
    outside: str = ""
    megatron: bool = False
    prefix: str = ""
    tied_head: str = ""
    alternatives: Mapping[str, str] = field(default_factory=dict, hash=False)
    dist_alternatives: Mapping[str, str] = field(default_factory=dict, hash=False)
    parallel_attention: bool = True  # beside the MLP, as falcon has it
    ties_heads: bool = True  # of the sequential families
    splits_groups: bool = False  # several tensor ranks may share a query group
    features: tuple[str, ...] = ()  # ModelConfig fields that it can express; in order, since a digest takes their repr
    ropes: tuple[str, ...] = ("default", "linear")

    def spell(self, name: str) -> str:
        """`name` as this dialect spells it; a name without an entry is spelled the same."""
        if self.alone and name.startswith(f"model.{self.alone}"):
            return name.replace(self.alone, "", 1)
        if self.outside:
            return self.outside + name.replace(self.outside, "", 1)
        return self.renames.get(name, name)

    def spellings(self, name: str) -> tuple[str, ...]:
        """Every name under which a rank file holds it: Megatron-Core's norms have two."""
        spelled = self.spell(name)
        return (spelled, self.alternatives[spelled]) if spelled in self.alternatives else (spelled,)

    def live(self, name: str) -> str:
        """The name in a rank file of what a prediction layer holds: since 0.18 its inner layer is mtp_model_layer."""
        return self.spell(name).replace(".transformer_layer.", ".mtp_model_layer.")

    def dist_spellings(self, name: str) -> tuple[str, ...]:
        """Every name under which a torch_dist checkpoint is to have it."""
        spelled = self.spell(name)
        return (spelled, self.dist_alternatives[spelled]) if spelled in self.dist_alternatives else (spelled,)

    def other_spelling(self, stored: str) -> str:
        """The other name of a tensor (with its layer's number) that has two, of which a file needs but one."""
        for live, older in ((".mtp_model_layer.", ".transformer_layer."), (".mixer.conv1d_", ".mixer.conv1d.")):
            if live in stored:
                return stored.replace(live, older)
        for pair in self.alternatives.items():
            ends = [spelled.partition("{layer}")[2] for spelled in pair]
            for this, other in (ends, reversed(ends)):
                if stored.endswith(this):
                    return stored.removesuffix(this) + other
        return stored

    def rank_name(self, spelled: str) -> str:
        """Name below `model` in a rank file."""
        return self.prefix + spelled


HF = Dialect("Hugging Face", interleaved=False)
# A text model that has no repository around it, of a family whose rows have the names in one.
HF_TEXT = Dialect("Hugging Face", interleaved=False, alone="language_model.")
# The same of a family whose repositories have the name of the text model in front of its own names.
HF_OUTSIDE = Dialect("Hugging Face", interleaved=False, outside="language_model.")

META = Dialect(
    "Meta",
    interleaved=True,
    renames={
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.layers.{layer}.input_layernorm.weight": "layers.{layer}.attention_norm.weight",
        "model.layers.{layer}.self_attn.q_proj.weight": "layers.{layer}.attention.wq.weight",
        "model.layers.{layer}.self_attn.k_proj.weight": "layers.{layer}.attention.wk.weight",
        "model.layers.{layer}.self_attn.v_proj.weight": "layers.{layer}.attention.wv.weight",
        "model.layers.{layer}.self_attn.o_proj.weight": "layers.{layer}.attention.wo.weight",
        "model.layers.{layer}.post_attention_layernorm.weight": "layers.{layer}.ffn_norm.weight",
        "model.layers.{layer}.mlp.gate_proj.weight": "layers.{layer}.feed_forward.w1.weight",
        "model.layers.{layer}.mlp.up_proj.weight": "layers.{layer}.feed_forward.w3.weight",
        "model.layers.{layer}.mlp.down_proj.weight": "layers.{layer}.feed_forward.w2.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "output.weight",
    },
)

# Megatron-Core's names -> those that Megatron-LLM's training writes. Falcon's norms have no place in Megatron-Core, so
# its rows have Megatron-LLM's names for them, below decoder.
_LLM_NAMES = {
    "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight":
        "encoder.layers.{layer}.input_layernorm.weight",
    "decoder.layers.{layer}.self_attention.linear_qkv.weight":
        "encoder.layers.{layer}.self_attention.query_key_value.weight",
    "decoder.layers.{layer}.self_attention.linear_proj.weight": "encoder.layers.{layer}.self_attention.dense.weight",
    "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight":
        "encoder.layers.{layer}.post_attention_layernorm.weight",
    "decoder.layers.{layer}.mlp.linear_fc1.weight": "encoder.layers.{layer}.mlp.dense_h_to_4h.weight",
    "decoder.layers.{layer}.mlp.linear_fc2.weight": "encoder.layers.{layer}.mlp.dense_4h_to_h.weight",
    "decoder.final_layernorm.weight": "encoder.final_layernorm.weight",
    "decoder.final_layernorm.bias": "encoder.final_layernorm.bias",
    "output_layer.weight": "lm_head",
} | {
    f"decoder.layers.{{layer}}.{norm}.{kind}": f"encoder.layers.{{layer}}.{norm}.{kind}"
    for norm in ("input_layernorm", "mlp_layernorm")
    for kind in ("weight", "bias")
}  # fmt: skip

MEGATRON_LLM = Dialect(
    "Megatron-LLM",
    interleaved=True,
    up_first=True,
    renames=_LLM_NAMES,
    megatron=True,
    prefix="language_model.",
    tied_head="word_embeddings_for_head.weight",  # beside language_model, not in it
    ties_heads=False,
)

# Megatron-Core names its layer norms by the module that holds them: Transformer-Engine fuses each into the linear layer
# behind it, the local layer spec keeps them apart. torch_dist stores the Transformer-Engine spelling for both.
_CORE_LOCAL_NORMS = {
    "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight":
        "decoder.layers.{layer}.input_layernorm.weight",
    "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight": "decoder.layers.{layer}.pre_mlp_layernorm.weight",
}  # fmt: skip
# In torch_dist alone: the local spec calls the norm in front of experts after the linear layer of a dense MLP
# (gpt_layer_specs.py renames it whatever the layer is), and a run asks for the name of its own spec.
_CORE_DIST_NORMS = {
    "decoder.layers.{layer}.pre_mlp_layernorm.weight": "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
}

MEGATRON_CORE = Dialect(
    "Megatron-Core",
    interleaved=False,
    megatron=True,
    tied_head="output_layer.weight",
    alternatives=_CORE_LOCAL_NORMS,
    dist_alternatives=_CORE_DIST_NORMS,
    parallel_attention=False,
    splits_groups=True,
    features=(
        *("add_qkv_bias", "qk_layernorm", "moe", "mla", "partial_rotary", "hybrid", "gated_delta"),
        *("attention_output_gate", "layernorm_zero_centered_gamma", "post_norms"),
    ),
    ropes=("default", "linear", "llama3", "yarn"),
)

# One module for each expert (SequentialMLP), in rank files: torch_dist has the same names for both.
_EACH_EXPERT = {
    f"{layer}mlp.experts.{linear}.{kind}{{expert}}": f"{layer}mlp.experts.local_experts.{{expert}}.{linear}.{kind}"
    for layer in ("decoder.layers.{layer}.", "mtp.layers.{layer}.transformer_layer.")
    for linear in ("linear_fc1", "linear_fc2")
    for kind in ("weight", "bias")
}
MEGATRON_CORE_EACH = dataclasses.replace(MEGATRON_CORE, renames=_EACH_EXPERT)
