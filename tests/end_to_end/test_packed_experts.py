"""Experts that one tensor holds, as transformers 5 may save them: read by slices, and written so again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import moe_models
import pytest
import tiny_models as tm
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file

from weights_conversion.api import hf_to_megatron, megatron_to_hf
from weights_conversion.engine.streams import Source, Target
from weights_conversion.layouts.placement import TensorRef

CASE = GOLDEN / "core-qwen3-moe-tp2ep2"


def packed(folder: Path) -> Path:
    """The golden source with its experts packed: (E, 2f, H), gate above up, and (E, H, f)."""
    shutil.copytree(CASE / "hf", folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        parts = {
            kind: [tensors.pop(f"{prefix}{expert}.{kind}_proj.weight") for expert in range(4)]
            for kind in ("gate", "up", "down")
        }
        pairs = zip(parts["gate"], parts["up"], strict=True)
        tensors[f"{prefix}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        tensors[f"{prefix}down_proj"] = torch.stack(parts["down"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_packed_experts_come_back_packed(tmp_path: Path, to_megatron, to_hf) -> None:
    source, out, back = packed(tmp_path / "source"), tmp_path / "out", tmp_path / "back"
    to_megatron("qwen3-moe", "--model-path", source, "--out", out, "--verify").succeeded()
    to_hf("--input_dir", out, "--output_dir", back, "--no_tokenizer", "--verify").succeeded()
    found, wanted = load_file(back / "model.safetensors"), load_file(source / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_another_layout_keeps_them_packed(tmp_path: Path, to_megatron, to_hf) -> None:
    """What the first import said goes along."""
    source, back = packed(tmp_path / "source"), tmp_path / "back"
    to_megatron("qwen3-moe", "--model-path", source, "--out", tmp_path / "first").succeeded()
    layout = ("--ckpt-format", "torch", "--tensor-model-parallel-size", 2, "--expert-model-parallel-size", 2)
    again, third = tmp_path / "again", tmp_path / "third"
    to_megatron("qwen3-moe", "--model-path", tmp_path / "first", "--out", again, *layout).succeeded()
    to_megatron("qwen3-moe", "--model-path", again, "--out", third).succeeded()
    to_hf("--input_dir", third, "--output_dir", back, "--no_tokenizer").succeeded()
    found, wanted = load_file(back / "model.safetensors"), load_file(source / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_packed_and_single_experts_are_one_model(tmp_path: Path, to_megatron) -> None:
    folders = {"packed": packed(tmp_path / "source"), "single": CASE / "hf"}
    for name, source in folders.items():
        to_megatron("qwen3-moe", "--model-path", source, "--out", tmp_path / name).succeeded()
    ends = ("release/__0_1.distcp", "release/.metadata")
    assert all((tmp_path / "packed" / end).read_bytes() == (tmp_path / "single" / end).read_bytes() for end in ends)


def test_no_packed_tensor_is_ever_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts of a layer together may be 8.6 GiB: no read and no write of one is longer than an expert's matrix."""
    longest = {"read": 0, "written": 0}
    read, write = Source.read, Target.write

    def counted_read(self: Source, ref: TensorRef, start: int, into: torch.Tensor, *more: Any) -> Any:
        if len(ref.shape) == 3:
            longest["read"] = max(longest["read"], into.nbytes)
        return read(self, ref, start, into, *more)

    def counted_write(self: Target, ref: TensorRef, start: int, data: torch.Tensor, *more: Any) -> Any:
        if len(ref.shape) == 3:
            longest["written"] = max(longest["written"], data.nbytes)
        return write(self, ref, start, data, *more)

    monkeypatch.setattr(Source, "read", counted_read)
    monkeypatch.setattr(Target, "write", counted_write)
    source = packed(tmp_path / "source")
    hf_to_megatron("qwen3-moe", source, out=tmp_path / "out")
    assert (
        0
        < longest["read"]
        <= max(tensor[0].nbytes for tensor in load_file(source / "model.safetensors").values() if tensor.dim() == 3)
    )
    megatron_to_hf(tmp_path / "out", tmp_path / "back", no_tokenizer=True)
    assert longest["written"] == longest["read"]


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe-mixed", "qwen3-moe-mixed", "glm4-moe"])
def test_what_transformers_itself_packs(name: str, tmp_path: Path, to_megatron, to_hf) -> None:
    """Saved under its own names (save_original_format=False), where Mixtral's router has another name too."""
    import transformers

    model = moe_models.MODELS[name]
    plain, source, back = tmp_path / "plain", tmp_path / "source", tmp_path / "back"
    tm.write_huggingface(plain, model, tokenizer=False)
    network = transformers.AutoModelForCausalLM.from_pretrained(plain)
    network.save_pretrained(source, save_original_format=False)
    to_megatron(model.family, "--model-path", source, "--out", tmp_path / "out", "--verify").succeeded()
    to_hf("--input_dir", tmp_path / "out", "--output_dir", back, "--no_tokenizer", "--verify").succeeded()
    found, wanted = load_file(back / "model.safetensors"), load_file(source / "model.safetensors")
    assert "model.layers.1.mlp.experts.gate_up_proj" in wanted
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    prompt = torch.arange(1, 200, 5)
    assert torch.equal(tm.folder_logits(back, prompt), tm.folder_logits(plain, prompt))
