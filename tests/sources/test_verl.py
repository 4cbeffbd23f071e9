"""verl's folders: the model is stated in huggingface/config.json beside the weights, and no args are stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_models as tm
import torch


@pytest.fixture
def verl(tmp_path: Path, to_megatron) -> Path:
    """What verl's steps leave at global_step_7, of a tiny qwen2."""
    hf = tm.write_huggingface(tmp_path / "hf", tm.DENSE["qwen2"], tokenizer=False)
    options = ("--make-vocab-size-divisible-by", 256)
    to_megatron("qwen2", "--model-path", hf, "--out", tmp_path / "m", *options).succeeded()
    actor = tmp_path / "verl" / "global_step_7" / "actor"
    shutil.copytree(tmp_path / "m" / "release", actor / "dist_ckpt")
    torch.save({"lr_scheduler": {"max_lr": 1e-5}}, actor / "dist_ckpt" / "common.pt")
    (actor / "huggingface").mkdir()
    shutil.copy(hf / "config.json", actor / "huggingface")
    (tmp_path / "verl" / "latest_checkpointed_iteration.txt").write_text("7")
    return tmp_path / "verl"


@pytest.mark.parametrize("inner", [".", "global_step_7", "global_step_7/actor", "global_step_7/actor/dist_ckpt"])
def test_every_folder_around(inner: str, verl: Path, to_hf, tmp_path: Path) -> None:
    to_hf("--input_dir", verl / inner, "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
    expected, found = tm.read_huggingface(tmp_path / "hf"), tm.read_huggingface(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert tm.read_json(tmp_path / "out" / "config.json")["model_type"] == "qwen2"


def test_a_step_that_is_not_there(verl: Path, to_hf, tmp_path: Path) -> None:
    (verl / "latest_checkpointed_iteration.txt").write_text("8")
    said = to_hf("--input_dir", verl, "--output_dir", tmp_path / "out", "--no_tokenizer")
    said.refused("iter_0000008", "it has: global_step_7")


def test_a_link_to_the_weights(verl: Path, to_hf, tmp_path: Path) -> None:
    """What states the model lies beside the folder, not beside the link."""
    (tmp_path / "link").symlink_to(verl / "global_step_7" / "actor" / "dist_ckpt")
    to_hf("--input_dir", tmp_path / "link", "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
    assert tm.read_json(tmp_path / "out" / "config.json")["model_type"] == "qwen2"


def test_a_config_of_more_rows_is_named_itself(verl: Path, to_hf, tmp_path: Path) -> None:
    path = verl / "global_step_7" / "actor" / "huggingface" / "config.json"
    path.write_text(json.dumps(tm.read_json(path) | {"vocab_size": 5000}))
    said = to_hf("--input_dir", verl, "--output_dir", tmp_path / "out", "--no_tokenizer")
    said.refused(f"{path} says 5000 vocabulary rows", "another model")
    assert "--reference" not in said.text


def test_without_its_config_the_folder_that_states_it_is_named(verl: Path, to_hf, tmp_path: Path) -> None:
    shutil.rmtree(verl / "global_step_7" / "actor" / "huggingface")
    said = to_hf("--input_dir", verl, "--output_dir", tmp_path / "out", "--no_tokenizer")
    said.refused("nothing says what model it is", "huggingface/")
