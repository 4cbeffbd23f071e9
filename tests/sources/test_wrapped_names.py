"""Names that a wrapper has lengthened are read; those of another program are one sentence."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models as tm
import torch
from megatron_files import assert_same_tensors
from safetensors.torch import save_file

from weights_conversion.formats.wrappers import unwrapped

NAME = "llama2"
WRAPPED: dict[str, Callable[[str], str]] = {
    "module.": lambda name: "module." + name,
    "twice": lambda name: "_orig_mod.module." + name,
    "model.module.": lambda name: "model.module." + name,
    "peft without lora": lambda name: "base_model.model." + name,
    "a field": lambda name: "model." + name,
    "compiled layers": lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
    "fsdp": lambda name: "_fsdp_wrapped_module." + name.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
}


def given(folder: Path, rename: Callable[[str], str]) -> Path:
    """The model's folder, with other names."""
    tm.write_huggingface(folder, tm.MODELS[NAME])
    tensors = tm.read_huggingface(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_names_are_read(wrapper: str, sources, to_megatron, to_hf, tmp_path: Path) -> None:
    folder = given(tmp_path / "in", WRAPPED[wrapper])
    to_megatron("llama2", "--model-path", folder, "--out", tmp_path / "mt", "--verify").succeeded()
    to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
    assert_same_tensors(tm.read_huggingface(tmp_path / "out"), tm.read_huggingface(sources(NAME)))


def test_rank_file_of_a_wrapped_model(imported, sources, to_hf, tmp_path: Path) -> None:
    root = imported(NAME, "--target", "megatron-core", "--ckpt-format", "torch")
    path = root / "release" / "mp_rank_00" / "model_optim_rng.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    content["model"] = {f"module.module.{name}": tensor for name, tensor in content["model"].items()}
    there = tmp_path / "in" / "release" / "mp_rank_00"
    there.mkdir(parents=True)
    torch.save(content, there / path.name)
    options = ("--no_tokenizer", "--model", "llama2", "--verify")
    to_hf("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out", *options).succeeded()
    assert_same_tensors(tm.read_huggingface(tmp_path / "out"), tm.read_huggingface(sources(NAME)))


def test_names_that_are_left_alone() -> None:
    plain = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]  # tied: no head
    some = ["module.a", "b"]
    lora = ["base_model.model.model.a.lora_A.weight"]
    two = ["x._orig_mod.a", "x.a"]  # would be one
    for names in (plain, some, lora, two):
        assert list(unwrapped(names).values()) == names


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        (lambda name: name.replace("model.layers.", "layers.").replace("self_attn.", "attention.w"), "Meta"),
        (lambda name: "language_model.encoder.layers.0.input_norm." + name, "NVIDIA's legacy Megatron-LM"),
        (lambda name: name.replace(".weight", ".qweight"), "quantised"),
        (lambda name: "gpt_neox.layers." + name, "GPT-NeoX"),
    ],
)
def test_other_programs_names_are_one_sentence(rename, words: str, to_megatron, tmp_path: Path) -> None:
    folder = given(tmp_path / "in", rename)
    said = to_megatron("llama2", "--model-path", folder, "--out", tmp_path / "mt")
    said.refused(words)
    assert len(said.err.strip().splitlines()) == 1
