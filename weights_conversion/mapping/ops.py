"""How rows of one Megatron tensor relate to rows of the Hugging Face tensors that it is made of.

An op is a list of view pairs, (Megatron view, HF view), of equal shape: copying right to left converts to Megatron,
left to right converts back. So every op is its own inverse by construction, and both directions are one strided copy.

Ops work on *units*: the smallest slices that convert on their own (a row, a GLU row pair, a query group). A tensor of
any size is converted some units at a time, which is what bounds memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from weights_conversion.config import ModelConfig
from weights_conversion.mapping.dialects import HF, Dialect

if TYPE_CHECKING:  # families are read by --help, which answers without torch
    from torch import Tensor

Range = tuple[int, int]  # first row, row behind the last


@dataclass(frozen=True)
class Context:
    """What an op may need to know: the model, the HF-side dialect (HF or Meta), and the Megatron-side dialect."""

    config: ModelConfig
    hf: Dialect
    megatron: Dialect

    @classmethod
    def of(cls, config: ModelConfig, dialect: Dialect, hf: Dialect = HF) -> Context:
        """For tensors that `dialect`, one of Megatron's, stores and that are turned into `hf`'s."""
        return cls(config, hf, dialect)

    @property
    def permutes_rotary(self) -> bool:
        return self.hf.interleaved != self.megatron.interleaved


class Op(Protocol):
    def units(self, rows: int, config: ModelConfig) -> int:
        """How many units a Megatron tensor of `rows` rows has."""
        ...

    def megatron_rows(self, start: int, stop: int, rows: int, ctx: Context) -> tuple[Range, ...]:
        """Rows of the Megatron tensor that hold units start..stop, as few ranges as possible."""
        ...

    def hf_rows(self, start: int, stop: int, config: ModelConfig) -> tuple[Range, ...]:
        """Rows that hold units start..stop, one range for each HF tensor."""
        ...

    def moves_rows_only(self, ctx: Context) -> bool:
        """Whether the tensors of both sides are the same, pair by pair, so that nothing needs to be copied."""
        ...

    def views(self, megatron: Sequence[Tensor], hf: Sequence[Tensor], ctx: Context) -> list[tuple[Tensor, Tensor]]:
        """Pairs of views of equal shape. `megatron` has one tensor per range of `megatron_rows`, `hf` per HF tensor."""
        ...


def to_megatron(op: Op, megatron: Sequence[Tensor], hf: Sequence[Tensor], ctx: Context) -> None:
    """Fill `megatron` from `hf` (casting, where the dtypes differ)."""
    for megatron_view, hf_view in op.views(megatron, hf, ctx):
        megatron_view.copy_(hf_view)


def to_hf(op: Op, megatron: Sequence[Tensor], hf: Sequence[Tensor], ctx: Context) -> None:
    """Fill `hf` from `megatron` (casting, where the dtypes differ)."""
    for megatron_view, hf_view in op.views(megatron, hf, ctx):
        hf_view.copy_(megatron_view)


@dataclass(frozen=True)
class Copy:
    """One HF tensor, the same rows in the same order. A unit is a row."""

    def units(self, rows: int, config: ModelConfig) -> int:
        return rows

    def megatron_rows(self, start: int, stop: int, rows: int, ctx: Context) -> tuple[Range, ...]:
        return ((start, stop),)

    def hf_rows(self, start: int, stop: int, config: ModelConfig) -> tuple[Range, ...]:
        return ((start, stop),)

    def moves_rows_only(self, ctx: Context) -> bool:
        return True

    def views(self, megatron: Sequence[Tensor], hf: Sequence[Tensor], ctx: Context) -> list[tuple[Tensor, Tensor]]:
        return list(zip(megatron, hf, strict=True))


@dataclass(frozen=True)
class FuseGLU(Copy):
    """HF's (gate, up) one above the other, in the order of the Megatron dialect. A unit is one row of each."""

    def units(self, rows: int, config: ModelConfig) -> int:
        return rows // 2

    def megatron_rows(self, start: int, stop: int, rows: int, ctx: Context) -> tuple[Range, ...]:
        gate, up = (rows // 2, 0) if ctx.megatron.up_first else (0, rows // 2)
        return ((gate + start, gate + stop), (up + start, up + stop))

    def hf_rows(self, start: int, stop: int, config: ModelConfig) -> tuple[Range, ...]:
        return ((start, stop), (start, stop))


@dataclass(frozen=True)
class WholeCopy(Copy):
    """All rows at once: a unit is the tensor. For one that a side stores columns first, and which is small."""

    axis: str  # of its rows

    def units(self, rows: int, config: ModelConfig) -> int:
        return 1

    def megatron_rows(self, start: int, stop: int, rows: int, ctx: Context) -> tuple[Range, ...]:
        return ((start * rows, stop * rows),)

    def hf_rows(self, start: int, stop: int, config: ModelConfig) -> tuple[Range, ...]:
        rows = config.axes[self.axis]
        return ((start * rows, stop * rows),)


@dataclass(frozen=True)
class InterleavedGLU(WholeCopy):
    """HF's one tensor has gate and up in turn (rows 0::2 and 1::2); Megatron-Core has the gate's rows above the up's.

    A unit is the tensor, as HF stores its columns first.
    """

    def moves_rows_only(self, ctx: Context) -> bool:
        return False

    def views(self, megatron: Sequence[Tensor], hf: Sequence[Tensor], ctx: Context) -> list[tuple[Tensor, Tensor]]:
        gate, up = (1, 0) if ctx.megatron.up_first else (0, 1)
        halves, pairs = megatron[0].unflatten(0, (2, -1)), hf[0].unflatten(0, (-1, 2))
        return [(halves[gate], pairs[:, 0]), (halves[up], pairs[:, 1])]


@dataclass(frozen=True)
class _OfGroups:
    """Queries, keys and values in Megatron's order: [q .. q, k, v] for each kv head. A unit is such a group."""

    def units(self, rows: int, config: ModelConfig) -> int:
        return config.num_query_groups

    def megatron_rows(self, start: int, stop: int, rows: int, ctx: Context) -> tuple[Range, ...]:
        group = rows // ctx.config.num_query_groups
        return ((start * group, stop * group),)


@dataclass(frozen=True)
class GroupedQKV(_OfGroups):
    """HF has the same groups (falcon): q and k heads change between halves and interleaved pairs, nothing else."""

    def hf_rows(self, start: int, stop: int, config: ModelConfig) -> tuple[Range, ...]:
        group = (config.num_attention_heads // config.num_query_groups + 2) * config.head_dim
        return ((start * group, stop * group),)

    def moves_rows_only(self, ctx: Context) -> bool:
        return not ctx.permutes_rotary

    def views(self, megatron: Sequence[Tensor], hf: Sequence[Tensor], ctx: Context) -> list[tuple[Tensor, Tensor]]:
        heads, fused = _groups(megatron[0], ctx)
        _, grouped = _groups(hf[0], ctx)
        return [
            _rotary_pair(fused[:, : heads + 1], grouped[:, : heads + 1], ctx),
            (fused[:, heads + 1], grouped[:, heads + 1]),
        ]


@dataclass(frozen=True)
class FuseQKV(_OfGroups):
    """HF's (q, k, v), which it keeps apart, fused group by group."""

    def hf_rows(self, start: int, stop: int, config: ModelConfig) -> tuple[Range, ...]:
        q, d = config.num_attention_heads // config.num_query_groups * config.head_dim, config.head_dim
        return ((start * q, stop * q), (start * d, stop * d), (start * d, stop * d))

    def moves_rows_only(self, ctx: Context) -> bool:
        return False

    def views(self, megatron: Sequence[Tensor], hf: Sequence[Tensor], ctx: Context) -> list[tuple[Tensor, Tensor]]:
        heads, fused = _groups(megatron[0], ctx)
        q, k, v = hf
        d = ctx.config.head_dim
        return [
            _rotary_pair(fused[:, :heads], q.unflatten(0, (-1, heads, d)), ctx),
            _rotary_pair(fused[:, heads], k.unflatten(0, (-1, d)), ctx),
            (fused[:, heads + 1], v.unflatten(0, (-1, d))),
        ]


@dataclass(frozen=True)
class FuseGatedQKV(_OfGroups):
    """HF's (q, k, v), of which q has a gate behind each head; Megatron's group: [q .. q, gate .. gate, k, v]."""

    def hf_rows(self, start: int, stop: int, config: ModelConfig) -> tuple[Range, ...]:
        q, d = 2 * config.num_attention_heads // config.num_query_groups * config.head_dim, config.head_dim
        return ((start * q, stop * q), (start * d, stop * d), (start * d, stop * d))

    def moves_rows_only(self, ctx: Context) -> bool:
        return False

    def views(self, megatron: Sequence[Tensor], hf: Sequence[Tensor], ctx: Context) -> list[tuple[Tensor, Tensor]]:
        heads, d = ctx.config.num_attention_heads // ctx.config.num_query_groups, ctx.config.head_dim
        fused = megatron[0].unflatten(0, (-1, 2 * heads + 2, d))  # (groups * (2 heads + 2) * d, H)
        q, k, v = hf
        gated = q.unflatten(0, (-1, heads, 2, d))  # (groups * heads * 2 * d, H)
        return [
            (fused[:, :heads], gated[:, :, 0]),
            (fused[:, heads : 2 * heads], gated[:, :, 1]),
            (fused[:, 2 * heads], k.unflatten(0, (-1, d))),
            (fused[:, 2 * heads + 1], v.unflatten(0, (-1, d))),
        ]


def _groups(tensor: Tensor, ctx: Context) -> tuple[int, Tensor]:
    """(query heads of a group, the tensor by groups): (groups*(heads+2)*d, H) -> (groups, heads+2, d, H)."""
    heads = ctx.config.num_attention_heads // ctx.config.num_query_groups
    return heads, tensor.unflatten(0, (-1, heads + 2, ctx.config.head_dim))


def _rotary_pair(megatron: Tensor, hf: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
    """Views of q or k heads, (..., d, H) on both sides, pairing row 2i+j of interleaved with row j*d/2+i of halves."""
    if not ctx.permutes_rotary:
        return megatron, hf
    half = ctx.config.head_dim // 2
    halves, interleaved = (megatron, hf) if ctx.hf.interleaved else (hf, megatron)
    interleaved = interleaved.unflatten(-2, (half, 2))
    halves = halves.unflatten(-2, (2, half)).transpose(-3, -2)  # (..., 2, d/2, H) -> (..., d/2, 2, H)
    return (halves, interleaved) if ctx.hf.interleaved else (interleaved, halves)
