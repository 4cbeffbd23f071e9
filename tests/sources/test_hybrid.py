"""HybridModel checkpoints of what a GPTModel holds: attention and MLP as layers of their own, by a pattern."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
from conftest import GOLDEN
from golden_core import read_torch_dist, root_of, unpickle

CASE = GOLDEN / "core-llama3-hybrid"
STORED = CASE / "megatron-hybrid"
PLAIN = (bool, int, float, str, list, tuple, type(None), torch.dtype)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def same(folder: Path) -> bool:
    found, expected = tm.read_huggingface(folder), tm.read_huggingface(CASE / "hf")
    return found.keys() == expected.keys() and all(torch.equal(found[name], t) for name, t in expected.items())


def with_args(tmp_path: Path, **changes: Any) -> Path:
    """The golden checkpoint with args changed, by a common.pt, which stands above the common state."""
    out = Path(shutil.copytree(STORED, tmp_path / "in"))
    _, args = read_torch_dist(STORED)
    plain = {name: value for name, value in args.items() if isinstance(value, PLAIN)}
    content = {"args": Namespace(**plain | changes), "checkpoint_version": 3.0, "iteration": 311}
    torch.save(content, root_of(out) / "common.pt")
    return out


def export(to_hf, root: Path, tmp_path: Path, *options: Any):
    return to_hf("--input_dir", root, "--output_dir", tmp_path / "out", "--model", "llama3", "--no_tokenizer",
                 "--true_vocab_size", 232, *options)  # fmt: skip


def test_export(to_hf, tmp_path: Path) -> None:
    export(to_hf, STORED, tmp_path, "--verify").succeeded()
    assert same(tmp_path / "out")
    assert tm.read_json(tmp_path / "out" / "config.json")["num_hidden_layers"] == 2


def test_cuts_of_the_pipeline_decide_nothing(to_hf, tmp_path: Path) -> None:
    export(to_hf, with_args(tmp_path, hybrid_layer_pattern="*-|*-"), tmp_path).succeeded()
    assert same(tmp_path / "out")


def test_to_another_layout(to_hf, to_megatron, tmp_path: Path) -> None:
    to_megatron("llama3", "--model-path", STORED, "--out", tmp_path / "m", "--ckpt-format", "torch",
                "--pipeline-model-parallel-size", 2, "--true-vocab-size", 232).succeeded()  # fmt: skip
    export(to_hf, tmp_path / "m", tmp_path).succeeded()
    assert same(tmp_path / "out")


def test_rank_files(to_hf, to_megatron, tmp_path: Path) -> None:
    """Legacy rank files have the same live names; layers count from 0 in each stage."""
    to_megatron("llama3", "--model-path", CASE / "hf", "--out", tmp_path / "m", "--ckpt-format", "torch",
                "--pipeline-model-parallel-size", 2).succeeded()  # fmt: skip
    for path in root_of(tmp_path / "m").glob("mp_rank_*/model_optim_rng.pt"):
        content = unpickle(path)
        content["args"] = Namespace(**vars(content["args"]) | {
            "hybrid_layer_pattern": "*-|*-", "num_layers": 4, "encoder_num_layers": 4,
            "spec": ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"],
        })  # fmt: skip
        model = {}
        for name, tensor in content["model"].items():
            if "input_layernorm" not in name and "pre_mlp_layernorm" not in name:  # the spellings of the local spec
                other = name.replace("layers.0.mlp.", "layers.1.mlp.").replace("final_layernorm", "final_norm")
                model[other] = tensor
        content["model"] = model
        torch.save(content, path)
    export(to_hf, tmp_path / "m", tmp_path).succeeded()
    assert same(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hybrid_layer_pattern": "M-*-"}, ("mamba_num_heads", "mamba_num_groups")),
        ({"hybrid_layer_pattern": "M-*-", "mamba_num_groups": 1}, ("M-*-", "llama3 does not have")),
        ({"hybrid_layer_pattern": "G-*-"}, ("gated delta",)),
        ({"hybrid_layer_pattern": "D-*-"}, ("sparse attention",)),
        ({"hybrid_layer_pattern": "*-*-/*-"}, ("multi-token prediction",)),
        ({"hybrid_layer_pattern": "**--"}, ("one sub-block each", "llama3 does not have")),
        ({"hybrid_layer_pattern": "*-X-"}, ("*-X-", "symbols of M*-E")),
        ({"spec": ["my.specs", "stack"]}, ("my.specs", "its own code")),
        ({"hybrid_layer_pattern": "*-*-*-"}, ("num_layers 4", "6 layers")),
        ({"hybrid_layer_pattern": "*-*-*-", "num_layers": 6, "encoder_num_layers": 6}, ("no tensor",)),
        ({"hybrid_layer_pattern": None, "hybrid_override_pattern": "M-M-", "mamba_num_groups": 1}, ("M-M-",)),
    ],
)
def test_what_is_refused(changes: Any, words: Any, to_hf, tmp_path: Path) -> None:
    export(to_hf, with_args(tmp_path, **changes), tmp_path).refused(*words)


def test_a_scaling_that_hybrid_models_ignore_is_warned_of(to_hf, tmp_path: Path) -> None:
    said = export(to_hf, with_args(tmp_path, use_rope_scaling=True), tmp_path).succeeded()
    assert "HybridModel ignores it" in said.text
