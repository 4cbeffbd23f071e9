"""The tokenizer on its whole way, by the scripts: from a source, through training's args and layouts, to an export."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import tokenizer_models as tiny
import torch
from conftest import Script
from megatron_files import load_rank, save_rank

MODEL = replace(tm.MODELS["llama2"], vocab=352)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A source without any tokenizer."""
    folder = tm.write_huggingface(tmp_path / "hf", MODEL)
    for path in folder.iterdir():
        if path.name != "config.json" and path.suffix != ".safetensors":
            path.unlink()
    return folder


def stated(root: Path, **args: Any) -> Path:
    """The checkpoint's args with these changes, as training leaves them: no manifest, no tokenizer beside it."""
    for path in root.glob("*"):
        if path.is_file() and path.suffix != ".txt":
            path.unlink()
    for path in root.rglob("model_optim_rng.pt"):
        content = load_rank(path)
        vars(content["args"]).update(args)
        save_rank(content, path)
    for path in root.rglob("common.pt"):
        content = torch.load(path, weights_only=False)
        vars(content["args"]).update(args)
        torch.save(content, path)
    return root


def test_a_source_without_a_tokenizer_is_reported(bare: Path, to_megatron: Script, tmp_path: Path) -> None:
    said = to_megatron("llama2", "--model-path", bare, "--out", tmp_path / "mt").succeeded()
    assert "holds no tokenizer" in said.text
    again = to_megatron("llama2", "--model-path", tmp_path / "mt", "--out", tmp_path / "again").succeeded()
    assert "holds no tokenizer" in again.text


@pytest.mark.parametrize(("target", "ckpt_format"), [("megatron-core", "torch_dist"), ("megatron-core", "torch"),
                                                     ("megatron-llm", "torch")])  # fmt: skip
def test_json_alone_goes_round(
    bare: Path, to_megatron: Script, to_hf: Script, tmp_path: Path, target: str, ckpt_format: str
) -> None:
    source = tiny.train_llama3(tmp_path / "llama3", vocab_size=280)
    for path in source.iterdir():
        shutil.copy(path, bare)
    said = to_megatron("llama2", "--model-path", bare, "--out", tmp_path / "mt", "--target", target, "--ckpt-format",
                       ckpt_format).succeeded()  # fmt: skip
    assert ("--tokenizer-type HuggingFaceTokenizer" in said.text) == (target == "megatron-core")
    to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "out").succeeded()
    for path in source.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not (tmp_path / "out" / "special_tokens_map.json").exists()


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_training_s_own_tokenizer_through_a_layout(
    bare: Path, to_megatron: Script, to_hf: Script, tmp_path: Path, ckpt_format: str
) -> None:
    """A file of any name, of a type that adds tokens, named by the args: exported, also after another layout."""
    model = tiny.train(tmp_path / "own.model", vocab_size=330)
    core = ("--target", "megatron-core", "--ckpt-format")
    to_megatron("llama2", "--model-path", bare, "--out", tmp_path / "mt", *core, ckpt_format).succeeded()
    root = stated(tmp_path / "mt", tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))
    to_megatron("llama2", "--model-path", root, "--out", tmp_path / "core", *core, "torch").succeeded()
    to_megatron("llama2", "--model-path", root, "--out", tmp_path / "llm", "--target", "megatron-llm").succeeded()
    for folder in ("mt", "core", "llm"):
        out = tmp_path / f"{folder}-out"
        to_hf("--input_dir", tmp_path / folder, "--output_dir", out).succeeded()
        assert (out / "tokenizer.model").read_bytes() == model.read_bytes()
        assert tiny.ids_of(out)["<PAD>"] == 334


def test_dead_classes_and_code_of_its_own(bare: Path, to_megatron: Script, to_hf: Script, tmp_path: Path) -> None:
    """tokenizer.json alone: the rest of the config stays, and AutoTokenizer finds a class."""
    from transformers import AutoTokenizer

    for path in (source := tiny.train_llama3(tmp_path / "own", vocab_size=280)).iterdir():
        shutil.copy(path, bare)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    code = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (bare / "tokenizer_config.json").write_text(json.dumps(settings | code))
    said = to_megatron("llama2", "--model-path", bare, "--out", tmp_path / "mt").succeeded()
    assert "auto_map" in said.text
    said = to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "out").succeeded()
    assert "OwnTokenizer" in said.text
    assert tm.read_json(tmp_path / "out" / "tokenizer_config.json") == settings
    for trust in (False, True):
        loaded = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=trust)
        assert loaded.bos_token_id == tiny.ids_of(source)["<|begin_of_text|>"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
@pytest.mark.parametrize("owned", ["folder", "file", "link"])
def test_what_others_made_at_a_path_that_args_name(
    bare: Path, to_megatron: Script, to_hf: Script, tmp_path: Path, owned: str
) -> None:
    """Neither its manifest nor its tokenizer is read, which is told; a flag that names it says that it is trusted."""
    to_megatron("llama2", "--model-path", bare, "--out", tmp_path / "mt").succeeded()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    tiny.train(theirs / "tokenizer.model", vocab_size=330)
    named = tmp_path / "link" if owned == "link" else theirs
    manifest = tm.read_json(tmp_path / "mt" / "conversion_manifest.json")
    manifest["config"]["rope_theta"] = manifest["model"]["rope_theta"] = 777.0
    (theirs / "conversion_manifest.json").write_text(json.dumps(manifest))
    if owned == "link":
        named.symlink_to(theirs)
    os.chown(named / "tokenizer.model" if owned == "file" else named, 2002, 2002, follow_symlinks=False)
    root = stated(tmp_path / "mt", load=None if owned == "file" else str(named),
                  vocab_file=str(named / "tokenizer.model") if owned == "file" else None)  # fmt: skip
    if owned == "file":
        (theirs / "conversion_manifest.json").unlink()
    back = ["--input_dir", root, "--output_dir", tmp_path / "out", "--model", "llama2"]
    to_hf(*back).refused("no tokenizer", *(["another user (2002)"] if owned == "file" else []))
    said = to_hf(*back, "--vocab_file", named / "tokenizer.model").succeeded()
    assert ("another user (2002)" in said.text) == (owned != "file")
    assert tm.read_json(tmp_path / "out" / "config.json")["rope_theta"] == 10000.0


def test_added_rows_that_nobody_names(to_megatron: Script, to_hf: Script, tmp_path: Path) -> None:
    """They are told: the run may have had names for them. Rows that the source had already say nothing."""
    folder = tm.write_huggingface(tmp_path / "hf", tm.MODELS["llama2"])
    to_megatron("llama2", "--model-path", folder, "--out", tmp_path / "m", "--true-vocab-size", 323).succeeded()
    back = ("--input_dir", tmp_path / "m", "--output_dir")
    told = "have no token: the source's embedding had 320 rows"
    assert f"rows 320 to 322 {told}" in to_hf(*back, tmp_path / "none").succeeded().err
    assert "row 322 has no token" in to_hf(*back, tmp_path / "two", "--vocab_extra_ids_list", "<a>,<b>").succeeded().err
    said = to_hf(*back, tmp_path / "all", "--vocab_extra_ids_list", "<a>,<b>,<c>").succeeded()
    assert "no token" not in said.text
    to_megatron("llama2", "--model-path", folder, "--out", tmp_path / "same").succeeded()
    said = to_hf("--input_dir", tmp_path / "same", "--output_dir", tmp_path / "back").succeeded()
    assert "no token" not in said.text
