"""Mistakes in the rows of gated delta, made on purpose on both ways at once, which a round trip cannot see.

--verify, whose forward pass has rules of its own, refuses each; without one it passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import delta_models
import pytest
from delta_models import DELTAS

from weights_conversion.architectures import FAMILIES
from weights_conversion.mapping import ops

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
Mutation = Callable[[pytest.MonkeyPatch, str], None]
RANKS = ("--ckpt-format", "torch", "--tensor-model-parallel-size", 2)


def rows_of(patch: pytest.MonkeyPatch, name: str, change: Callable[[Any], Any]) -> None:
    family = FAMILIES[name]
    rows = tuple(map(change, family.rows))
    assert rows != family.rows
    patch.setitem(FAMILIES, name, replace(family, rows=rows))


def exchanged(one: str, other: str) -> Mutation:
    """What Hugging Face has for two parts of in_proj is taken for each other's."""

    def mutate(patch: pytest.MonkeyPatch, name: str) -> None:
        start = ".in_proj.weight."
        ends = {f"{start}{one}": f"{start}{other}", f"{start}{other}": f"{start}{one}"}
        found = {end: row for row in FAMILIES[name].rows for end in ends if row.megatron.endswith(end)}

        def change(row: Any) -> Any:
            end = next((end for end in ends if row.megatron.endswith(end)), None)
            return row if end is None else replace(row, hf=found[ends[end]].hf, within=found[ends[end]].within)

        rows_of(patch, name, change)

    return mutate


def centred(end: str, value: bool) -> Mutation:
    def mutate(patch: pytest.MonkeyPatch, name: str) -> None:
        rows_of(patch, name, lambda row: replace(row, centred=value) if row.megatron.endswith(end) else row)

    return mutate


def gate_first(patch: pytest.MonkeyPatch, name: str) -> None:
    right = ops.FuseGatedQKV.views

    def wrong(self: Any, megatron: Any, hf: Any, ctx: Any) -> Any:
        (query, one), (gate, two), *others = right(self, megatron, hf, ctx)
        return [(query, two), (gate, one), *others]

    patch.setattr(ops.FuseGatedQKV, "views", wrong)


def another_order(patch: pytest.MonkeyPatch, name: str) -> None:
    """A rank's parts, of which the order is that of a convolution with v in front."""

    def change(row: Any) -> Any:
        if row.live is None or ".conv1d." not in row.megatron:
            return row
        count = len(row.live.parts)
        return replace(row, live=replace(row.live, parts=row.live.parts[::-1], at=count - 1 - row.live.at))

    rows_of(patch, name, change)


MUTATIONS: dict[str, Mutation] = {
    "b and a exchanged": exchanged("beta", "alpha"),
    "z and v exchanged": exchanged("z", "value"),
    "q and k exchanged": exchanged("query", "key"),
    "-1 left out": centred(".out_norm.weight", False),
    "-1 on the norm in front": centred(".in_proj.layer_norm_weight", True),
    "-1 on a norm of q": centred(".q_layernorm.weight", True),
    "gate and query of the attention exchanged": gate_first,
    "a rank's parts in another order": another_order,
}
CASES = [("3.5", what) for what in MUTATIONS] + [("next", "b and a exchanged"), ("next", "z and v exchanged")]


@pytest.mark.parametrize(("name", "what"), CASES)
def test_verify_shows_it(name: str, what: str, to_megatron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DELTAS[name]
    source = delta_models.write(tmp_path / "hf", model)
    MUTATIONS[what](monkeypatch, model.family)
    asked = (model.family, "--model-path", source, "--out", tmp_path / "mt", "--verify")
    to_megatron(*asked, *(RANKS if name == "3.5" else ())).refused("failed its proof")
    assert not (tmp_path / "mt").exists()
