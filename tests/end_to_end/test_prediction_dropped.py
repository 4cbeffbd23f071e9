"""--mtp drop: layers that predict further tokens are left out, whatever holds them, and the report says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import latent_models as lm
import pytest
import torch
from safetensors.torch import load_file

KIND = ("deepseek-v3", "--model-path")
STAGES = ("--ckpt-format", "torch", "--pipeline-model-parallel-size", 3, "--tensor-model-parallel-size", 2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
    return lm.write(tmp_path_factory.mktemp("latent") / "hf", mtp=2, **sizes)


def is_whole(folder: Path, source: Path) -> None:
    """`folder` is the source without the layers behind the last one."""
    wanted = load_file(source / "model.safetensors")
    wanted = {
        name: tensor for name, tensor in wanted.items() if not name.startswith(("model.layers.3", "model.layers.4"))
    }
    found = load_file(folder / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("layout", [(), STAGES], ids=["torch_dist", "rank files"])
def test_on_import(layout: tuple[Any, ...], source: Path, tmp_path: Path, to_megatron, to_hf) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    said = to_megatron(*KIND, source, "--out", out, "--mtp", "drop", "--verify", *layout).succeeded()
    number = len(
        [name for name in load_file(source / "model.safetensors") if name > "model.layers.3" and "layers" in name]
    )
    assert f"are left out (--mtp drop): {number} tensors" in said.out
    assert "--mtp-num-layers" not in said.out
    to_hf("--input_dir", out, "--output_dir", back, "--no_tokenizer", "--verify").succeeded()
    is_whole(back, source)


@pytest.mark.parametrize("layout", [(), STAGES], ids=["torch_dist", "rank files"])
def test_on_export_and_into_another_layout(
    layout: tuple[Any, ...], source: Path, tmp_path: Path, to_megatron, to_hf
) -> None:
    out, back, other = tmp_path / "out", tmp_path / "back", tmp_path / "other"
    to_megatron(*KIND, source, "--out", out, *layout).succeeded()
    said = to_hf("--input_dir", out, "--output_dir", back, "--no_tokenizer", "--verify", "--mtp", "drop").succeeded()
    assert "are left out (--mtp drop)" in said.out
    is_whole(back, source)
    to_megatron(*KIND, out, "--out", other, "--mtp", "drop", "--verify").succeeded()
    to_hf("--input_dir", other, "--output_dir", tmp_path / "again", "--no_tokenizer").succeeded()
    is_whole(tmp_path / "again", source)


def test_verify_says_what_is_left_out(tmp_path: Path, to_megatron) -> None:
    from conftest import run

    source, out = lm.write(tmp_path / "hf", mtp=1), tmp_path / "out"
    to_megatron(*KIND, source, "--out", out, "--mtp", "drop").succeeded()
    kept = run("weights_conversion.verify", source, out)
    assert kept.code == 1
    assert "mtp_num_layers is 1 in the source and 0 in the checkpoint" in kept.out
    assert run("weights_conversion.verify", source, out, "--mtp", "drop").succeeded().code == 0


def test_a_source_without_any(tmp_path: Path, to_megatron) -> None:
    source = lm.write(tmp_path / "hf")
    said = to_megatron(*KIND, source, "--out", tmp_path / "out", "--mtp", "drop").succeeded()
    assert "the source has no layers that predict further tokens" in said.out
