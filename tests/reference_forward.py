"""A forward pass on Megatron-LLM's own stored conventions, for one whole (not cut) checkpoint, in plain torch.

Interleaved rotary pairs, `[up ; gate]`, grouped query_key_value, falcon's parallel attention with one or two norms.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate_pairs(x: Tensor, theta: float, factor: float) -> Tensor:
    """x [time, heads, d]: rows (2i, 2i + 1) turn by position / factor * theta^(-2i/d)."""
    time, _, d = x.shape
    frequency = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = torch.outer(torch.arange(time, dtype=torch.float64) / factor, frequency)[:, None, :]
    even, odd = x[..., 0::2].double(), x[..., 1::2].double()
    turned = torch.stack((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def norm(x: Tensor, flat: dict[str, Tensor], name: str, rms: bool, eps: float) -> Tensor:
    weight = flat[f"{name}.weight"]
    if rms:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
    return F.layer_norm(x, x.shape[-1:], weight, flat[f"{name}.bias"], eps)


def attention(x: Tensor, qkv: Tensor, dense: Tensor, args: argparse.Namespace) -> Tensor:
    n, k, d = args.num_attention_heads, args.num_attention_heads_kv, args.kv_channels
    time, per_group = x.shape[0], n // k
    mixed = (x @ qkv.T).view(time, k, per_group + 2, d)  # per group: its queries, its key, its value
    query = mixed[:, :, :per_group].reshape(time, n, d)
    key = mixed[:, :, per_group]
    value = mixed[:, :, per_group + 1]
    query = rotate_pairs(query, args.rope_theta, args.rope_scaling_factor)
    key = rotate_pairs(key, args.rope_theta, args.rope_scaling_factor)
    row, column = torch.arange(time)[:, None], torch.arange(time)[None, :]
    seen = column <= row
    if args.sliding_window_size:
        seen &= column > row - args.sliding_window_size
    heads = []
    for head in range(n):
        group = head // per_group
        scores = query[:, head] @ key[:, group].T / d**0.5
        heads.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value[:, group])
    return torch.cat(heads, -1) @ dense.T


def logits(flat: dict[str, Tensor], args: argparse.Namespace, tokens: Tensor) -> Tensor:
    """[time] token ids -> [time, rows] logits in float32; every hyper-parameter comes from the checkpoint's args."""
    flat = {name: tensor.float() for name, tensor in flat.items()}
    rms, eps = args.use_rms_norm, args.layernorm_epsilon
    hidden = flat["embedding.word_embeddings.weight"][tokens]
    for i in range(args.num_layers):
        p = f"encoder.layers.{i}"
        first = norm(hidden, flat, f"{p}.input_layernorm", rms, eps)
        attended = attention(
            first, flat[f"{p}.self_attention.query_key_value.weight"], flat[f"{p}.self_attention.dense.weight"], args
        )
        if args.parallel_attn:
            second = norm(hidden, flat, f"{p}.mlp_layernorm", rms, eps) if args.parallel_layernorm else first
        else:
            hidden = hidden + attended
            second = norm(hidden, flat, f"{p}.post_attention_layernorm", rms, eps)
        inner = second @ flat[f"{p}.mlp.dense_h_to_4h.weight"].T
        if args.glu_activation == "swiglu":
            up, gate = inner.chunk(2, -1)
            inner = up * F.silu(gate)
        else:
            inner = F.gelu(inner)
        out = inner @ flat[f"{p}.mlp.dense_4h_to_h.weight"].T
        hidden = hidden + attended + out if args.parallel_attn else hidden + out
    hidden = norm(hidden, flat, "encoder.final_layernorm", rms, eps)
    head = flat["embedding.word_embeddings.weight"] if args.tie_embed_logits else flat["lm_head"]
    return hidden @ head.T
