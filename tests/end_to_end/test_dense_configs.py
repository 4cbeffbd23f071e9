"""Configs of dense families as people have them, beyond the usual ones: computed as before, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
from conftest import run
from safetensors.torch import load_file, save_file

ALL = tm.MODELS | tm.DENSE
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
OLD_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "finetuned": True}
IDLE = {"use_sliding_window": True, "sliding_window": 8}
WAYS: dict[str, list[Any]] = {
    "torch_dist": [],
    "tp4": ["--ckpt-format", "torch", "--tensor-model-parallel-size", 4],  # above the query groups
    "tp2pp2": ["--ckpt-format", "torch", "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2],
    "vpp": ["--ckpt-format", "torch", "--pipeline-model-parallel-size", 2,
            "--num-layers-per-virtual-pipeline-stage", 1],
}  # fmt: skip
# model, changes to its config.json (transformers 4's spelling), way
CASES = {
    "a window behind the last layer": ("qwen2", IDLE | {"max_window_layers": 2}, "torch_dist"),
    "a window of none": ("qwen3", {"use_sliding_window": True, "sliding_window": None}, "torch_dist"),
    "a window behind the last layer, qwen3": ("qwen3", IDLE | {"max_window_layers": 28}, "tp4"),
    "layer_types": ("qwen2", {"layer_types": ["full_attention"] * 2}, "tp4"),
    "head_dim stated where it is implied": ("qwen2", {"head_dim": 8}, "tp4"),
    "yarn, qwen2": ("qwen2", {"rope_scaling": OLD_YARN}, "tp4"),
    "yarn, llama2": ("llama2", {"rope_scaling": OLD_YARN}, "torch_dist"),
    "yarn of factor 1": ("qwen2", {"rope_scaling": YARN | {"factor": 1.0, "attention_factor": 1.0}}, "torch_dist"),
    "yarn with a window": ("mistral-wide-heads", {"rope_scaling": YARN, "sliding_window": 16}, "tp4"),
    "head_dim of its own, tied": ("mistral-wide-heads", {"tie_word_embeddings": True}, "tp2pp2"),
    "tied, virtual stages": ("qwen3-tied", {}, "vpp"),
    "no groups": ("llama3-tied", {"num_key_value_heads": 8}, "tp4"),
    "theta that is no integer": ("llama3", {"rope_theta": 10000.5}, "tp4"),
}


def source(folder: Path, name: str, changes: dict[str, Any]) -> Path:
    model = ALL[name]
    tensors = dict(model.tensors())
    if changes.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    if (groups := changes.get("num_key_value_heads")) is not None:
        for key, tensor in tensors.items():
            if ".k_proj." in key or ".v_proj." in key:
                tensors[key] = tensor.repeat(groups // model.groups, *[1] * (tensor.dim() - 1)) + 0.01
    return tm.write_huggingface(folder, model, spelling=4, tokenizer=False, changes=changes, tensors=tensors)


@pytest.mark.parametrize("case", CASES)
def test_computes_the_same(case: str, to_megatron, to_hf, tmp_path: Path) -> None:
    """Proven by verify's own forward pass, and exported from args alone, the logits are the source's."""
    name, changes, way = CASES[case]
    family, hf = ALL[name].family, source(tmp_path / "hf", name, changes)
    to_megatron(
        family, "--model-path", hf, "--out", tmp_path / "m", "--target", "megatron-core", *WAYS[way]
    ).succeeded()  # fmt: skip
    assert run("weights_conversion.verify", hf, tmp_path / "m").code == 0
    (tmp_path / "m" / "conversion_manifest.json").unlink()
    to_hf(
        "--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out", "--no_tokenizer", "--model", family,
        "--true_vocab_size", ALL[name].vocab,
    ).succeeded()  # fmt: skip
    tokens = torch.arange(3, 100)
    assert torch.equal(tm.folder_logits(hf, tokens), tm.folder_logits(tmp_path / "out", tokens))


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("qwen2", IDLE | {"max_window_layers": 1}, "cannot be expressed, since not all layers have the window"),
        ("qwen3", IDLE | {"max_window_layers": 0}, "where qwen3 models have False: it cannot be expressed\n"),
        ("qwen2", IDLE | {"max_window_layers": 28, "layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ("llama3", {"attention_bias": True}, "attention_bias"),
        ("llama3", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"num_experts": 8, "num_experts_per_tok": 2}, "num_experts"),
        ("llama3", {"model_type": "mistral3"}, "mistral3"),
        ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, "mrope"),
        ("llama3", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("qwen2", {"rope_scaling": YARN | {"factor": 1.0, "attention_factor": 1.2}}, "attention_factor"),
    ],
)
def test_refused_by_name(name: str, changes: dict[str, Any], word: str, to_megatron, tmp_path: Path) -> None:
    hf = source(tmp_path / "hf", name, changes)
    to_megatron(ALL[name].family, "--model-path", hf, "--out", tmp_path / "m").refused(word)
    assert not (tmp_path / "m").exists()


def test_a_head_beside_a_tied_embedding(to_megatron, tmp_path: Path) -> None:
    """The same rows again are no news; other rows are another model, which the two transformers read differently."""
    hf = source(tmp_path / "hf", "qwen3-tied", {})
    tensors = load_file(hf / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    for head, code in ((table.clone(), 0), (2 * table, 1)):
        save_file(tensors | {"lm_head.weight": head}, hf / "model.safetensors", metadata={"format": "pt"})
        result = to_megatron("qwen3", "--model-path", hf, "--out", tmp_path / f"m{code}")
        assert result.code == code, result.text
    assert "lm_head.weight" in result.err


@pytest.mark.parametrize(
    ("name", "arg", "said"),
    [("llama3", "rotary_base", "rope_theta"), ("qwen2", "norm_epsilon layernorm_epsilon", "layernorm_epsilon"),
     ("mistral-v0.1", "window_size", "sliding_window_size")],
)  # fmt: skip
def test_what_only_the_family_says_is_warned_of(name: str, arg: str, said: str, to_megatron, to_hf, tmp_path: Path):
    """Not every wrapper stores every arg: a value that no shape betrays is named, with what gives another."""
    hf = source(tmp_path / "hf", name, {})
    family = ALL[name].family
    to_megatron(
        family, "--model-path", hf, "--out", tmp_path / "m", "--target", "megatron-core", "--ckpt-format", "torch"
    ).succeeded()  # fmt: skip
    (tmp_path / "m" / "conversion_manifest.json").unlink()
    file = tmp_path / "m/release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    for each in arg.split():
        delattr(content["args"], each)
    torch.save(content, file)
    out = ("--input_dir", tmp_path / "m", "--no_tokenizer", "--model", family, "--output_dir")
    assert f"nothing says what {said} is" in to_hf(*out, tmp_path / "out").succeeded().text
    assert "nothing says what" not in to_hf(*out, tmp_path / "again", "--reference", hf).succeeded().text


def test_a_window_by_flag_needs_no_family_by_flag(imported, to_hf, tmp_path: Path) -> None:
    """The checkpoint says whose window it is; a family without one refuses it by name."""
    flag = ("--no_tokenizer", "--sliding_window_size", 64)
    to_hf("--input_dir", imported("mistral-v0.1"), "--output_dir", tmp_path / "out", *flag).succeeded()
    assert tm.read_json(tmp_path / "out" / "config.json")["sliding_window"] == 64
    to_hf("--input_dir", imported("llama2"), "--output_dir", tmp_path / "no", *flag).refused("llama2", "window")
    flag = ("--no_tokenizer", "--model", "llama2", "--sliding_window_size", 64)
    to_hf("--input_dir", imported("llama2"), "--output_dir", tmp_path / "no", *flag).refused("mistral's", code=2)


@pytest.mark.parametrize(("family", "model_type", "warned"), [("llama3", "llama", True), ("qwen3", "qwen3", False)])
def test_heads_that_do_not_divide_the_hidden_size(family, model_type, warned, to_megatron, to_hf, tmp_path: Path):
    """Sizes are converted as stated; that transformers 5 refuses such a Llama is told."""
    model = tm.Modern(f"odd-{family}", family, hidden=60, heads=8, groups=2, head_dim=16, model_type=model_type)
    hf = tm.write_huggingface(tmp_path / "hf", model, tokenizer=False)
    to_megatron(family, "--model-path", hf, "--out", tmp_path / "m").succeeded()
    result = to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
    assert ("transformers 5 refuses LlamaForCausalLM" in result.err) is warned
    assert tm.read_json(tmp_path / "out" / "config.json")["head_dim"] == 16
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, written[name]) for name, tensor in load_file(hf / "model.safetensors").items())
