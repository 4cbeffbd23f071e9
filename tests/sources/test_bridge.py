"""What Megatron-Bridge and newer Megatron-LM state about themselves: iteration 0, run_config.yaml, the vocabulary."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import tiny_models as tm
import torch
import yaml
from bridge_folders import as_bridge, model_section, nested, whole_gemma
from conftest import GOLDEN
from golden_core import read_torch_dist
from megatron_files import assert_same_tensors

from weights_conversion.formats.stored_args import plain_args
from weights_conversion.sources.vocabulary import stated_rows

NAME = "llama2"
PADDED = ("--target", "megatron-core", "--make-vocab-size-divisible-by", 256)


def export(to_hf, root: Path, out: Path, *options: object) -> str:
    said = to_hf("--input_dir", root, "--output_dir", out, "--no_tokenizer", "--model", "llama2", *options).succeeded()
    return said.out


@pytest.mark.parametrize("shape", [lambda section: section, nested], ids=["flat", "nested"])
def test_iteration_zero_with_its_stated_vocabulary(shape, imported, sources, to_hf, tmp_path: Path) -> None:
    root = as_bridge(imported(NAME, *PADDED), tmp_path / "in", shape(model_section(tm.MODELS[NAME])))
    report = export(to_hf, root, tmp_path / "out")
    assert "by the checkpoint (vocab_size)" in report
    assert_same_tensors(tm.read_huggingface(tmp_path / "out"), tm.read_huggingface(sources(NAME)))


@pytest.mark.parametrize("named", ["0", "release"])
def test_iteration_is_named_by_zero_or_release(named: str, imported, sources, to_hf, tmp_path: Path) -> None:
    root = as_bridge(imported(NAME, *PADDED), tmp_path / "in", model_section(tm.MODELS[NAME]))
    (root / "iter_0000000").rename(root / ("release" if named == "release" else "iter_0000000"))
    (root / "latest_checkpointed_iteration.txt").write_text("77")  # which is not there
    export(to_hf, root, tmp_path / "out", "--load_iters", named)
    assert_same_tensors(tm.read_huggingface(tmp_path / "out"), tm.read_huggingface(sources(NAME)))


def test_two_sections_that_disagree(imported, to_hf, tmp_path: Path) -> None:
    section = nested(model_section(tm.MODELS[NAME]))
    section["transformer"]["rotary_base"] = 5e5
    root = as_bridge(imported(NAME, *PADDED), tmp_path / "in", section)
    said = to_hf("--input_dir", root, "--output_dir", tmp_path / "out", "--no_tokenizer", "--model", "llama2")
    said.refused("rotary_base", "two sections")


def test_vocabulary_of_megatron_lm_args(imported, sources, to_hf, tmp_path: Path) -> None:
    root = as_bridge(imported(NAME, *PADDED), tmp_path / "in", {})
    (root / "iter_0000000" / "run_config.yaml").unlink()
    section = {key: value for key, value in model_section(tm.MODELS[NAME]).items() if not isinstance(value, dict)}
    args = argparse.Namespace(**section | {"max_position_embeddings": 4096, "swiglu": True})
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 0}, root / "iter_0000000" / "common.pt")
    assert "padding rows left out" in export(to_hf, root, tmp_path / "out")
    assert_same_tensors(tm.read_huggingface(tmp_path / "out"), tm.read_huggingface(sources(NAME)))


def test_manifest_that_knows_more_rows_wins_over_a_tokenizers_count(imported, to_hf, tmp_path: Path) -> None:
    """A model may have more rows than its tokenizer has tokens (Qwen2): the import recorded the model's."""
    imported_root = imported(NAME, *PADDED)
    root = as_bridge(imported_root, tmp_path / "in", model_section(tm.MODELS[NAME], vocab_size=300))
    (root / "conversion_manifest.json").write_bytes((imported_root / "conversion_manifest.json").read_bytes())
    assert f"vocabulary {tm.MODELS[NAME].vocab} rows by the manifest" in export(to_hf, root, tmp_path / "out")


def test_null_tokenizer_counts_its_end_of_document() -> None:
    args = plain_args(argparse.Namespace(vocab_size=100, tokenizer_type="NullTokenizer"), Path("x"))
    assert stated_rows(args) == 101


GLM = GOLDEN / "bridge-glm4-moe"


def test_glm_as_bridge_imported_it(to_megatron, to_hf, tmp_path: Path) -> None:
    """Bit for bit both ways, with the router's bias in float32; nothing but run_config.yaml states the model."""
    to_hf(
        "--input_dir", GLM / "megatron-bridge", "--output_dir", tmp_path / "hf", "--no_tokenizer", "--verify"
    ).succeeded()
    found, wanted = tm.read_huggingface(tmp_path / "hf"), tm.read_huggingface(GLM / "hf")
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == each.dtype and torch.equal(found[name], each) for name, each in wanted.items())
    one, two = (tm.read_json(folder / "config.json") for folder in (GLM / "hf", tmp_path / "hf"))
    for key in ("first_k_dense_replace", "n_shared_experts", "routed_scaling_factor", "use_qk_norm", "attention_bias"):
        assert two[key] == one[key]
    line = ("glm4-moe", "--model-path", GLM / "hf", "--target", "megatron-bridge", "--make-vocab-size-divisible-by", 1)
    to_megatron(*line, "--out", tmp_path / "out").succeeded()
    (ours, _), (theirs, _) = (read_torch_dist(root) for root in (tmp_path / "out", GLM / "megatron-bridge"))
    assert theirs.keys() <= ours.keys()
    assert all(torch.equal(ours[name], each) for name, each in theirs.items())


GEMMA = GOLDEN / "bridge-gemma3"
_AS_BRIDGE = ("_target_", "activation_func", "interleaved_attn_pattern", "kv_channels", "layernorm_epsilon",
              "layernorm_zero_centered_gamma", "qk_layernorm", "rope_scaling", "rope_scaling_factor", "rotary_base",
              "seq_len_interpolation_factor", "share_embeddings_and_output_weights", "softmax_scale",
              "transformer_layer_spec", "vocab_size", "window_attn_skip_freq", "window_size")  # fmt: skip


def test_gemma_as_bridge_imported_it(to_megatron, to_hf, tmp_path: Path) -> None:
    """Bit for bit both ways; nothing but run_config.yaml states the model, and ours says what Bridge's does."""
    line = ("--input_dir", GEMMA / "megatron-bridge", "--output_dir", tmp_path / "hf", "--no_tokenizer", "--verify")
    assert "epsilon 1e-05" in to_hf(*line).succeeded().err
    found, wanted = tm.read_huggingface(tmp_path / "hf"), tm.read_huggingface(GEMMA / "hf")
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == each.dtype and torch.equal(found[name], each) for name, each in wanted.items())
    one, two = (tm.read_json(folder / "config.json") for folder in (GEMMA / "hf", tmp_path / "hf"))
    for key in ("rope_parameters", "layer_types", "sliding_window", "query_pre_attn_scalar", "hidden_activation",
                "final_logit_softcapping", "tie_word_embeddings", "rms_norm_eps", "head_dim"):  # fmt: skip
        assert two[key] == one[key]
    assert (two["rope_theta"], two["rope_local_base_freq"], two["rope_scaling"]["factor"]) == (1e6, 1e4, 8.0)
    line = ("gemma3", "--model-path", GEMMA / "hf", "--make-vocab-size-divisible-by", 1, "--out", tmp_path / "out")
    to_megatron(*line).succeeded()
    (ours, _), (theirs, _) = (read_torch_dist(root) for root in (tmp_path / "out", GEMMA / "megatron-bridge"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], each) for name, each in theirs.items())
    one, two = (
        yaml.safe_load((root / "iter_0000000" / "run_config.yaml").read_text())["model"]
        for root in (GEMMA / "megatron-bridge", tmp_path / "out")
    )
    assert {key: two[key] for key in _AS_BRIDGE} == {key: one[key] for key in _AS_BRIDGE}


def test_a_whole_gemma_as_bridge_keeps_it(to_megatron, to_hf, tmp_path: Path) -> None:
    """With vision the text stands below language_model., and the provider is another with the same fields."""
    root = whole_gemma(GEMMA / "megatron-bridge", tmp_path / "in")
    said = to_hf("--input_dir", root, "--output_dir", tmp_path / "out", "--no_tokenizer", "--verify").succeeded()
    assert "2 tensors beside the text model stay behind" in said.out
    found, wanted = tm.read_huggingface(tmp_path / "out"), tm.read_huggingface(GEMMA / "hf")
    assert_same_tensors(found, wanted)
    assert tm.read_json(tmp_path / "out" / "config.json")["query_pre_attn_scalar"] == 6
