"""Experts and their router in the forward pass, by the rules of transformers' models.

Only the experts that a token reaches are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weights_conversion.config import ModelConfig, Moe
from weights_conversion.verification.conventions import Convention, block_of
from weights_conversion.verification.linear import Weights, halves, linear, vector, within
from weights_conversion.verification.names import ExpertNames

_SMALL = 1e-20  # added to a sum of sigmoids before it divides


def experts(config: ModelConfig, convention: Convention, weights: Weights, prefix: str, x: Tensor) -> Tensor:
    """x (prompts, length, hidden) through the experts that its router chooses, and through the shared ones."""
    moe, names = config.moe, convention.names_for(config).experts
    assert moe is not None  # the caller has looked
    assert names is not None
    tokens = x.flatten(0, 1)
    logits = linear(weights, prefix + names.router, tokens, 0, moe.num_experts)
    if moe.biased:
        logits = logits + vector(weights, prefix + names.router_bias, moe.num_experts)
    bias = vector(weights, prefix + names.bias, moe.num_experts) if moe.expert_bias else torch.zeros(moe.num_experts)
    chosen, weight = route(moe, config.family, logits, bias)
    inputs = (
        tokens if moe.latent_size is None else linear(weights, prefix + names.latent_in, tokens, 0, moe.latent_size)
    )
    out = torch.zeros_like(inputs)
    for number in torch.unique(chosen).tolist():
        token, place = (chosen == number).nonzero(as_tuple=True)
        each = _expert(config, convention, weights, prefix, inputs[token], number)
        out.index_add_(0, token, each * weight[token, place, None])
    if moe.latent_size is not None:
        out = linear(weights, prefix + names.latent_out, out, 0, config.hidden_size)
    if moe.shared_ffn_hidden_size:
        inner = [prefix + name for name in names.shared_inner]
        shared = within(config, convention, weights, inner, tokens, moe.shared_ffn_hidden_size)
        shared = linear(weights, prefix + names.shared_outer, shared, 0, config.hidden_size)
        if moe.shared_gate:
            shared = shared * linear(weights, prefix + names.shared_gate, tokens, 0, 1).sigmoid()
        out = out + shared
    return out.view_as(x)


def _expert(
    config: ModelConfig, convention: Convention, weights: Weights, prefix: str, x: Tensor, number: int
) -> Tensor:
    """x (tokens, hidden, or rows of a projection) through one expert."""
    moe, names, block = config.moe, convention.names_for(config).experts, block_of(config)
    assert moe is not None
    assert names is not None
    inner = [prefix + name.format(number) for name in names.inner]
    outer = prefix + names.outer.format(number)
    if block.alpha is None:
        between = within(config, convention, weights, inner, x, moe.ffn_hidden_size)
        return linear(weights, outer, between, 0, x.shape[-1])
    gate, up = halves(convention, weights, inner, x, moe.ffn_hidden_size)
    if moe.biased:
        gate_bias, up_bias = _biases(convention, weights, prefix, moe, names, number)
        gate, up = gate + gate_bias, up + up_bias
    if moe.clamp is not None:
        gate, up = gate.clamp(max=moe.clamp), up.clamp(-moe.clamp, moe.clamp)
    out = linear(weights, outer, (up + 1) * gate * torch.sigmoid(gate * block.alpha), 0, config.hidden_size)
    return out + vector(weights, prefix + names.outer_bias.format(number), config.hidden_size) if moe.biased else out


def _biases(
    convention: Convention, weights: Weights, prefix: str, moe: Moe, names: ExpertNames, number: int
) -> tuple[Tensor, Tensor]:
    """Of gate and up, one tensor for each or one for both."""
    found = [prefix + name.format(number) for name in names.inner_bias]
    size = moe.ffn_hidden_size * (2 if len(found) == 1 else 1)
    parts = torch.cat([vector(weights, name, size) for name in found]).chunk(2)
    return (parts[0], parts[1]) if convention.gate_first else (parts[1], parts[0])


def route(moe: Moe, family: str, logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(experts of each token, their weights), both (tokens, topk), of `logits` (tokens, experts)."""
    sigmoid = moe.score_function == "sigmoid"
    scores = logits.sigmoid() if sigmoid else logits.softmax(dim=-1)
    choice = scores + bias
    if moe.num_groups and moe.group_topk and moe.num_groups > 1:
        groups = choice.unflatten(-1, (moe.num_groups, -1))
        # The sum of a group's best two; DeepSeek-V2, which has no bias, takes the best one.
        best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1) if sigmoid else groups.amax(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(moe.group_topk, dim=-1).indices, True)
        choice = groups.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    chosen = choice.topk(moe.topk, dim=-1).indices
    weight = scores.gather(1, chosen)
    if not moe.pre_softmax:
        weight = weight / (weight.sum(-1, keepdim=True) + (_SMALL if sigmoid else 0.0))
    return chosen, weight * (moe.scaling_factor or 1.0)
