"""Mistakes with experts that no shape shows, made on purpose: in the converter's own mapping, and in the files.

A mistake in the mapping is made both ways, so that a round trip and verify's exact comparison are blind to it; the
golden files and the forward pass are not.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moe_models
import pytest
import tiny_models as tm
import torch
from conftest import GOLDEN, run
from golden_core import read_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from weights_conversion.architectures import FAMILIES
from weights_conversion.mapping import ops
from weights_conversion.mapping.parameters import Instance
from weights_conversion.verification.conventions import HF
from weights_conversion.verification.forward import trace
from weights_conversion.verification.whole import huggingface_weights

CASE = GOLDEN / "core-qwen3-moe-tp2ep2"
LAYOUT = ("--ckpt-format", "torch", "--tensor-model-parallel-size", 2, "--expert-model-parallel-size", 2,
          "--expert-tensor-parallel-size", 1, "--moe-grouped-gemm", "--make-vocab-size-divisible-by", 16)  # fmt: skip
Tensors = dict[str, Tensor]


# --- in the mapping --------------------------------------------------------------------------------------------------


def experts_permuted(patch: pytest.MonkeyPatch) -> None:
    right = Instance.hf

    def wrong(self: Instance, spelled: str) -> str:
        if self.expert is None:
            return right(self, spelled)
        return right(dataclasses.replace(self, index=(self.index[0], 3 - self.index[1])), spelled)

    patch.setattr(Instance, "hf", wrong)


def gate_and_up_exchanged(patch: pytest.MonkeyPatch) -> None:
    """In one expert of one layer."""
    right = Instance.hf

    def wrong(self: Instance, spelled: str) -> str:
        exchanged = {"gate": "up", "up": "gate"}
        for half, other in exchanged.items():
            if self.index == (1, 2) and spelled.endswith(f".{half}_proj.weight"):
                return right(self, spelled.replace(f"{half}_proj", f"{other}_proj"))
        return right(self, spelled)

    patch.setattr(Instance, "hf", wrong)


@dataclass(frozen=True)
class Reversed(ops.Copy):
    """The rows in the other order: one unit, so that no cut shows it."""

    def units(self, rows: int, config: Any) -> int:
        return 1

    def megatron_rows(self, start: int, stop: int, rows: int, ctx: Any) -> tuple[tuple[int, int], ...]:
        return ((0, rows),)

    def hf_rows(self, start: int, stop: int, config: Any) -> tuple[tuple[int, int], ...]:
        return ((0, config.moe.num_experts),)

    def moves_rows_only(self, ctx: Any) -> bool:
        return False

    def views(self, megatron: Any, hf: Any, ctx: Any) -> list[Any]:
        return [(megatron[0][at : at + 1], hf[0][hf[0].shape[0] - 1 - at :][:1]) for at in range(hf[0].shape[0])]


def router_rows_permuted(patch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["qwen3-moe"]
    rows = tuple(
        dataclasses.replace(row, op=Reversed()) if row.megatron.endswith("router.weight") else row
        for row in family.rows
    )
    patch.setitem(FAMILIES, "qwen3-moe", dataclasses.replace(family, rows=rows))


MAPPINGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "experts permuted": experts_permuted,
    "router rows permuted": router_rows_permuted,
    "gate and up exchanged in one expert": gate_and_up_exchanged,
}


def imported(out: Path, to_megatron) -> dict[str, Tensors]:
    to_megatron("qwen3-moe", "--model-path", CASE / "hf", "--out", out, *LAYOUT).succeeded()
    return read_ranks(out)[0]


def as_golden(found: dict[str, Tensors]) -> bool:
    golden = read_ranks(CASE / "megatron-torch-tp2ep2")[0]
    return all(
        torch.equal(found[rank][name], tensor)
        for rank, tensors in golden.items()
        for name, tensor in tensors.items()
        if "word_embeddings" not in name and "output_layer" not in name  # whose padding is nobody's
    )


def verified(source: Path, checkpoint: Path, report: Path) -> dict[str, Any]:
    result = run("verify", source, checkpoint, "--json", report)
    found = json.loads(report.read_text())
    assert result.code == (0 if found["same"] else 1), result.text
    return found


def test_the_mapping_is_that_of_others(tmp_path: Path, to_megatron) -> None:
    assert as_golden(imported(tmp_path / "out", to_megatron))
    assert verified(CASE / "hf", tmp_path / "out", tmp_path / "found.json")["verdict"] == "identical"


@pytest.mark.parametrize("mutation", MAPPINGS)
def test_mistakes_in_the_mapping_are_caught(
    mutation: str, tmp_path: Path, to_megatron, to_hf, monkeypatch: pytest.MonkeyPatch
) -> None:
    MAPPINGS[mutation](monkeypatch)
    assert not as_golden(imported(tmp_path / "out", to_megatron))
    found = verified(CASE / "hf", tmp_path / "out", tmp_path / "found.json")
    assert not found["exact"]["differences"]  # it goes through the same mapping
    assert (found["same"], found["numeric"]["stage"]) == (False, "mlp")
    to_hf("--input_dir", tmp_path / "out", "--output_dir", tmp_path / "back", "--no_tokenizer").succeeded()
    there, back = load_file(CASE / "hf" / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name][: len(tensor)], tensor) for name, tensor in there.items())  # as blind


# --- in the files ----------------------------------------------------------------------------------------------------


def move_experts(tensors: Tensors) -> None:
    for kind in ("gate", "up", "down"):
        names = [f"model.layers.1.mlp.experts.{expert}.{kind}_proj.weight" for expert in range(4)]
        held = [tensors[name] for name in names]
        tensors |= dict(zip(names, [held[1], held[0], held[2], held[3]], strict=True))


def move_router_rows(tensors: Tensors) -> None:
    name = "model.layers.1.mlp.gate.weight"
    tensors[name] = tensors[name].flip(0).contiguous()


def exchange_halves(tensors: Tensors) -> None:
    gate, up = (f"model.layers.1.mlp.experts.2.{half}_proj.weight" for half in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def zeros_of(end: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(end) and ".layers.1." in name:
                tensors[name] = torch.zeros_like(tensors[name])

    return edit


BIAS, GATE = "e_score_correction_bias", "shared_expert_gate.weight"
FILES: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "experts permuted": ("qwen3-moe", move_experts, "mlp.experts.0.gate_proj.weight"),
    "router rows permuted": ("qwen2-moe", move_router_rows, "mlp.gate.weight"),
    "gate and up exchanged in one expert": ("glm4-moe", exchange_halves, "mlp.experts.2.gate_proj.weight"),
    "expert bias dropped": ("glm4-moe", zeros_of(BIAS), BIAS),
    "gate of the shared experts dropped": ("qwen2-moe", zeros_of(GATE), GATE),
}


def with_tensors(folder: Path, source: Path, edit: Callable[[Tensors], Any]) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("mutation", FILES)
def test_mistakes_in_the_files_are_found(mutation: str, tmp_path: Path, to_megatron) -> None:
    name, edit, tensor = FILES[mutation]
    model = moe_models.MODELS[name]
    source = tm.write_huggingface(tmp_path / "hf", model, tokenizer=False)
    wrong = with_tensors(tmp_path / "wrong", source, edit)
    to_megatron(model.family, "--model-path", source, "--out", tmp_path / "out").succeeded()
    assert verified(source, tmp_path / "out", tmp_path / "found.json")["same"]
    found = verified(wrong, tmp_path / "out", tmp_path / "found.json")
    assert any(tensor in each["tensor"] for each in found["exact"]["differences"])
    assert (found["numeric"]["same"], found["numeric"]["stage"], found["numeric"]["layer"]) == (False, "mlp", 1)
    expected = tm.folder_logits(source, PROMPT)
    assert (logits(model, wrong) - expected).abs().max() > 1e-2
    assert (logits(model, source) - expected).abs().max() < 1e-5


PROMPT = torch.arange(1, 200, 5)


def logits(model: moe_models.Mixture, folder: Path) -> Tensor:
    from weights_conversion.configs import hf_config
    from weights_conversion.mapping.dialects import MEGATRON_CORE

    config = hf_config.read_config(model.family, tm.read_json(folder / "config.json"), MEGATRON_CORE, "config.json")
    *_, (_, _, found) = trace(config, HF, huggingface_weights(folder), PROMPT[None])
    return found[0]


@pytest.mark.parametrize(("name", "end"), [("glm4-moe", BIAS), ("qwen2-moe", GATE)])
def test_what_is_not_there_is_named(name: str, end: str, tmp_path: Path, to_megatron) -> None:
    model = moe_models.MODELS[name]
    source = tm.write_huggingface(tmp_path / "hf", model, tokenizer=False)

    def drop(tensors: Tensors) -> None:
        for each in [each for each in tensors if each.endswith(end)]:
            del tensors[each]

    wrong = with_tensors(tmp_path / "wrong", source, drop)
    to_megatron(model.family, "--model-path", wrong, "--out", tmp_path / "out").refused("has no tensor", end)
    to_megatron(model.family, "--model-path", source, "--out", tmp_path / "out").succeeded()
    run("verify", wrong, tmp_path / "out").refused("has no tensor", end, code=2)


# --- what was reached ------------------------------------------------------------------------------------------------


def test_experts_that_no_token_reaches_are_counted(tmp_path: Path, to_megatron) -> None:
    """The routers of both layers prefer two experts each, whatever the token."""
    model = dataclasses.replace(
        moe_models.MODELS["glm4-moe"], name="few", changes=(("n_routed_experts", 8), ("num_experts_per_tok", 2))
    )

    def prefer(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(BIAS):
                tensors[name] = torch.tensor([9.0, 0, 0, 0, 0, 0, 9.0, 0])

    source = with_tensors(tmp_path / "few", tm.write_huggingface(tmp_path / "hf", model, tokenizer=False), prefer)
    to_megatron("glm4-moe", "--model-path", source, "--out", tmp_path / "out").succeeded()
    text = run("verify", source, tmp_path / "out", "--json", tmp_path / "found.json").succeeded().text
    assert "experts     the prompts' tokens reached 4 of 16 experts; no other was run" in text
    numeric = json.loads((tmp_path / "found.json").read_text())["numeric"]
    assert (numeric["experts_reached"], numeric["experts"]) == (4, 16)


def test_dense_models_reach_none(sources, imported, tmp_path: Path) -> None:
    run("verify", sources("llama2"), imported("llama2"), "--json", tmp_path / "found.json").succeeded()
    assert json.loads((tmp_path / "found.json").read_text())["numeric"]["experts"] is None
