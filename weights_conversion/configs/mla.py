"""Multi-head latent attention: config.json <-> Mla <-> Megatron-Core's args.

Sources: transformers' modeling_deepseek_v3.py, Megatron-Core's multi_latent_attention.py. Its norms of the latents are
behind --qk-layernorm there, which here names the norms of each head that other families have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weights_conversion.config import Mla, ModelConfig

HF_KEYS = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
# Transformers' and the original code's norms of the latents have it, whatever rms_norm_eps says.
LATENT_EPSILON = 1e-6


def read_hf(full: Mapping[str, Any], own_head_dim: bool = False) -> Mla | list[str]:
    """The sizes of a config.json, or what is wrong, in words that follow "has". `full` has the class's defaults.

    `own_head_dim`: the class takes head_dim, where it is stated, for the part of a head that turns.
    """
    values, problems = {}, []
    for field, key in HF_KEYS.items():
        value = full.get(key)
        if value is None and field == "q_lora_rank":
            continue
        if type(value) is not int or value <= 0:
            problems.append(f"{key} {value!r}, where a positive int was expected")
        else:
            values[field] = value
    if full.get("num_key_value_heads") not in (None, full.get("num_attention_heads")):
        problems.append(
            f"num_key_value_heads {full['num_key_value_heads']!r} and num_attention_heads "
            f"{full.get('num_attention_heads')!r}, where latent attention has one number"
        )
    stated = full.get("qk_head_dim")  # a sum, which transformers writes beside its terms
    if not problems and stated is not None and stated != values["qk_head_dim"] + values["qk_pos_emb_head_dim"]:
        problems.append(f"qk_head_dim {stated!r}, which is not qk_nope_head_dim + qk_rope_head_dim")
    if not problems and own_head_dim and "head_dim" in full and full["head_dim"] != values["qk_pos_emb_head_dim"]:
        problems.append(
            f"head_dim {full['head_dim']!r} and qk_rope_head_dim {values['qk_pos_emb_head_dim']}, where transformers "
            "makes its angles by the former; remove head_dim"
        )
    return problems or Mla(**values)


def write_hf(mla: Mla, result: dict[str, Any]) -> None:
    result.update({key: getattr(mla, field) for field, key in HF_KEYS.items()})
    if "qk_head_dim" in result:
        result["qk_head_dim"] = mla.qk_head_dim + mla.qk_pos_emb_head_dim


READ = frozenset({*HF_KEYS, "multi_latent_attention", "rope_type", "mscale_all_dim"})


def read_core(args: Mapping[str, Any]) -> Mla | list[str] | None:
    """The sizes that Megatron-Core's args state, or what is wrong; None: another attention.

    Each file of Megatron-LM has these args, with the defaults of its parser: they count with multi_latent_attention.
    """
    if not args.get("multi_latent_attention"):
        return None
    values, problems = {}, []
    for field in HF_KEYS:
        value = args.get(field)
        if value is None and field == "q_lora_rank":
            continue
        if type(value) is not int or value <= 0:
            problems.append(f"{field} {value!r}, where a positive int was expected")
        else:
            values[field] = value
    if args.get("qk_layernorm") is False:
        problems.append("no norms of the latents (qk_layernorm False), which every model with latent attention has")
    if args.get("group_query_attention") and args.get("num_query_groups") != args.get("num_attention_heads"):
        problems.append(f"num_query_groups {args.get('num_query_groups')!r}, where latent attention has no groups")
    for name in ("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor"):
        if args.get(name) not in (None, 1):
            problems.append(f"{name} {args[name]!r}, which latent attention does not use")
    return problems or Mla(**values)


def write_core(config: ModelConfig) -> dict[str, Any]:
    """Args of the attention; of any other model, that it is another."""
    mla = config.mla
    if mla is None:
        return {"multi_latent_attention": False}
    return {
        "multi_latent_attention": True,
        **{field: getattr(mla, field) for field in HF_KEYS},
        "rope_type": _rope_type(config),
        "qk_layernorm": True,
        "kv_channels": mla.v_head_dim,
        "num_query_groups": 1,
        "group_query_attention": False,
    }


def _rope_type(config: ModelConfig) -> str:
    return "rope" if config.rope_scaling is None else "yarn"


def core_flags(config: ModelConfig) -> list[str]:
    """Flags of Megatron-LM, none of which --use-checkpoint-args restores."""
    mla = config.mla
    if mla is None:
        return []
    sizes = [f"--{field.replace('_', '-')} {size}" for field in HF_KEYS if (size := getattr(mla, field)) is not None]
    return ["--multi-latent-attention", *sizes, "--qk-layernorm", f"--rope-type {_rope_type(config)}"]


def core_warnings(config: ModelConfig) -> list[str]:
    """What Megatron-Core does otherwise than the model, whatever flags it is given."""
    if config.mla is None:
        return []
    warnings = []
    if config.mla.q_lora_rank is None:
        warnings.append(
            "Megatron-Core 0.19 cannot hold latent attention without q_lora_rank: it puts a norm of its own in front "
            "of linear_q_proj, and asks for a linear_q_proj.layer_norm_weight that this model does not have; train it "
            "with 0.18 or older"
        )
    if config.layernorm_epsilon != LATENT_EPSILON:
        warnings.append(
            f"Megatron-Core has one epsilon for all norms, {config.layernorm_epsilon:g} here; the norms of the latents "
            f"have {LATENT_EPSILON:g} in Hugging Face's model, so that logits differ in the fifth digit, and no file "
            "can mend it"
        )
    return warnings
