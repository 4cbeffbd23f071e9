"""Each mistake that a round trip cannot see is made on purpose, and the value tests must see it.

A mutation changes the converter's own ops or cuts. A detector is one of the suite's value tests in small; it must pass
on the unchanged converter and fail on the mutated one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference_forward
import tiny_models as tm
import torch
from conftest import GOLDEN, Script
from megatron_files import Checkpoint, assert_same_ranks, assert_same_tensors, read_checkpoint
from naive_layout import megatron_ranks, padded_rows

from weights_conversion.layouts import planners, rank_files
from weights_conversion.layouts.placement import Placed
from weights_conversion.mapping import ops
from weights_conversion.mapping.parameters import Instance, Shard
from weights_conversion.sources import locate

Mutation = Callable[[pytest.MonkeyPatch], None]
GLU_NAME, QKV_NAME = "dense_h_to_4h.weight", "query_key_value.weight"


def swap_gate_and_up(patch: pytest.MonkeyPatch) -> None:
    right = ops.FuseGLU.megatron_rows

    def wrong(self: Any, *arguments: Any) -> tuple[Any, ...]:
        gate, up = right(self, *arguments)
        return up, gate

    patch.setattr(ops.FuseGLU, "megatron_rows", wrong)


def drop_rotary_permutation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ops, "_rotary_pair", lambda megatron, hf, ctx: (megatron, hf))


def permute_values_too(patch: pytest.MonkeyPatch) -> None:
    for op in (ops.FuseQKV, ops.GroupedQKV):
        right = op.views

        def wrong(self: Any, megatron: Any, hf: Any, ctx: Any, right: Any = right) -> list[Any]:
            *others, (theirs, ours) = right(self, megatron, hf, ctx)
            return [*others, ops._rotary_pair(theirs, ours, ctx)]

        patch.setattr(op, "views", wrong)


def mix_groups(patch: pytest.MonkeyPatch) -> None:
    """Query heads dealt to the groups in turn, as if the source were interleaved by head."""

    def wrong(self: Any, megatron: Sequence[Any], hf: Sequence[Any], ctx: Any) -> list[Any]:
        heads, d = ctx.config.num_attention_heads // ctx.config.num_query_groups, ctx.config.head_dim
        fused = megatron[0].unflatten(0, (-1, heads + 2, d))
        q, k, v = hf
        return [
            ops._rotary_pair(fused[:, :heads], q.unflatten(0, (heads, -1, d)).transpose(0, 1), ctx),
            ops._rotary_pair(fused[:, heads], k.unflatten(0, (-1, d)), ctx),
            (fused[:, heads + 1], v.unflatten(0, (-1, d))),
        ]

    patch.setattr(ops.FuseQKV, "views", wrong)


def cut_as(pattern: str, shard: Shard) -> Mutation:
    """Tensors whose name matches are cut as `shard` says, whatever the architecture declares."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        right = rank_files.place_megatron

        def wrong(instance: Instance, *others: Any) -> Placed:
            placed = right(instance, *others)
            if not re.search(pattern, placed.name):
                return placed
            return right(replace(instance, row=replace(instance.row, shard=shard)), *others)

        for module in (planners, locate):
            patch.setattr(module, "place_megatron", wrong)

    return mutate


MUTATIONS: dict[str, Mutation] = {
    "gate and up swapped": swap_gate_and_up,
    "rotary permutation dropped": drop_rotary_permutation,
    "values permuted too": permute_values_too,
    "groups mixed": mix_groups,
    "GLU cut as one block": cut_as(GLU_NAME, Shard(0)),
    "QKV cut across a group": cut_as(QKV_NAME, Shard(0, blocks=8)),
    "lm_head cut as two blocks": cut_as("lm_head", Shard(0, blocks=2)),
}
IN_LAYOUTS_ONLY = {"GLU cut as one block", "QKV cut across a group", "lm_head cut as two blocks"}


class Detectors:
    """The value tests in small, on one Llama-2 with four groups."""

    def __init__(self, folder: Path, to_megatron: Script, to_hf: Script):
        self.folder, self.to_megatron, self.to_hf = folder, to_megatron, to_hf
        self.model = tm.MODELS["llama2-gqa"]
        self.source = tm.write_huggingface(folder / "hf", self.model, tokenizer=False)
        self.runs = 0

    def convert(self, family: str, source: Path, *options: Any) -> Checkpoint:
        self.runs += 1
        out = self.folder / f"run-{self.runs}"
        self.to_megatron(family, "--model-path", source, "--out", out, *options).succeeded()
        return read_checkpoint(out)

    def golden(self) -> None:
        found = self.convert("llama2", GOLDEN / "llama2-gqa" / "hf")
        assert_same_ranks(found.tensors, read_checkpoint(GOLDEN / "llama2-gqa" / "megatron-tp1pp1").tensors)

    def golden_layout(self) -> None:
        found = self.convert("codellama", GOLDEN / "codellama-gqa" / "hf", *CUT)
        assert_same_ranks(found.tensors, read_checkpoint(GOLDEN / "codellama-gqa" / "megatron-tp2pp2").tensors)

    def naive(self) -> None:
        found = self.convert("llama2", self.source)
        assert_same_ranks(found.tensors, megatron_ranks(self.model.config(), self.model.tensors()))

    def naive_layout(self) -> None:
        found = self.convert("llama2", self.source, *CUT)
        rows = padded_rows(self.model.vocab, 2)
        assert_same_ranks(found.tensors, megatron_ranks(self.model.config(), self.model.tensors(), 2, 2, rows=rows))

    def logits(self) -> None:
        found = self.convert("llama2", self.source)
        tokens = torch.arange(1, 200, 5)
        expected = tm.transformers_logits(self.model, self.model.tensors(), tokens)
        torch.testing.assert_close(
            reference_forward.logits(found.single, found.args, tokens), expected, atol=1e-5, rtol=0
        )

    def round_trip(self, *options: Any) -> None:
        self.convert("llama2", self.source, *options)
        out = self.folder / f"back-{self.runs}"
        run = self.folder / f"run-{self.runs}"
        self.to_hf("--input_dir", run, "--output_dir", out, "--no_tokenizer").succeeded()
        assert_same_tensors(tm.read_huggingface(out), self.model.tensors())


CUT = ["--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2]


@pytest.fixture
def detectors(tmp_path: Path, to_megatron: Script, to_hf: Script) -> Detectors:
    return Detectors(tmp_path, to_megatron, to_hf)


DETECTORS = [
    "golden",
    "golden_layout",
    "naive",
    "naive_layout",
    "logits",
]


@pytest.mark.parametrize("detector", [*DETECTORS, "round_trip"])
def test_unchanged_converter_passes(detector: str, detectors: Detectors) -> None:
    getattr(detectors, detector)()


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_is_caught(
    mutation: str, detector: str, detectors: Detectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    MUTATIONS[mutation](monkeypatch)
    if mutation in IN_LAYOUTS_ONLY and not detector.endswith("layout"):
        getattr(detectors, detector)()  # one rank is not cut, so there is nothing to see
        return
    with pytest.raises(AssertionError) as caught:
        getattr(detectors, detector)()
    assert "other values" in str(caught.value) or "not close" in str(caught.value), (
        "caught by the values, not by a crash"
    )


@pytest.mark.parametrize("mutation", [name for name in MUTATIONS if name != "groups mixed"])
def test_round_trip_is_blind(mutation: str, detectors: Detectors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the value tests are needed: with the same mistake made both ways, the way back undoes it."""
    MUTATIONS[mutation](monkeypatch)
    detectors.round_trip(*(CUT if mutation in IN_LAYOUTS_ONLY else []))


@pytest.mark.parametrize("mutation", ["rotary permutation dropped", "values permuted too"])
@pytest.mark.parametrize("name", ["falcon-7b", "falcon-40b"])
def test_falcon_mutations_are_caught(
    name: str, mutation: str, detectors: Detectors, monkeypatch: pytest.MonkeyPatch, sources
) -> None:
    model = tm.MODELS[name]
    MUTATIONS[mutation](monkeypatch)
    found = detectors.convert("falcon", sources(name))
    with pytest.raises(AssertionError, match="other values"):
        assert_same_ranks(found.tensors, megatron_ranks(model.config(), model.tensors()))
    tokens = torch.arange(1, 200, 5)
    expected = tm.transformers_logits(model, model.tensors(), tokens)
    assert (reference_forward.logits(found.single, found.args, tokens) - expected).abs().max() > 1e-2
