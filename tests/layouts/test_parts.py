"""Tensors that several parts are joined in: by rank, end to end, and head by head. Rows are literal here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weights_conversion.config import Parallelism
from weights_conversion.layouts import parts
from weights_conversion.layouts.placement import Placed, TensorRef, whole
from weights_conversion.layouts.rank_files import Rank, place_megatron
from weights_conversion.mapping.dialects import MEGATRON_CORE
from weights_conversion.mapping.parameters import Instance, joined

AXES = {"one": 1, "heads": 2, "keys": 4, "values": 6, "hidden": 3, "kernel": 2}
CONFIG: Any = SimpleNamespace(axes=AXES, num_layers=1, mtp_num_layers=0, moe=None, tie_word_embeddings=False)
ROWS = joined(
    "decoder.layers.{layer}.mixer.conv_weight",
    torch_dist="decoder.layers.{layer}.mixer.conv.weight",
    parts={"k": "keys", "v": "values", "h": "heads"},
    hf={"layers.{layer}.kv": ("v", "k"), "layers.{layer}.h": ("h",)},
    rest=("hidden",),
    groups="heads",
)


def rows_of(placed: Placed) -> list[tuple[str, int]]:
    """(file, row of the stored tensor) of each row of `placed`."""
    found: dict[int, tuple[str, int]] = {}
    for block in placed.copies[0]:
        for row in range(*block.rows):
            assert row not in found
            found[row] = block.ref.file, block.start // placed.columns + row - block.rows[0]
    return [found[row] for row in range(placed.rows)]


def test_the_rows_have_the_names_of_torch_dist_and_of_hugging_face() -> None:
    assert [row.megatron for row in ROWS] == [f"decoder.layers.{{layer}}.mixer.conv.weight.{part}" for part in "kvh"]
    assert [row.hf for row in ROWS] == [("layers.{layer}.kv[k]",), ("layers.{layer}.kv[v]",), ("layers.{layer}.h",)]
    assert {row.module for row in ROWS} == {"decoder.layers.{layer}.mixer"}
    assert ROWS[2].within == ()


@pytest.mark.parametrize("tp", [1, 2])
def test_each_rank_holds_its_share_of_every_part(tp: int) -> None:
    """[k v h] of rank 0, then [k v h] of rank 1: with two ranks k is rows 0 and 1 of both files."""
    asked = set()

    def find(rank: Rank, name: str, shape: tuple[int, ...]) -> TensorRef:
        asked.add((name, shape))
        return TensorRef(str(rank.tensor), name, torch.float32, shape, 0)

    def placed(number: int) -> list[tuple[str, int]]:
        row = ROWS[number]
        parallel = Parallelism(tp)
        there = place_megatron(
            Instance(row, (0,)), row.megatron_shape(CONFIG), CONFIG, parallel, MEGATRON_CORE, find
        )  # fmt: skip
        return rows_of(there)

    expected = {
        1: ([("0", n) for n in range(4)], [("0", n) for n in range(4, 10)], [("0", 10), ("0", 11)]),
        2: (
            [("0", 0), ("0", 1), ("1", 0), ("1", 1)],
            [("0", 2), ("0", 3), ("0", 4), ("1", 2), ("1", 3), ("1", 4)],
            [("0", 5), ("1", 5)],
        ),
    }[tp]
    assert tuple(placed(number) for number in range(3)) == expected
    assert asked == {("model.decoder.layers.0.mixer.conv_weight", (12 // tp, 3))}


def test_hugging_face_has_the_parts_head_by_head() -> None:
    """Two heads, each [3 of v, 2 of k]."""
    stored = whole(TensorRef("hf", "layers.0.kv", torch.float32, (10, 3), 0))
    found = [[n for _, n in rows_of(parts.part_of(stored, row.within[0], CONFIG))] for row in ROWS[:2]]
    assert found == [[3, 4, 8, 9], [0, 1, 2, 5, 6, 7]]
    assert parts.joined_shape(ROWS[0].within[0], (4, 3), CONFIG) == (10, 3)


def test_hugging_face_has_the_parts_end_to_end() -> None:
    flat = joined(
        "x.{layer}.w", parts={"k": "keys", "v": "values"}, hf={"hf.{layer}": ("k", "v")}, rest=("one", "kernel")
    )
    stored = whole(TensorRef("hf", "hf.0", torch.float32, (10, 1, 2), 0))
    assert [[n for _, n in rows_of(parts.part_of(stored, row.within[0], CONFIG))] for row in flat] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7, 8, 9],
    ]
