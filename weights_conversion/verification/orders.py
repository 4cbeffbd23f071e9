"""What an order of rows is: that of rotary pairs, of heads, of ranks' parts, or a shift."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def permutation(a: Tensor, b: Tensor) -> Tensor | None:
    """`p` with b == a[p] and p not the identity, or None."""
    sorted_a, order_a = a.sort(stable=True)
    sorted_b, order_b = b.sort(stable=True)
    if not torch.equal(sorted_a, sorted_b) or torch.equal(a, b):
        return None
    result = torch.empty_like(order_a)
    result[order_b] = order_a
    return result


def heads(order: Tensor, dim: int) -> str | None:
    """Rows permuted within heads as the rotary orders do, or whole heads moved."""
    if order.numel() % dim:
        return None
    each = order.view(-1, dim)
    inner = each - torch.arange(each.shape[0]).unsqueeze(1) * dim
    to_pairs = torch.arange(dim).view(2, -1).T.flatten()
    if bool((inner == to_pairs).all()) or bool((inner == to_pairs.argsort()).all()):
        return "its rows are in the other rotary order: a permutation is missing, or was made twice"
    if bool((each == each[:, :1] + torch.arange(dim)).all()) and bool((each[:, 0] % dim == 0).all()):
        return "whole heads are in another order: query groups, or ranks, are mixed"
    return None


def blocks(order: Tensor, counts: Sequence[int]) -> str | None:
    """Equal blocks exchanged: the parts of tensor ranks."""
    for count in counts:
        if order.numel() % count:
            continue
        parts = order.view(count, -1)
        size = parts.shape[1]
        starts = parts[:, :1]
        if bool((parts == starts + torch.arange(size)).all()) and bool((starts % size == 0).all()):
            moved = [number for number in range(count) if int(starts[number]) // size != number]
            ranks = " and ".join(map(str, moved))
            return f"the parts of tensor ranks {ranks} (of {count}) are exchanged"
    return None


def shift(order: Tensor) -> str | None:
    """All rows moved on by the same number."""
    by = int(order[0])
    turned = torch.arange(order.numel()).roll(-by)
    return f"its rows are turned by {by}" if by and torch.equal(order, turned) else None
