"""Experts in Megatron-FSDP's checkpoints (fsdp_dtensor): each by its number in the name, gate and up apart, float32.

The names are those of core/transformer/fsdp_dtensor_checkpoint.py, the tensors of the tests' own naive conversion.
"""

from __future__ import annotations

import argparse
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import core_experts
import dist_files
import megatron_core as harness
import moe_models
import pytest
import tiny_models as tm
import torch
from golden_core import read_torch_dist
from megatron_files import assert_same_tensors
from torch import Tensor

# The local layer spec's names, which the naive conversion has -> those of Transformer Engine's modules.
NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def live_names(tensors: dict[str, Tensor], spelling: str, experts: core_experts.Experts) -> dict[str, Tensor]:
    """As Megatron-FSDP stores them: the GLU's halves under _w and _v, everything float32."""
    found = {}
    for name, tensor in tensors.items():
        layer = int(name.split(".")[2]) if name.startswith("decoder.layers.") else None
        for local, fused in NORMS.items():
            if name.endswith(f".{local}") and not (local.startswith("pre_mlp") and experts.layers[layer or 0]):
                name = name.removesuffix(local) + fused
        name = "model.module." + core_experts.spelled(name, spelling)
        if ".linear_fc1.weight" in name:
            gate, up = tensor.chunk(2)
            found |= {f"{name}_w": gate.float(), f"{name}_v": up.float()}
        else:
            found[name] = tensor.float()
    return found


def uneven(tensor: Tensor) -> Any:
    """A DTensor's row blocks, of unequal length, as two ranks cut it."""
    at = tensor.shape[0] // 3
    if not at:
        return dist_files.whole(tensor)
    zeros = (0,) * (tensor.dim() - 1)
    return tuple(tensor.shape), [((0, *zeros), tensor[:at]), ((at, *zeros), tensor[at:])]


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def written(tmp_path: Path, to_megatron):
    def write(model: moe_models.Mixture, spelling: str) -> Path:
        source = tm.write_huggingface(tmp_path / "hf", model, tokenizer=False)
        to_megatron(model.family, "--model-path", source, "--out", tmp_path / "args").succeeded()
        args = argparse.Namespace(**read_torch_dist(tmp_path / "args")[1])
        args.params_dtype, args.ckpt_format = model.dtype, "fsdp_dtensor"
        sizes = harness.Sizes.from_hf(source / "config.json")
        assert sizes.experts is not None
        tensors = live_names(harness.rank_tensors(model.tensors(), sizes, (0, 1)), spelling, sizes.experts)
        if model.tied:
            del tensors["model.module.output_layer.weight"]
        objects = {"args": args, "iteration": 7, "checkpoint_version": 3.0, "num_floating_point_operations_so_far": 1.0}
        root = tmp_path / "fsdp"
        dist_files.write(root / "iter_0000007", {key: uneven(value) for key, value in tensors.items()}, objects)
        (root / "iter_0000007" / "metadata.json").unlink()
        (root / "latest_checkpointed_iteration.txt").write_text("7")
        return root

    return write


@pytest.mark.parametrize("spelling", ["grouped", "each"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe-mixed", "qwen3-moe-mixed", "glm4-moe"])
def test_experts_are_exported(name: str, spelling: str, written, to_hf, tmp_path: Path) -> None:
    model = dataclasses.replace(moe_models.MODELS[name], dtype=torch.bfloat16)
    root, out = written(model, spelling), tmp_path / "out"
    to_hf("--input_dir", root, "--output_dir", out, "--no_tokenizer", "--verify").succeeded()
    assert_same_tensors(tm.read_huggingface(out), model.tensors())


def test_another_layout(written, to_megatron, to_hf, tmp_path: Path) -> None:
    """Read as a source of rank files; every expert where it belongs."""
    model = moe_models.MODELS["qwen3-moe"]
    root, ranks, out = written(model, "grouped"), tmp_path / "ranks", tmp_path / "out"
    layout = ("--target", "megatron-core", "--ckpt-format", "torch", "--expert-model-parallel-size", 2)
    to_megatron("qwen3-moe", "--model-path", root, "--out", ranks, *layout).succeeded()
    to_hf("--input_dir", ranks, "--output_dir", out, "--no_tokenizer").succeeded()
    assert_same_tensors(tm.read_huggingface(out), model.tensors())


@pytest.mark.parametrize("asked", [None, torch.float32], ids=["as trained", "as stored"])
def test_another_layout_has_the_type_of_training(asked, written, to_megatron, to_hf, tmp_path: Path) -> None:
    """The files hold the optimizer's float32; what is trained on is bfloat16, as an export says and does too."""
    model = dataclasses.replace(moe_models.MODELS["qwen3-moe"], dtype=torch.bfloat16)
    root, out = written(model, "grouped"), tmp_path / "out"
    options = ("--dtype", "float32") if asked else ()
    said = to_megatron("qwen3-moe", "--model-path", root, "--out", out, *options, "--verify").succeeded()
    note = "dtype      torch.bfloat16, as trained; the checkpoint holds the optimizer's own (--dtype)"
    assert (note in said.out) == (asked is None)
    assert ("--bf16" in said.out) == (asked is None)
    tensors, _ = read_torch_dist(out)
    assert {tensor.dtype for tensor in tensors.values()} == {asked or torch.bfloat16}


def test_an_expert_that_is_not_there(written, to_hf, tmp_path: Path) -> None:
    """A half of one, the name of which is what the file is to have."""
    root = written(moe_models.MODELS["qwen3-moe"], "grouped")
    path = root / "iter_0000007" / ".metadata"
    index = pickle.loads(path.read_bytes())
    lost = "model.module.decoder.layers.1.mlp.experts.linear_fc1.weight2_v"
    del index.state_dict_metadata[lost]
    index.storage_data = {key: place for key, place in index.storage_data.items() if key.fqn != lost}
    path.write_bytes(pickle.dumps(index))
    to_hf("--input_dir", root, "--output_dir", tmp_path / "out", "--no_tokenizer").refused(
        "decoder.layers.1.mlp.experts.linear_fc1.weight2_v: no such tensor, the args say [24, 64]"
    )
