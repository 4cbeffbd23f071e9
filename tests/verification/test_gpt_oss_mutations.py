"""Mistakes that a round trip of GPT-OSS cannot see, made on purpose: values show each of them, and so does --verify."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gpt_oss_models as oss
import pytest
import torch
from golden_core import read_torch_dist
from mxfp4_files import quantised_folder
from torch import Tensor

from weights_conversion.architectures import FAMILIES
from weights_conversion.configs import windows
from weights_conversion.layouts.decoding import Mxfp4
from weights_conversion.mapping import ops

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
Mutation = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Spoilt(ops.WholeCopy):
    """A copy whose HF side is changed on the way."""

    change: Callable[[Tensor], Tensor]

    def moves_rows_only(self, ctx: Any) -> bool:
        return False

    def views(self, megatron: Sequence[Tensor], hf: Sequence[Tensor], ctx: Any) -> list[tuple[Tensor, Tensor]]:
        return [(megatron[0], self.change(hf[0]))]


def of_rows(end: str, change: Callable[[Any], Any]) -> Mutation:
    """The rows whose name ends with `end` are others."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        family = FAMILIES["gpt-oss"]
        rows = tuple(change(row) if row.megatron.endswith(end) else row for row in family.rows)
        assert rows != family.rows
        patch.setitem(FAMILIES, "gpt-oss", replace(family, rows=rows))

    return mutate


def by_halves(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ops.InterleavedGLU, "views", lambda self, megatron, hf, ctx: [(megatron[0], hf[0])])


def up_first(patch: pytest.MonkeyPatch) -> None:
    right = ops.InterleavedGLU.views

    def wrong(self: Any, megatron: Any, hf: Any, ctx: Any) -> Any:
        (gate, one), (up, two) = right(self, megatron, hf, ctx)
        return [(gate, two), (up, one)]

    patch.setattr(ops.InterleavedGLU, "views", wrong)


def nibbles_exchanged(patch: pytest.MonkeyPatch) -> None:
    right = Mxfp4.decode

    def wrong(self: Any, rows: Any, stored: Any, into: Any) -> None:
        right(self, rows, [stored[0] >> 4 | stored[0] << 4, stored[1]], into)

    patch.setattr(Mxfp4, "decode", wrong)


def windows_shifted(patch: pytest.MonkeyPatch) -> None:
    right = windows.read_hf

    def wrong(*arguments: Any) -> Any:
        window, layers = right(*arguments)
        return window, layers[1:] + layers[:1]

    patch.setattr(windows, "read_hf", wrong)


def untransposed(row: Any) -> Any:
    return replace(row, packed=tuple(replace(each, transposed=False) for each in row.packed))


MUTATIONS: dict[str, Mutation] = {
    "sinks of two heads exchanged": of_rows(
        ".softmax_offset", lambda row: replace(row, op=Spoilt("heads", lambda hf: hf[[1, 0, *range(2, len(hf))]]))
    ),
    "gate and up not interleaved": by_halves,
    "up in front of the gate": up_first,
    "down_proj not transposed": of_rows("linear_fc2.weight{expert}", untransposed),
    "router bias dropped": of_rows(
        ".router.bias", lambda row: replace(row, op=Spoilt("experts", lambda hf: torch.zeros_like(hf)))
    ),
    "bias of the output projection dropped": of_rows(
        ".linear_proj.bias", lambda row: replace(row, op=Spoilt("hidden", lambda hf: torch.zeros_like(hf)))
    ),
    "biases of two experts' rows exchanged": of_rows(
        "linear_fc2.bias{expert}", lambda row: replace(row, op=Spoilt("hidden", lambda hf: hf.flip(0)))
    ),
    "nibbles exchanged": nibbles_exchanged,
    "window layers shifted by one": windows_shifted,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(in MXFP4, the same in bfloat16), both with a square down_proj."""
    base = tmp_path_factory.mktemp("gpt-oss-mutations")
    quantised_folder(base, 64)
    return base / "small", base / "plain"


def imported(name: str, folders: tuple[Path, Path], out: Path, to_megatron, *options: Any) -> Any:
    source = folders[0 if name.startswith("nibbles") else 1]
    return to_megatron("gpt-oss", "--model-path", source, "--out", out, *options)


def same_values(folders: tuple[Path, Path], out: Path) -> bool:
    found, args = read_torch_dist(out)
    wanted = oss.in_megatron(oss.stored(folders[1]))
    ours: dict[str, Tensor] = {}
    for key, tensor in found.items():
        for layer, part in enumerate(tensor) if key.startswith("decoder.layers.") else ():
            name = key.replace("layers.", f"layers.{layer}.", 1)
            experts = {f"{name.replace('.experts.experts.', '.experts.')}{e}": one for e, one in enumerate(part)}
            ours |= experts if ".experts.experts." in key else {name: part}
    same = all(torch.equal(ours.get(name, found.get(name)), tensor) for name, tensor in wanted.items())
    return same and (tuple(args["window_size"]), args["window_attn_skip_freq"]) == ((7, 0), 2)


@pytest.mark.parametrize("name", ["", "nibbles"])
def test_without_a_mistake(name: str, folders, to_megatron, tmp_path: Path) -> None:
    imported(name, folders, tmp_path / "mt", to_megatron, "--verify").succeeded()
    assert same_values(folders, tmp_path / "mt")


@pytest.mark.parametrize("name", MUTATIONS)
def test_values_show_it(name: str, folders, to_megatron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[name](monkeypatch)
    imported(name, folders, tmp_path / "mt", to_megatron).succeeded()
    assert not same_values(folders, tmp_path / "mt")


@pytest.mark.parametrize("name", MUTATIONS)
def test_verify_shows_it(name: str, folders, to_megatron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[name](monkeypatch)
    assert imported(name, folders, tmp_path / "mt", to_megatron, "--verify").code == 1
    assert not (tmp_path / "mt").exists()
    assert (tmp_path / "mt.unverified").exists()
