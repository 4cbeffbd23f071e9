"""What is wrong with experts: what no router does, and what a class of transformers cannot express."""

from __future__ import annotations

from weights_conversion.config import Moe
from weights_conversion.configs import moe_layers
from weights_conversion.configs.config_class import ConfigClass


def impossible(moe: Moe) -> list[str]:
    """What no router does, or none of Megatron-Core's, in words that follow "has"."""
    wrong = []
    if not any(moe.layers):
        wrong.append("no layer with experts, where a mixture of experts has one at least")
    if moe.num_experts == 1:
        wrong.append("1 expert, where a mixture of experts has two at least")
    elif moe.topk > moe.num_experts:
        wrong.append(f"{moe.topk} experts per token, and only {moe.num_experts} experts")
    if moe.num_groups is not None and moe.group_topk is not None:
        if moe.num_experts % moe.num_groups:
            wrong.append(f"{moe.num_experts} experts, which cannot be divided among {moe.num_groups} groups")
        elif moe.group_topk > moe.num_groups:
            wrong.append(f"{moe.group_topk} groups per token, and only {moe.num_groups} groups")
        elif moe.topk > moe.group_topk * (moe.num_experts // moe.num_groups):
            wrong.append(f"{moe.topk} experts per token, more than {moe.group_topk} groups hold")
        elif moe.score_function == "sigmoid" and moe.num_experts == moe.num_groups:
            wrong.append("groups of 1 expert, where each counts by the sum of its best 2")
    if moe.topk == 1 and moe.score_function == "softmax" and not moe.pre_softmax:
        wrong.append(
            "1 expert per token, whose score is made to be 1: Megatron-Core has no such router (norm_topk_prob false "
            "is its --moe-router-pre-softmax)"
        )
    return wrong


def misfits(known: ConfigClass, moe: Moe, family: str) -> list[str]:
    """What a class of transformers cannot express of experts that Megatron's args state, in words that follow "holds a
    model"."""
    keys = known.experts
    if keys is None:
        return [f"with a mixture of experts (num_experts is {moe.num_experts}), which {family} does not have"]
    wrong, lacks = [], f"which {family} does not have"
    if moe.score_function != keys.score:
        wrong.append(f"with router scores by {moe.score_function} (moe_router_score_function), where {family} has "
                     f"{keys.score}")  # fmt: skip
    elif keys.norm is not None and keys.score == "softmax" and keys.norm == moe.pre_softmax:
        wrong.append(f"with moe_router_pre_softmax {moe.pre_softmax}, where {family} has {not moe.pre_softmax}")
    if moe.scaling_factor is not None and not keys.scaled:
        wrong.append(f"with router scores times moe_router_topk_scaling_factor {moe.scaling_factor:g}, {lacks}")
    if moe.num_groups is not None and not keys.groups:
        wrong.append(f"with experts in groups (moe_router_num_groups is {moe.num_groups}), {lacks}")
    for what, has, there in (
        ("a bias of its router (moe_router_enable_expert_bias)", keys.bias, moe.expert_bias),
        ("shared experts (moe_shared_expert_intermediate_size)", bool(keys.shared), moe.shared_ffn_hidden_size > 0),
        ("a gate of its shared experts (moe_shared_expert_gate)", keys.gate, moe.shared_gate),
        ("biases of linear layers (add_bias_linear)", keys.biased, moe.biased),
        ("a clamped activation (activation_func_clamp_value)", bool(keys.clamp), moe.clamp is not None),
    ):
        if has != there:
            wrong.append(f"with {what}, {lacks}" if there else f"without {what}, which {family} has")
    if moe.latent_size is not None and not keys.latent:
        wrong.append(
            f"with experts on projections of its hidden states (moe_latent_size is {moe.latent_size}), {lacks}"
        )
    if keys.shared == "n_shared_experts" and moe.shared_ffn_hidden_size % moe.ffn_hidden_size:
        wrong.append(f"with shared experts of size {moe.shared_ffn_hidden_size}, where {family} has a multiple of an "
                     f"expert's, {moe.ffn_hidden_size}")  # fmt: skip
    if any(moe.layers) and (layers := moe_layers.misfit(keys, moe.layers)):
        wrong.append(f"with {layers} (moe_layer_freq), {lacks}")
    return wrong
