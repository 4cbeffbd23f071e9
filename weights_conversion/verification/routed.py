"""Experts and their router in the forward pass, by the rules of transformers' models.

Only the experts that a token reaches are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weights_conversion.config import ModelConfig, Moe
from weights_conversion.verification.conventions import Convention
from weights_conversion.verification.linear import Weights, gated, linear, vector

_SMALL = 1e-20  # added to a sum of sigmoids before it divides


def experts(config: ModelConfig, convention: Convention, weights: Weights, prefix: str, x: Tensor) -> Tensor:
    """x (prompts, length, hidden) through the experts that its router chooses, and through the shared ones."""
    moe, names = config.moe, convention.names_for(config).experts
    assert moe is not None  # the caller has looked
    assert names is not None
    tokens = x.flatten(0, 1)
    logits = linear(weights, prefix + names.router, tokens, 0, moe.num_experts)
    bias = vector(weights, prefix + names.bias, moe.num_experts) if moe.expert_bias else torch.zeros(moe.num_experts)
    chosen, weight = route(moe, config.family, logits, bias)
    out = torch.zeros_like(tokens)
    for number in torch.unique(chosen).tolist():
        token, place = (chosen == number).nonzero(as_tuple=True)
        inner = [prefix + name.format(number) for name in names.inner]
        each = gated(convention, weights, inner, tokens[token], moe.ffn_hidden_size)
        each = linear(weights, prefix + names.outer.format(number), each, 0, config.hidden_size)
        out.index_add_(0, token, each * weight[token, place, None])
    if moe.shared_ffn_hidden_size:
        inner = [prefix + name for name in names.shared_inner]
        shared = gated(convention, weights, inner, tokens, moe.shared_ffn_hidden_size)
        shared = linear(weights, prefix + names.shared_outer, shared, 0, config.hidden_size)
        if moe.shared_gate:
            shared = shared * linear(weights, prefix + names.shared_gate, tokens, 0, 1).sigmoid()
        out = out + shared
    return out.view_as(x)


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
