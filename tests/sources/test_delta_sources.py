"""Quantised sources and adapters of models whose Megatron tensors join several parts: gated delta, and mamba.

What comes out is what an import of the source with its values put in by hand is, and the proof says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import delta_models
import hybrid_models
import pytest
import torch
from conftest import Result
from delta_models import DELTAS
from golden_core import Tensors, read_ranks, read_torch_dist
from safetensors.torch import load_file, save_file

Script = Callable[..., Result]
RANKS = ("--ckpt-format", "torch", "--tensor-model-parallel-size", 2)
FORMS: dict[str, tuple[Any, ...]] = {"torch_dist": (), "torch TP 2": RANKS}
BLOCK = 8


def folder(place: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config))
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


def same(one: Path, other: Path) -> bool:
    def read(place: Path) -> dict[str, Tensors]:
        return {"": read_torch_dist(place)[0]} if any(place.glob("*/.metadata")) else read_ranks(place)[0]

    ours, wanted = read(one), read(other)
    assert ours.keys() == wanted.keys()
    return all(
        ours[rank].keys() == tensors.keys() and all(torch.equal(ours[rank][key], each) for key, each in tensors.items())
        for rank, tensors in wanted.items()
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["next", "3.5", "3.5-moe"])
def test_blocks_of_eight_bits(name: str, form: str, to_megatron: Script, tmp_path: Path) -> None:
    """As the hub's fp8 repositories have them; blocks of rows that a part does not begin with."""
    model, random = DELTAS[name], torch.Generator().manual_seed(0)
    stored: Tensors = {}
    plain: Tensors = {}
    for key, tensor in model.tensors().items():
        stored[key] = plain[key] = tensor
        if not key.endswith(("in_proj_qkv.weight", "in_proj_qkvz.weight", "in_proj_z.weight", "_proj.weight")):
            continue
        rows, columns = tensor.shape
        scales = 0.001 + 0.001 * torch.rand(-(-rows // BLOCK), -(-columns // BLOCK), generator=random)
        values = (100 * torch.randn(rows, columns, generator=random)).to(torch.float8_e4m3fn)
        factors = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        stored |= {key: values, f"{key}_scale_inv": scales}
        plain[key] = (values.float() * factors).to(torch.bfloat16)
    said = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    sources = {
        "fp8": folder(tmp_path / "fp8", model.config() | {"quantization_config": said}, stored),
        "plain": folder(tmp_path / "plain", model.config(), plain),
    }
    for kind, source in sources.items():
        out = tmp_path / f"{kind}-out"
        to_megatron(model.family, "--model-path", source, "--out", out, *FORMS[form], "--verify").succeeded()
    assert same(tmp_path / "fp8-out", tmp_path / "plain-out")


ADAPTED = {
    "next": ("in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj"),
    "3.5": ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "q_proj"),
    "3.5-moe": ("in_proj_qkv", "shared_expert.up_proj"),
    "3.5-alone": ("in_proj_qkv", "in_proj_z", "up_proj"),
    "nemotron": ("mixer.in_proj", "mixer.out_proj", "q_proj"),
}


def source_of(name: str, place: Path) -> tuple[str, Path]:
    if name == "nemotron":
        return "nemotron-h", hybrid_models.write(place)
    return DELTAS[name].family, delta_models.write(place, DELTAS[name])


def adapter(place: Path, tensors: Tensors, ends: tuple[str, ...]) -> tuple[Path, Tensors]:
    """A PEFT folder for modules that end so, and the tensors with it put in."""
    random = torch.Generator().manual_seed(1)
    factors: Tensors = {}
    found = dict(tensors)
    for key, tensor in tensors.items():
        module = key.removesuffix(".weight")
        if not module.endswith(ends) or not key.endswith(".weight"):
            continue
        below = 0.1 * torch.randn(2, tensor.shape[1], generator=random)
        above = 0.1 * torch.randn(tensor.shape[0], 2, generator=random)
        start = f"base_model.model.{module}.lora_"
        factors |= {f"{start}A.weight": below, f"{start}B.weight": above}
        found[key] = (tensor.float() + 2.0 * (above @ below)).to(tensor.dtype)
    place.mkdir()
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(ends)}
    (place / "adapter_config.json").write_text(json.dumps(said))
    save_file(factors, place / "adapter_model.safetensors")
    return place, found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_of_joined_parts(name: str, form: str, to_megatron: Script, tmp_path: Path) -> None:
    family, hf = source_of(name, tmp_path / "hf")
    peft, tensors = adapter(tmp_path / "peft", load_file(hf / "model.safetensors"), ADAPTED[name])
    by_hand = folder(tmp_path / "by-hand", json.loads((hf / "config.json").read_text()), tensors)
    asked = (family, *FORMS[form], "--verify", "--out")
    to_megatron(*asked, tmp_path / "ours", "--model-path", hf, "--adapter", peft).succeeded()
    to_megatron(*asked, tmp_path / "wanted", "--model-path", by_hand).succeeded()
    assert same(tmp_path / "ours", tmp_path / "wanted")


def test_an_adapter_of_a_convolution_is_refused_by_name(to_megatron: Script, tmp_path: Path) -> None:
    family, hf = source_of("3.5", tmp_path / "hf")
    place, _ = adapter(tmp_path / "peft", load_file(hf / "model.safetensors"), ("in_proj_z",))
    module = "base_model.model.model.language_model.layers.0.linear_attn.conv1d"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 1, 4), f"{module}.lora_B.weight": torch.ones(52, 2, 1)}
    save_file(load_file(place / "adapter_model.safetensors") | factors, place / "adapter_model.safetensors")
    asked = (family, "--model-path", hf, "--adapter", place, "--out", tmp_path / "out")
    to_megatron(*asked).refused("conv1d.lora_A", "convolution", "peft")
    assert not (tmp_path / "out").exists()
