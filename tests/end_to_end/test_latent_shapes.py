"""Latent attention in unusual shapes: both ways in both formats, and the logits of transformers' own class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import latent_models as lm
import pytest
import torch
from safetensors.torch import load_file

from weights_conversion.engine.streams import Source
from weights_conversion.verification import forward
from weights_conversion.verification.conventions import CONVENTIONS
from weights_conversion.verification.sides import open_model
from weights_conversion.verification.stored import weights_of

RANKS = ("--ckpt-format", "torch", "--tensor-model-parallel-size", 2, "--expert-tensor-parallel-size", 1,
         "--moe-grouped-gemm")  # fmt: skip
V2 = {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": False,
      "scoring_func": "softmax"}  # fmt: skip
GROUPED = {**V2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 3.0}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "q whole, no groups, tied": (
        "deepseek-v3",
        {"q_lora_rank": None, "rope_scaling": None, "n_group": 1, "topk_group": 1, "tie_word_embeddings": True},
    ),
    "experts everywhere, two predicted, tied, other heads": (
        "deepseek-v3",
        {"first_k_dense_replace": 0, "mtp": 2, "tie_word_embeddings": True, "v_head_dim": 20, "qk_nope_head_dim": 6},
    ),
    "experts in the last layer, odd groups": (
        "deepseek-v3",
        {"first_k_dense_replace": 2, "num_experts_per_tok": 3, "rope_scaling": {**lm.YARN, "mscale": 0.5,
                                                                               "mscale_all_dim": 0.9}},
    ),
    "v2, q whole": ("deepseek-v2", {**V2, "q_lora_rank": None, "rope_scaling": None, "first_k_dense_replace": 0}),
    "glm 4.7 flash": (
        "glm4-moe-lite",
        {"mtp": 1, "n_group": 1, "topk_group": 1, "rope_scaling": None, "rope_theta": 1e6},
    ),
    "glm 4.7 flash, two dense": (
        "glm4-moe-lite",
        {"mlp_layer_types": ["dense", "dense", "sparse"], "first_k_dense_replace": 2, "rope_scaling": None,
         "rope_theta": 1e6},
    ),
    "v2, groups": ("deepseek-v2", {**GROUPED, "num_experts_per_tok": 4}),
}  # fmt: skip


@pytest.mark.parametrize("layout", [(), RANKS], ids=["torch_dist", "ranks"])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways(shape: str, layout: tuple, tmp_path: Path, to_megatron, to_hf) -> None:
    family, changes = SHAPES[shape]
    source, out, back = lm.write(tmp_path / "hf", family, **changes), tmp_path / "out", tmp_path / "back"
    said = to_megatron(family, "--model-path", source, "--out", out, "--verify", *layout).succeeded()
    assert "IDENTICAL" in said.out
    to_hf("--input_dir", out, "--output_dir", back, "--no_tokenizer", "--verify").succeeded()
    wanted, found = (load_file(folder / "model.safetensors") for folder in (source, back))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    one, two = (json.loads((folder / "config.json").read_text()) for folder in (source, back))
    for key in set(one) & set(lm.BASE) - {"rope_scaling"}:
        assert one[key] == two.get(key), key
    ids, files = torch.arange(1, 33)[None], Source()
    side = open_model(out, family)
    with torch.inference_mode():
        *_, (_, _, ours) = forward.trace(side.config, CONVENTIONS[side.kind], weights_of(side, files), ids)
        theirs = lm.load(source, family)(ids).logits
    files.close()
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}, "norm_topk_prob True with 1 experts per token"),
        ({"norm_topk_prob": False}, "norm_topk_prob False with 4 experts per token"),
        ({"first_k_dense_replace": 3}, "no layer with experts"),
        ({"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}}, "linear"),
    ],
    ids=["one expert", "not renormalised", "all dense", "linear rope"],
)
def test_what_megatron_core_computes_otherwise(changes: dict, words: str, tmp_path: Path, to_megatron) -> None:
    source = lm.write(tmp_path / "hf", **changes)
    to_megatron("deepseek-v3", "--model-path", source, "--out", tmp_path / "out").refused(words)


def test_kimi_k2_in_fp8(tmp_path: Path, to_megatron, to_hf) -> None:
    """Its repository is of a model_type of its own, with its own code, and yarn with another number."""
    plain = lm.write(
        tmp_path / "hf", rope_scaling={**lm.YARN, "factor": 32.0, "beta_fast": 1}, max_position_embeddings=131072,
        n_group=1, topk_group=1, n_shared_experts=1, routed_scaling_factor=2.827,
    )  # fmt: skip
    source = lm.write_fp8(plain, tmp_path / "kimi")
    lm.edit(source, model_type="kimi_k2", auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"})
    out, back = tmp_path / "out", tmp_path / "back"
    said = to_megatron("deepseek-v3", "--model-path", source, "--out", out, "--verify").succeeded()
    assert "beta_fast" in said.err
    assert "are dequantised to bfloat16" in said.out
    to_hf("--input_dir", out, "--output_dir", back, "--no_tokenizer", "--verify").succeeded()
    config = json.loads((back / "config.json").read_text())
    assert (config["model_type"], config["rope_scaling"]["beta_fast"]) == ("deepseek_v3", 1)
    assert not {"auto_map", "quantization_config"} & set(config)
    wanted, found = load_file(tmp_path / "kimi-meaning" / "model.safetensors"), load_file(back / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_constants_that_nothing_states_are_noted(tmp_path: Path, to_megatron, to_hf) -> None:
    """Without the import's manifest, an export has Megatron-Core's own yarn; a reference that agrees says the rest."""
    source = lm.write(tmp_path / "hf", rope_scaling={**lm.YARN, "beta_fast": 8}, num_hidden_layers=2)
    out, note = tmp_path / "mt", "original_max_position_embeddings 4096, beta_fast 32, beta_slow 1"
    to_megatron("deepseek-v3", "--model-path", source, "--out", out).succeeded()
    arguments = ("--input_dir", out, "--no_tokenizer", "--output_dir")
    assert note not in to_hf(*arguments, tmp_path / "a").succeeded().out
    (out / "conversion_manifest.json").unlink()
    said = to_hf(*arguments, tmp_path / "b").succeeded()
    assert f"values     of Megatron-Core's code: {note}" in said.out
    assert "--reference gives them" in said.out
    assert note not in to_hf(*arguments, tmp_path / "c", "--reference", source).succeeded().out
    betas = [json.loads((tmp_path / name / "config.json").read_text())["rope_scaling"]["beta_fast"] for name in "abc"]
    assert betas == [8, 32, 8]
