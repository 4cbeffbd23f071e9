"""Which spelling of experts is written, and stacked keys or keys layer by layer: Megatron-LM's own flags decide."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, run
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(REPOSITORY / "tests" / "configs"))
from moe_families import CONFIGS, read

from weights_conversion.architectures import FAMILIES
from weights_conversion.formats.dist_index import read_metadata
from weights_conversion.formats.torch_dist import open_dist


def source(family: str, folder: Path, **changes: object) -> Path:
    """A model of random weights, as the hub has it: one tensor for each expert."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[family] | changes))
    config = read(family, **{key: value for key, value in changes.items() if key != "model_type"})
    random, tensors = torch.Generator().manual_seed(7), {}
    for instance in FAMILIES[family].instances(config):
        for name, shape in zip(instance.row.hf, instance.row.hf_shapes(config), strict=True):
            dtype = torch.float32 if instance.row.dtype else torch.bfloat16
            tensors[instance.hf(name)] = torch.randn(shape, generator=random).to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def exported(root: Path, out: Path, to_hf) -> dict[str, torch.Tensor]:
    to_hf("--input_dir", root, "--output_dir", out, "--no_tokenizer").succeeded()
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(("freq", "stacked"), [(None, True), ("1", True), ("([1]*4)", False)])
def test_keys_of_torch_dist(freq: str | None, stacked: bool, to_megatron, to_hf, tmp_path: Path) -> None:
    hf, root = source("qwen3-moe", tmp_path / "hf"), tmp_path / "mt"
    asked = () if freq is None else ("--moe-layer-freq", freq)
    to_megatron("qwen3-moe", "--model-path", hf, "--out", root, *asked).succeeded()
    keys = read_metadata(root / "release" / ".metadata")[0]
    assert ("decoder.layers.mlp.experts.experts.linear_fc1.weight" in keys) is stacked
    assert ("decoder.layers.3.mlp.experts.experts.linear_fc1.weight" in keys) is not stacked
    assert open_dist(root / "release", "release").args["moe_layer_freq"] == (1 if stacked else [1, 1, 1, 1])
    found, expected = exported(root, tmp_path / "out", to_hf), load_file(hf / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("grouped", [True, False])
def test_experts_in_rank_files(grouped: bool, to_megatron, to_hf, tmp_path: Path) -> None:
    hf, root = source("qwen3-moe", tmp_path / "hf"), tmp_path / "mt"
    options = ["--ckpt-format", "torch", "--expert-model-parallel-size", "2"] + ["--moe-grouped-gemm"] * grouped
    result = to_megatron("qwen3-moe", "--model-path", hf, "--out", root, *options).succeeded()
    assert ("--moe-grouped-gemm" in result.text) is not grouped
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(root / "release" / "mp_rank_00_001" / "model_optim_rng.pt", weights_only=True)
    assert content["args"].moe_grouped_gemm is grouped
    each = "decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight"
    assert (each in content["model"]) is not grouped
    assert ("decoder.layers.0.mlp.experts.linear_fc2.weight1" in content["model"]) is grouped
    found, expected = exported(root, tmp_path / "out", to_hf), load_file(hf / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("freq", "word"), [("2", "--moe-layer-freq 2"), ("[1,1]", "of 2 layers"), ("x", "--moe-layer-freq 'x'")]
)
def test_layers_of_another_model(freq: str, word: str, to_megatron, tmp_path: Path) -> None:
    hf = source("qwen3-moe", tmp_path / "hf")
    to_megatron("qwen3-moe", "--model-path", hf, "--out", tmp_path / "mt", "--moe-layer-freq", freq).refused(word)
    assert not (tmp_path / "mt").exists()


def test_dense_models_have_no_experts(sources, to_megatron, tmp_path: Path) -> None:
    for option in (("--moe-grouped-gemm",), ("--moe-layer-freq", "1")):
        to_megatron(
            "llama2", "--model-path", sources("llama2"), "--out", tmp_path / "mt", "--target", "megatron-core", *option
        ).refused(option[0])


def test_a_name_that_transformers_does_not_know(to_megatron, to_hf, tmp_path: Path) -> None:
    """Kimi-K2's model_type needs code of its own; its classes are DeepSeek-V3's."""
    hf = source("deepseek-v3", tmp_path / "hf", model_type="kimi_k2", num_nextn_predict_layers=0)
    to_megatron("deepseek-v3", "--model-path", hf, "--out", tmp_path / "mt").succeeded()
    exported(tmp_path / "mt", tmp_path / "out", to_hf)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("deepseek_v3", ["DeepseekV3ForCausalLM"])


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "qwen3-moe", "glm4-moe"])
def test_another_layout_of_a_checkpoint(family: str, to_megatron, to_hf, tmp_path: Path) -> None:
    """Of rank files from torch_dist; in Megatron-LLM's format there are no experts."""
    changes = {"num_nextn_predict_layers": 0} if family == "glm4-moe" else {}
    hf, first, ranks = source(family, tmp_path / "hf", **changes), tmp_path / "first", tmp_path / "ranks"
    to_megatron(family, "--model-path", hf, "--out", first).succeeded()
    layout = ("--target", "megatron-core", "--ckpt-format", "torch", "--expert-model-parallel-size", 2)
    to_megatron(family, "--model-path", first, "--out", ranks, *layout, "--verify").succeeded()
    found, expected = exported(ranks, tmp_path / "out", to_hf), load_file(hf / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    refused = to_megatron(family, "--model-path", first, "--out", tmp_path / "llm", "--target", "megatron-llm")
    refused.refused("Megatron-LLM cannot express", "moe")


def test_one_expert_is_no_mixture(to_megatron, tmp_path: Path) -> None:
    hf = source("qwen3-moe", tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"num_experts": 1, "num_experts_per_tok": 1}))
    to_megatron("qwen3-moe", "--model-path", hf, "--out", tmp_path / "out").refused("1 expert, where a mixture")


@pytest.mark.parametrize("layout", [("--expert-model-parallel-size", 2), ("--tensor-model-parallel-size", 2)])
def test_all_experts_of_a_rank_in_one(layout: tuple, to_megatron, to_hf, tmp_path: Path) -> None:
    """moe_single_grouped_weight of 0.18 and newer: (experts of the rank, rows, columns)."""
    hf, root = source("qwen3-moe", tmp_path / "hf"), tmp_path / "mt"
    options = ("--ckpt-format", "torch", "--moe-grouped-gemm", *layout)
    to_megatron("qwen3-moe", "--model-path", hf, "--out", root, *options).succeeded()
    for path in root.glob("release/mp_rank_*/model_optim_rng.pt"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, weights_only=True)
        model = content["model"]
        count = sum(name.startswith("decoder.layers.0.mlp.experts.linear_fc1.weight") for name in model)
        for layer in range(4):
            for linear in ("linear_fc1", "linear_fc2"):
                whole = f"decoder.layers.{layer}.mlp.experts.{linear}.weight"
                model[whole] = torch.stack([model.pop(f"{whole}{expert}") for expert in range(count)])
        content["args"].moe_single_grouped_weight = True
        torch.save(content, path)
    found, expected = exported(root, tmp_path / "out", to_hf), load_file(hf / "model.safetensors")
    assert all(torch.equal(found[name][: len(tensor)], tensor) for name, tensor in expected.items())


def test_the_type_of_the_routers_scores(to_megatron, tmp_path: Path) -> None:
    """float32 unless a run says otherwise; no part of the model, and not restored by --use-checkpoint-args."""
    hf, first, again = source("qwen3-moe", tmp_path / "hf"), tmp_path / "first", tmp_path / "again"
    told = to_megatron("qwen3-moe", "--model-path", hf, "--out", first).succeeded().text
    assert "--moe-router-dtype fp32" in told
    with torch.serialization.safe_globals([argparse.Namespace]):  # a source of Hugging Face states none
        assert not hasattr(torch.load(first / "release" / "common.pt", weights_only=True)["args"], "moe_router_dtype")
    path = first / "release" / "common.pt"
    for value, flag in (("fp64", "--moe-router-dtype fp64"), (None, "")):
        with torch.serialization.safe_globals([argparse.Namespace]):
            common = torch.load(path, weights_only=True)
        common["args"].moe_router_dtype = value
        torch.save(common, path)
        options = ("--target", "megatron-core", "--ckpt-format", "torch", "--overwrite")
        told = to_megatron("qwen3-moe", "--model-path", first, "--out", again, *options).succeeded().text
        assert flag in told
        assert ("--moe-router-dtype" in told) is bool(flag)
        with torch.serialization.safe_globals([argparse.Namespace]):
            written = torch.load(again / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=True)
        assert written["args"].moe_router_dtype == value
    found = run("verify", first, again)
    assert "moe_router_dtype" not in found.succeeded().text
    common["args"].moe_router_dtype = "fp32"
    torch.save(common, path)
    text = run("verify", first, again).succeeded().text
    assert "moe_router_dtype is fp32 in the source and None in the checkpoint" in text
