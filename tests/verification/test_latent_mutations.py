"""Mistakes with latent attention and prediction layers that no shape shows, made on purpose.

A mistake in the mapping is made both ways, so that a round trip and verify's exact comparison are blind to it: the
forward pass is not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import latent_models as lm
import pytest
import torch
from conftest import run
from safetensors.torch import load_file
from torch import Tensor

from weights_conversion.architectures import FAMILIES
from weights_conversion.layouts.decoding import BlockScaled
from weights_conversion.mapping import ops
from weights_conversion.mapping.parameters import ParamMapping

LAYOUTS = {"torch_dist": (), "ranks": ("--ckpt-format", "torch", "--tensor-model-parallel-size", 2)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    return lm.write(tmp_path_factory.mktemp("latent") / "hf", mtp=1, **sizes)


def verified(one: Path, two: Path, report: Path) -> dict[str, Any]:
    result = run("weights_conversion.verify", one, two, "--json", report)
    assert result.code == 1, result.text
    return json.loads(report.read_text())


# --- in the mapping --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadsExchanged(ops.Copy):
    """[v ; k_nope] of each head, where [k_nope ; v] is right. A unit is a head."""

    def units(self, rows: int, config: Any) -> int:
        return config.num_attention_heads

    def _rows(self, start: int, stop: int, config: Any) -> tuple[tuple[int, int], ...]:
        head = config.mla.qk_head_dim + config.mla.v_head_dim
        return ((start * head, stop * head),)

    def megatron_rows(self, start: int, stop: int, rows: int, ctx: Any) -> tuple[tuple[int, int], ...]:
        return self._rows(start, stop, ctx.config)

    def hf_rows(self, start: int, stop: int, config: Any) -> tuple[tuple[int, int], ...]:
        return self._rows(start, stop, config)

    def moves_rows_only(self, ctx: Any) -> bool:
        return False

    def views(self, megatron: Sequence[Tensor], hf: Sequence[Tensor], ctx: Any) -> list[tuple[Tensor, Tensor]]:
        mla = ctx.config.mla
        one, two = (each[0].unflatten(0, (-1, mla.qk_head_dim + mla.v_head_dim)) for each in (megatron, hf))
        return [
            (one[:, : mla.v_head_dim], two[:, mla.qk_head_dim :]),
            (one[:, mla.v_head_dim :], two[:, : mla.qk_head_dim]),
        ]


@dataclass(frozen=True)
class HalvesExchanged(ops.Copy):
    """[hidden ; embedding], where [embedding ; hidden] is right."""

    def moves_rows_only(self, ctx: Any) -> bool:
        return False

    def views(self, megatron: Sequence[Tensor], hf: Sequence[Tensor], ctx: Any) -> list[tuple[Tensor, Tensor]]:
        half = hf[0].shape[1] // 2
        return [(megatron[0][:, :half], hf[0][:, half:]), (megatron[0][:, half:], hf[0][:, :half])]


def with_row(patch: pytest.MonkeyPatch, name: str, change: Callable[[ParamMapping], ParamMapping | None]) -> None:
    family = FAMILIES["deepseek-v3"]
    changed = (change(row) if row.megatron.endswith(name) else row for row in family.rows)
    rows = tuple(row for row in changed if row is not None)
    patch.setitem(FAMILIES, "deepseek-v3", dataclasses.replace(family, rows=rows))


def norms_exchanged(patch: pytest.MonkeyPatch) -> None:
    """enorm and hnorm have one shape."""
    names = {"enorm.weight": "model.layers.{layer}.hnorm.weight", "hnorm.weight": "model.layers.{layer}.enorm.weight"}
    for name, other in names.items():
        with_row(patch, f".{name}", lambda row, other=other: dataclasses.replace(row, hf=(other,)))


MAPPINGS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, int]] = {
    "k_nope and v exchanged": (
        lambda patch: with_row(
            patch, "linear_kv_up_proj.weight", lambda row: dataclasses.replace(row, op=HeadsExchanged())
        ),
        "attention",
        0,
    ),
    "halves of eh_proj exchanged": (
        lambda patch: with_row(patch, "eh_proj.weight", lambda row: dataclasses.replace(row, op=HalvesExchanged())),
        "joined",
        3,
    ),
    "enorm and hnorm exchanged": (norms_exchanged, "joined", 3),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mutation", MAPPINGS)
def test_mistakes_in_the_mapping(
    mutation: str, layout: str, source: Path, tmp_path: Path, to_megatron, to_hf, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate, stage, layer = MAPPINGS[mutation]
    mutate(monkeypatch)
    out = tmp_path / "out"
    to_megatron("deepseek-v3", "--model-path", source, "--out", out, *LAYOUTS[layout]).succeeded()
    found = verified(source, out, tmp_path / "found.json")
    assert not found["exact"]["differences"]  # it goes through the same mapping
    assert (found["numeric"]["stage"], found["numeric"]["layer"]) == (stage, layer)
    to_hf("--input_dir", out, "--output_dir", tmp_path / "back", "--no_tokenizer").succeeded()
    there, back = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert all(torch.equal(back[name], tensor) for name, tensor in there.items())  # and so does a round trip


@pytest.mark.parametrize("norm", ["q_a_layernorm", "kv_a_layernorm", "input_layernorm", "shared_head.norm"])
def test_a_norm_that_no_row_has(
    norm: str, source: Path, tmp_path: Path, to_megatron, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES["deepseek-v3"]
    rows = tuple(row for row in family.rows if not row.hf[0].endswith(f".{norm}.weight"))
    assert len(rows) < len(family.rows)
    monkeypatch.setitem(FAMILIES, "deepseek-v3", dataclasses.replace(family, rows=rows))
    said = to_megatron("deepseek-v3", "--model-path", source, "--out", tmp_path / "out")
    said.refused(f"{norm}.weight that a deepseek-v3 model does not have")


# --- in the files ----------------------------------------------------------------------------------------------------


def change_args(out: Path, **changes: Any) -> None:
    for path in out.rglob("*_rng.pt"):
        content = torch.load(path, weights_only=False)
        vars(content["args"]).update(changes)
        torch.save(content, path)


@pytest.mark.parametrize("manifest", [True, False], ids=["with its manifest", "without"])
def test_mscale_that_is_dropped(manifest: bool, source: Path, tmp_path: Path, to_megatron) -> None:
    out = tmp_path / "out"
    to_megatron("deepseek-v3", "--model-path", source, "--out", out, *LAYOUTS["ranks"]).succeeded()
    change_args(out, mscale=1.0, mscale_all_dim=0.0)
    if not manifest:
        (out / "conversion_manifest.json").unlink()
    found = verified(source, out, tmp_path / "found.json")
    assert "mscale_all_dim" in " ".join(found["config"]["problems"])
    assert not found["exact"]["differences"]
    if not manifest:
        assert (found["numeric"]["same"], found["numeric"]["stage"]) == (False, "attention")


@pytest.mark.parametrize("name", ["q_up_proj.layer_norm_weight", "kv_up_proj.layer_norm_weight", "hnorm.weight"])
def test_a_norm_as_before_training(name: str, source: Path, tmp_path: Path, to_megatron) -> None:
    out = tmp_path / "out"
    to_megatron("deepseek-v3", "--model-path", source, "--out", out, *LAYOUTS["ranks"]).succeeded()
    for path in out.rglob("*_rng.pt"):
        content = torch.load(path, weights_only=False)
        for key in [key for key in content["model"] if key.endswith(name)]:
            content["model"][key] = torch.ones_like(content["model"][key])
        torch.save(content, path)
    found = verified(source, out, tmp_path / "found.json")
    assert found["exact"]["differences"]
    assert not found["numeric"]["same"]


# --- in the scales of fp8 --------------------------------------------------------------------------------------------


def next_block_right(patch: pytest.MonkeyPatch) -> None:
    right = BlockScaled.decode
    patch.setattr(
        BlockScaled,
        "decode",
        lambda self, rows, stored, into: right(self, rows, [stored[0], stored[1].roll(1, 1)], into),
    )


def next_block_down(patch: pytest.MonkeyPatch) -> None:
    right = BlockScaled.decode
    patch.setattr(
        BlockScaled,
        "decode",
        lambda self, rows, stored, into: right(self, rows, [stored[0], stored[1].roll(1, 0)], into),
    )


@pytest.mark.parametrize("mutate", [next_block_right, next_block_down], ids=lambda each: each.__name__)
def test_scales_off_by_one(
    mutate: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, to_megatron, monkeypatch: pytest.MonkeyPatch
) -> None:
    small: dict[str, Any] = {
        "hidden_size": 40,
        "intermediate_size": 44,
        "kv_lora_rank": 16,
        "q_lora_rank": 20,
        "num_hidden_layers": 2,
    }
    config = {**lm.FP8, "weight_block_size": [16, 16]}
    folder = lm.write_fp8(lm.write(tmp_path / "hf", **small), tmp_path / "fp8", (16, 16), config=config)
    mutate(monkeypatch)
    to_megatron("deepseek-v3", "--model-path", folder, "--out", tmp_path / "out").succeeded()
    found = verified(folder, tmp_path / "out", tmp_path / "found.json")
    assert found["exact"]["different"] > 5
    assert not found["numeric"]["same"]
