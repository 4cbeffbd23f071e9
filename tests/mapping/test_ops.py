"""Ops by literal rows: each row is named by the head and the place in it that it has in Hugging Face's tensors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from weights_conversion.config import ModelConfig
from weights_conversion.mapping import ops
from weights_conversion.mapping.dialects import HF, MEGATRON_CORE, MEGATRON_LLM, META, Dialect

# Four query heads of four rows each, in two groups.
CONFIG = ModelConfig("llama2", 1, 1, 3, 4, 2, 4, 8, 16, 1e-5)
Q = [f"q{head}.{row}" for head in range(4) for row in range(4)]
K = [f"k{head}.{row}" for head in range(2) for row in range(4)]
V = [f"v{head}.{row}" for head in range(2) for row in range(4)]
# Megatron-Core turns a head's two halves, as Hugging Face does.
CORE_QKV = [
    *("q0.0", "q0.1", "q0.2", "q0.3", "q1.0", "q1.1", "q1.2", "q1.3", "k0.0", "k0.1", "k0.2", "k0.3"),
    *("v0.0", "v0.1", "v0.2", "v0.3"),
    *("q2.0", "q2.1", "q2.2", "q2.3", "q3.0", "q3.1", "q3.2", "q3.3", "k1.0", "k1.1", "k1.2", "k1.3"),
    *("v1.0", "v1.1", "v1.2", "v1.3"),
]
# Megatron-LLM turns neighbouring rows: row 0 of the first half stands beside row 0 of the second.
LLM_QKV = [
    *("q0.0", "q0.2", "q0.1", "q0.3", "q1.0", "q1.2", "q1.1", "q1.3", "k0.0", "k0.2", "k0.1", "k0.3"),
    *("v0.0", "v0.1", "v0.2", "v0.3"),
    *("q2.0", "q2.2", "q2.1", "q2.3", "q3.0", "q3.2", "q3.1", "q3.3", "k1.0", "k1.2", "k1.1", "k1.3"),
    *("v1.0", "v1.1", "v1.2", "v1.3"),
]
GATE, UP = ["g0", "g1", "g2"], ["u0", "u1", "u2"]


def column(rows: Sequence[str], names: Sequence[str]) -> Tensor:
    """Each row as its number in `names`."""
    return torch.tensor([[float(names.index(row))] for row in rows])


@pytest.mark.parametrize(
    ("op", "hf", "dialect", "source", "megatron"),
    [
        (ops.Copy(), [Q], MEGATRON_CORE, HF, Q),
        (ops.FuseQKV(), [Q, K, V], MEGATRON_CORE, HF, CORE_QKV),
        (ops.FuseQKV(), [Q, K, V], MEGATRON_LLM, HF, LLM_QKV),
        (ops.FuseQKV(), [Q, K, V], MEGATRON_LLM, META, CORE_QKV),  # both turn neighbours: rows stay in their order
        (ops.FuseQKV(), [Q, K, V], MEGATRON_CORE, META, None),
        (ops.GroupedQKV(), [CORE_QKV], MEGATRON_LLM, HF, LLM_QKV),  # falcon's is fused already
        (ops.InterleavedGLU("glu"), [["g0", "u0", "g1", "u1", "g2", "u2"]], MEGATRON_CORE, HF, [*GATE, *UP]),
    ],
    ids=["copy", "qkv-core", "qkv-llm", "qkv-llm-meta", "qkv-core-meta", "grouped", "interleaved"],
)
def test_rows(op: ops.Op, hf: list[list[str]], dialect: Dialect, source: Dialect, megatron: list[str] | None) -> None:
    """The whole tensor to Megatron, row by row, and back to what it was."""
    if megatron is None:  # Meta's neighbours become Megatron-Core's halves: rows 0, 2 and then 1, 3 of each head
        megatron = [f"{row[:-1]}{'0213'[int(row[-1])]}" if row[0] != "v" else row for row in CORE_QKV]
    names = [name for tensor in hf for name in tensor]
    context = ops.Context(CONFIG, source, dialect)
    sources = [column(tensor, names) for tensor in hf]
    made = torch.empty(len(megatron), 1)
    ops.to_megatron(op, [made], sources, context)
    assert [names[int(row)] for row in made.flatten()] == megatron
    back = [torch.empty_like(tensor) for tensor in sources]
    ops.to_hf(op, [made], back, context)
    assert all(torch.equal(one, other) for one, other in zip(back, sources, strict=True))


@pytest.mark.parametrize(
    ("dialect", "rows"),
    [(MEGATRON_CORE, ((1, 2), (4, 5))), (MEGATRON_LLM, ((4, 5), (1, 2)))],
    ids=["gate above up", "up above gate"],
)
def test_a_unit_of_gate_and_up(dialect: Dialect, rows: tuple[ops.Range, ...]) -> None:
    """Where the gate's row 1 and the up's row 1 stand in the fused tensor of 6 rows, in this order."""
    op = ops.FuseGLU()
    assert op.units(6, CONFIG) == 3
    assert op.hf_rows(1, 2, CONFIG) == ((1, 2), (1, 2))
    assert op.megatron_rows(1, 2, 6, ops.Context.of(CONFIG, dialect)) == rows


def test_a_unit_of_queries_is_a_group() -> None:
    op, context = ops.FuseQKV(), ops.Context.of(CONFIG, MEGATRON_CORE)
    assert op.units(32, CONFIG) == 2
    assert op.megatron_rows(1, 2, 32, context) == ((16, 32),)
    assert op.hf_rows(1, 2, CONFIG) == ((8, 16), (4, 8), (4, 8))
