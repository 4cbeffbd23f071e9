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
        ({"hybrid_layer_pattern": "G-*-"}, ("gated_delta_net", "llama3 does not have")),
        ({"hybrid_layer_pattern": "GG--"}, ("gated delta", "GG--")),
        ({"hybrid_layer_pattern": "D-*-"}, ("sparse attention",)),
        ({"hybrid_layer_pattern": "*-*-/*-"}, ("multi-token prediction",)),
        ({"hybrid_layer_pattern": "**--"}, ("one sub-block each", "llama3 does not have")),
        ({"hybrid_layer_pattern": "*-X-"}, ("*-X-", "symbols of M*-EG")),
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


def made(family: str, folder: Path) -> tuple[Path, str]:
    """(a tiny model whose layers have attention and the rest each, its pattern)."""
    import transformers

    torch.manual_seed(1)
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}  # fmt: skip
    if family == "llama3":
        config: Any = transformers.LlamaConfig(**sizes, rope_theta=5e5)
        model: Any = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.Qwen3MoeConfig(
            **sizes, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0],
            norm_topk_prob=True,
        )  # fmt: skip
        model = transformers.Qwen3MoeForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder, "*-*-*-" if family == "llama3" else "*-*E*E"


CUTS = {
    "even": ((), 2),
    "within a layer": ((0, 1, 4), 2),
    "in three": ((0, 3, 4), 3),
    "virtual": ((0, 1, 3, 4), 2),
    "uneven": ((0, 5), 2),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", ["llama3", "qwen3-moe"])
def test_rank_files_are_written_and_read(family: str, cut: str, to_hf, to_megatron, tmp_path: Path) -> None:
    """Stages are cut between sub-blocks, where the pattern says it: also within a layer."""
    source, pattern = made(family, tmp_path / "hf")
    at, stages = CUTS[cut]
    if at:
        pattern = "|".join(pattern[one:two] for one, two in zip(at, (*at[1:], 6), strict=True))
    if (pattern.count("|") + 1) % stages:
        stages = pattern.count("|") + 1
    sizes = ["--ckpt-format", "torch", "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", stages]
    sizes += ["--expert-model-parallel-size", 2, "--moe-grouped-gemm"] if family == "qwen3-moe" else []
    to_megatron(family, "--model-path", source, "--out", tmp_path / "m", "--target", "megatron-core", "--verify",
                "--hybrid-layer-pattern", pattern, *sizes).succeeded()  # fmt: skip
    contents = [unpickle(path) for path in sorted(root_of(tmp_path / "m").glob("mp_rank_*/model_optim_rng.pt"))]
    args = vars(contents[0]["args"])
    assert (args["hybrid_layer_pattern"], args["num_layers"], args["moe_layer_freq"]) == (pattern, 6, 1)
    assert args["spec"] == ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]
    names = {name for each in contents for key, model in each.items() if key.startswith("model") for name in model}
    assert "decoder.final_norm.weight" in names
    assert "decoder.final_layernorm.weight" not in names
    to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out", "--no_tokenizer", "--verify").succeeded()
    found, wanted = tm.read_huggingface(tmp_path / "out"), tm.read_huggingface(source)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_local_numbers_of_a_stage(to_megatron, tmp_path: Path) -> None:
    """By hand: the second stage begins with the first layer's MLP, its own layer 0."""
    source, _ = made("llama3", tmp_path / "hf")
    to_megatron("llama3", "--model-path", source, "--out", tmp_path / "m", "--ckpt-format", "torch",
                "--hybrid-layer-pattern", "*|-*-*-", "--pipeline-model-parallel-size", 2).succeeded()  # fmt: skip
    hf = tm.read_huggingface(source)
    one, two = (unpickle(root_of(tmp_path / "m") / f"mp_rank_00_00{n}" / "model_optim_rng.pt")["model"] for n in (0, 1))
    assert torch.equal(two["decoder.layers.0.mlp.linear_fc2.weight"], hf["model.layers.0.mlp.down_proj.weight"])
    assert torch.equal(two["decoder.layers.1.self_attention.linear_proj.weight"],
                       hf["model.layers.1.self_attn.o_proj.weight"])  # fmt: skip
    assert {name.split(".")[2] for name in one if ".layers." in name} == {"0"}


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("*-|*-|*-", ("3 stages", "--pipeline-model-parallel-size 2")),
        ("||*-*-*-", ("a stage without a layer",)),
        ("*-*E*-", ("is not this model's", "*-*-*-")),
        ("*-*-", ("is not this model's",)),
    ],
)
def test_patterns_that_are_refused(pattern: str, words: Any, to_megatron, tmp_path: Path) -> None:
    source, _ = made("llama3", tmp_path / "hf")
    to_megatron("llama3", "--model-path", source, "--out", tmp_path / "m", "--ckpt-format", "torch",
                "--hybrid-layer-pattern", pattern, "--pipeline-model-parallel-size", 2).refused(*words)  # fmt: skip
    assert not (tmp_path / "m").exists()


def test_experts_of_torch_dist(to_hf, to_megatron, tmp_path: Path) -> None:
    source, pattern = made("qwen3-moe", tmp_path / "hf")
    to_megatron("qwen3-moe", "--model-path", source, "--out", tmp_path / "m", "--hybrid-layer-pattern", pattern,
                "--verify").succeeded()  # fmt: skip
    tensors, args = read_torch_dist(tmp_path / "m")
    assert args["moe_layer_freq"] == 1
    assert tensors["decoder.layers.3.mlp.experts.experts.linear_fc1.weight"].shape == (4, 32, 32)
    assert "decoder.layers.1.mlp.linear_fc1.weight" in tensors
    to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out", "--no_tokenizer", "--verify").succeeded()
    found, wanted = tm.read_huggingface(tmp_path / "out"), tm.read_huggingface(source)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("ranks", [(), ("--ckpt-format", "torch", "--tensor-model-parallel-size", 2,
                                        "--pipeline-model-parallel-size", 2, "--moe-grouped-gemm")],
                         ids=["torch_dist", "rank files"])  # fmt: skip
def test_gated_delta(ranks: tuple[Any, ...], to_hf, to_megatron, tmp_path: Path) -> None:
    """Qwen3-Next: G where its layers are linear."""
    import transformers

    torch.manual_seed(1)
    config = transformers.Qwen3NextConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=6, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, max_position_embeddings=128,
    )  # fmt: skip
    source = tmp_path / "hf"
    transformers.Qwen3NextForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    pattern = "GEGEGE*E"
    result = to_megatron("qwen3-next", "--model-path", source, "--out", tmp_path / "m", "--hybrid-layer-pattern",
                         pattern, *ranks).succeeded()  # fmt: skip
    assert "--linear-attention-freq" not in result.text
    args = read_torch_dist(tmp_path / "m")[1] if not ranks else {}
    if args:
        assert (args["hybrid_layer_pattern"], args["num_layers"], args["linear_attention_freq"]) == (pattern, 8, None)
    (tmp_path / "m" / "conversion_manifest.json").unlink()
    to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out", "--no_tokenizer", "--model", "qwen3-next",
          "--true_vocab_size", 96).succeeded()  # fmt: skip
    found, wanted = tm.read_huggingface(tmp_path / "out"), tm.read_huggingface(source)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
