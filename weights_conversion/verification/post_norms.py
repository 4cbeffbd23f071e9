"""Stored names of the norms of families that have some behind attention and MLP too, by side: fields of Names."""

from __future__ import annotations

HF = {
    "gemma3": {
        "after_attention": "post_attention_layernorm.weight",
        "mlp_norm": "pre_feedforward_layernorm.weight",
        "after_mlp": "post_feedforward_layernorm.weight",
    }
}
CORE = {
    "gemma3": {
        "after_attention": "self_attention.linear_proj.post_layernorm.weight",
        "after_mlp": "mlp.linear_fc2.post_layernorm.weight",
    }
}
