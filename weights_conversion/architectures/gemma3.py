"""Gemma 3: norms behind attention and MLP too, all stored around zero on both sides; windows on five layers of six.

Megatron-Bridge alone has a place for it: its provider's layers hold the norms behind, two ropes, and a scale of the
embedding, none of which Megatron-LM's own code has. From 4B on the hub's repositories have vision around the text
model; 270M and 1B are text alone.
"""

from weights_conversion.architectures.family import Family, Outer, Signs
from weights_conversion.architectures.gated_delta import below
from weights_conversion.architectures.llama import ATTENTION, EMBEDDING, LAST
from weights_conversion.mapping.parameters import ROW, glu, same

_LAYER = (
    *ATTENTION,
    same(
        "decoder.layers.{layer}.self_attention.linear_proj.post_layernorm.weight",
        "model.layers.{layer}.post_attention_layernorm.weight",
        ("hidden",),
    ),
    same(
        "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
        "model.layers.{layer}.pre_feedforward_layernorm.weight",
        ("hidden",),
    ),
    glu(
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
        gate="model.layers.{layer}.mlp.gate_proj.weight",
        up="model.layers.{layer}.mlp.up_proj.weight",
    ),
    same(
        "decoder.layers.{layer}.mlp.linear_fc2.weight",
        "model.layers.{layer}.mlp.down_proj.weight",
        ("hidden", "ffn"),
        ROW,
    ),
    same(
        "decoder.layers.{layer}.mlp.linear_fc2.post_layernorm.weight",
        "model.layers.{layer}.post_feedforward_layernorm.weight",
        ("hidden",),
    ),
)

GEMMA3 = Family(
    "gemma3",
    below("model.language_model", (EMBEDDING, *_LAYER, *LAST)),
    tied_head="lm_head.weight",
    model_types=("gemma3_text", "gemma3"),
    hf_class="Gemma3ForCausalLM",
    outer=Outer(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        others=tuple(
            f"{model}{part}." for model in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
        ),
        usual=False,
        outside=True,
    ),
    repositories={
        "4": "google/gemma-3-4b-pt",
        "0.27": "google/gemma-3-270m",
        "1": "google/gemma-3-1b-pt",
        "12": "google/gemma-3-12b-pt",
        "27": "google/gemma-3-27b-pt",
    },
    defaults={"layernorm_epsilon": 1e-6, "rope_theta": 1e6, "local_rope_theta": 1e4, "query_pre_attn_scalar": 256},
    features=frozenset({"qk_layernorm", "layernorm_zero_centered_gamma", "post_norms"}),
    ropes=("default", "linear"),
    windowed=True,
    own_args={"swiglu": False, "openai_gelu": True},
    target="megatron-bridge",
    bridge_only="norms behind attention and MLP, a rope of its own for layers with a window, and scaled embeddings",
    signs=tuple(Signs(post_norms=True, qk_norms=True, window=window) for window in (True, False)),
)
