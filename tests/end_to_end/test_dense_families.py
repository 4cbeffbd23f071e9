"""llama3, qwen2 and qwen3 through both scripts: rows of one rank, logits, every layout, and what must not pass.

That the real megatron-core loads them is shown in test_megatron_core.py.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
from conftest import Script, run
from megatron_files import read_checkpoint
from safetensors.torch import load_file, save_file

NAMES = ("llama3", "llama3-8b", "llama3-tied", "qwen2", "qwen2-tied", "qwen3", "qwen3-tied", "qwen3-yarn")
LAYOUTS: dict[str, list[Any]] = {
    "torch_dist": [],
    "tp2": ["--ckpt-format", "torch", "--tensor-model-parallel-size", 2],
    "tp2pp2": ["--ckpt-format", "torch", "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2],
}
SPELLING = int(version("transformers").split(".")[0])  # 4 does not read 5's
ROPE = {4: "rope_scaling", 5: "rope_parameters"}[SPELLING]
TOKENS = torch.arange(3, 35)


@pytest.fixture
def verify() -> Script:
    return lambda *arguments: run("weights_conversion.verify", *arguments)


@pytest.fixture
def source(tmp_path: Path):
    def write(name: str) -> Path:
        return tm.write_huggingface(tmp_path / f"{name}-hf", tm.DENSE[name], spelling=SPELLING, tokenizer=False)

    return write


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_both_ways(name: str, layout: str, source, to_megatron, to_hf, tmp_path: Path) -> None:
    """Imported, proven and exported without a word on the family: bit-equal, and the config means the same."""
    hf = source(name)
    to_megatron(
        tm.DENSE[name].family, "--model-path", hf, "--out", tmp_path / "m", "--verify", *LAYOUTS[layout]
    ).succeeded()
    to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
    expected, found = tm.read_huggingface(hf), tm.read_huggingface(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert torch.equal(tm.folder_logits(hf, TOKENS), tm.folder_logits(tmp_path / "out", TOKENS))


@pytest.mark.parametrize("name", NAMES)
def test_config_from_args_alone(name: str, source, to_megatron, to_hf, tmp_path: Path) -> None:
    """Without a manifest, args and tensors say what the model is: the exported config computes the same."""
    hf = source(name)
    to_megatron(tm.DENSE[name].family, "--model-path", hf, "--out", tmp_path / "m").succeeded()
    (tmp_path / "m" / "conversion_manifest.json").unlink()
    model = tm.DENSE[name].family
    to_hf(
        "--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out", "--no_tokenizer", "--model", model
    ).succeeded()
    far = TOKENS.repeat(3)
    assert torch.equal(tm.folder_logits(hf, far), tm.folder_logits(tmp_path / "out", far))


def test_rows_of_one_rank(source, to_megatron, tmp_path: Path) -> None:
    """Rank 1 of 2 holds the second of two query groups: four heads of q, one of k, one of v, weight and bias alike."""
    hf = source("qwen2")
    to_megatron("qwen2", "--model-path", hf, "--out", tmp_path / "m", *LAYOUTS["tp2"]).succeeded()
    rank = read_checkpoint(tmp_path / "m").tensors[1, 0, 0]
    tensors = tm.read_huggingface(hf)
    for kind in ("weight", "bias"):
        q, k, v = (tensors[f"model.layers.1.self_attn.{part}_proj.{kind}"] for part in "qkv")
        expected = torch.cat([q[32:64], k[8:16], v[8:16]])
        assert torch.equal(rank[f"decoder.layers.1.self_attention.linear_qkv.{kind}"], expected)


def exchanged(a: str, b: str):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[a], tensors[b] = tensors[b], tensors[a]

    return change


def mixed_groups(tensors: dict[str, torch.Tensor]) -> None:
    """The bias of q with its two groups exchanged."""
    name = "model.layers.0.self_attn.q_proj.bias"
    tensors[name] = tensors[name].view(2, -1).flip(0).reshape(-1).contiguous()


NORMS = ("model.layers.1.self_attn.q_norm.weight", "model.layers.1.self_attn.k_norm.weight")
BIASES = ("model.layers.1.self_attn.k_proj.bias", "model.layers.1.self_attn.v_proj.bias")


@pytest.mark.parametrize(
    ("name", "change"),
    [("qwen3", exchanged(*NORMS)), ("qwen2", exchanged(*BIASES)), ("qwen2", mixed_groups)],
    ids=["norms of q and k", "biases of k and v", "groups of a bias"],
)
def test_verify_sees_an_exchange(name: str, change, source, to_megatron, verify, tmp_path: Path) -> None:
    hf = source(name)
    to_megatron(tm.DENSE[name].family, "--model-path", hf, "--out", tmp_path / "m").succeeded()
    assert verify(hf, tmp_path / "m").code == 0
    tensors = load_file(hf / "model.safetensors")
    change(tensors)
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    assert verify(hf, tmp_path / "m").code == 1


@pytest.mark.parametrize("name", ["llama3", "qwen3-yarn"])
def test_verify_sees_a_lost_factor(name: str, source, to_megatron, verify, tmp_path: Path) -> None:
    hf = source(name)
    to_megatron(tm.DENSE[name].family, "--model-path", hf, "--out", tmp_path / "m").succeeded()
    config = tm.read_json(hf / "config.json")
    config[ROPE]["factor"] *= 2
    tm.write_json(hf / "config.json", config)
    assert verify(hf, tmp_path / "m").code == 1


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("qwen2", "add_qkv_bias"),
        ("qwen3", "qk_layernorm"),
        ("llama3", "llama3"),
        ("llama3-tied", "tie_word_embeddings"),
    ],
)
def test_megatron_llm_refuses(name: str, word: str, source, to_megatron, tmp_path: Path) -> None:
    """What Megatron-LLM's model cannot compute is refused by name, before anything is written."""
    hf = source(name)
    family = tm.DENSE[name].family
    to_megatron(family, "--model-path", hf, "--out", tmp_path / "m", "--target", "megatron-llm").refused(word)
    assert not (tmp_path / "m").exists()


def test_llama3_without_scaling_in_megatron_llm(source, to_megatron, to_hf, tmp_path: Path) -> None:
    hf = source("llama3-8b")
    to_megatron(
        "llama3", "--model-path", hf, "--out", tmp_path / "m", "--target", "megatron-llm",
        "--tensor-model-parallel-size", 2, "--verify",
    ).succeeded()  # fmt: skip
    to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
    assert torch.equal(tm.folder_logits(hf, TOKENS), tm.folder_logits(tmp_path / "out", TOKENS))


@pytest.mark.parametrize(
    ("name", "model", "word"),
    [
        ("qwen2", "llama3", "biases of q, k and v"),
        ("qwen3", "llama3", "norms of q and k"),
        ("llama3", "qwen2", "biases"),
    ],
)
def test_another_family_is_refused(name, model, word, source, to_megatron, to_hf, tmp_path: Path) -> None:
    """By the tensors, where no manifest says what it is."""
    to_megatron(tm.DENSE[name].family, "--model-path", source(name), "--out", tmp_path / "m").succeeded()
    (tmp_path / "m" / "conversion_manifest.json").unlink()
    to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out", "--no_tokenizer", "--model", model).refused(
        word
    )


def test_constants_of_rope_scaling_by_the_reference(source, to_megatron, to_hf, tmp_path: Path) -> None:
    """Args carry the factor alone: the context of before is the manifest's, and without it the reference's."""
    hf = source("llama3")
    config = tm.read_json(hf / "config.json")
    config[ROPE]["original_max_position_embeddings"] = 4096
    tm.write_json(hf / "config.json", config)
    to_megatron("llama3", "--model-path", hf, "--out", tmp_path / "m").succeeded()
    (tmp_path / "m" / "conversion_manifest.json").unlink()
    to_hf(
        "--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out", "--no_tokenizer", "--model", "llama3",
        "--reference", hf,
    ).succeeded()  # fmt: skip
    found = tm.read_json(tmp_path / "out" / "config.json")[ROPE]  # rope_scaling says its kind twice
    assert found | config[ROPE] == found


def test_what_stock_training_does_with_a_factor(source, to_megatron, tmp_path: Path) -> None:
    """Llama 3.2 has factor 32: stock Megatron-LM always takes 8, which the import says."""
    hf = source("llama3")
    config = tm.read_json(hf / "config.json")
    config[ROPE]["factor"] = 32.0
    tm.write_json(hf / "config.json", config)
    result = to_megatron("llama3", "--model-path", hf, "--out", tmp_path / "m")
    result.succeeded()
    assert "--rope-scaling-factor 32" in result.out + result.err
    assert "trains with factor 8" in result.out + result.err


def test_a_mask_turned_off_is_refused(source, to_megatron, tmp_path: Path) -> None:
    """transformers reads is_causal; Megatron's models have a causal mask."""
    hf = source("qwen2")
    tm.write_json(hf / "config.json", tm.read_json(hf / "config.json") | {"is_causal": False})
    to_megatron("qwen2", "--model-path", hf, "--out", tmp_path / "m").refused("is_causal")


def test_weights_that_are_integers_are_refused(source, to_megatron, tmp_path: Path) -> None:
    hf = source("qwen3")
    tensors = load_file(hf / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, hf / "model.safetensors", metadata={"format": "pt"})
    to_megatron("qwen3", "--model-path", hf, "--out", tmp_path / "m").refused(name, "int8", "quantised")


def test_last_digit_of_a_yarn_factor(source, to_megatron, tmp_path: Path) -> None:
    """Megatron's mscale cannot carry every attention_factor to the last digit: the manifest does."""
    hf = source("qwen3-yarn")
    config = tm.read_json(hf / "config.json")
    config[ROPE]["attention_factor"] = 1.7
    tm.write_json(hf / "config.json", config)
    to_megatron("qwen3", "--model-path", hf, "--out", tmp_path / "m", "--verify").succeeded()


@pytest.mark.parametrize("value", [float("nan"), -3.0, "4.0", [1, 2]])
def test_yarn_factors_of_args_that_are_none(value: Any, source, to_megatron, to_hf, tmp_path: Path) -> None:
    layout = ["--ckpt-format", "torch"]
    to_megatron("qwen3", "--model-path", source("qwen3-yarn"), "--out", tmp_path / "m", *layout).succeeded()
    (tmp_path / "m" / "conversion_manifest.json").unlink()
    file = tmp_path / "m/release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    content["args"].rotary_scaling_factor = value
    torch.save(content, file)
    to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out", "--no_tokenizer").refused(
        "rotary_scaling_factor", "a positive number was expected"
    )
