"""Gemma 3 and Megatron-Bridge's own form, in both directions, with vision around the text model and without."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gemma_models as gemma
import pytest
import torch
import yaml
from golden_core import read_torch_dist

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
KINDS = ["sliding_attention", "full_attention"]
OLD: dict[str, Any] = {  # the spelling of transformers 4, and the hub's
    "rope_parameters": ..., "layer_types": ..., "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 6,
}  # fmt: skip


def section_of(out: Path) -> dict[str, Any]:
    return yaml.safe_load((out / "iter_0000000" / "run_config.yaml").read_text())["model"]


def said(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one
    )


@pytest.mark.parametrize("spelling", [{}, OLD], ids=["transformers 5", "transformers 4"])
def test_there_and_back(spelling: dict[str, Any], to_megatron, to_hf, tmp_path: Path) -> None:
    source = gemma.write(tmp_path / "hf", config=spelling)
    report = to_megatron("gemma3", "--model-path", source, "--out", tmp_path / "mt", "--verify").succeeded()
    assert "epsilon 1e-05" in report.err
    assert "--rotary" not in report.out
    found, _ = read_torch_dist(tmp_path / "mt")
    wanted = gemma.in_bridge(gemma.stored(source))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    section = section_of(tmp_path / "mt")
    assert section["rotary_base"] == [1e4, 1e6]
    assert (section["rope_scaling"], section["rope_scaling_factor"]) == (False, 8.0)
    assert (section["window_size"], section["interleaved_attn_pattern"]) == (6, [5, 1])
    assert section["softmax_scale"] == 1 / math.sqrt(12)
    for manifest in (True, False):
        if not manifest:
            (tmp_path / "mt" / "conversion_manifest.json").unlink()
        out = tmp_path / f"out-{manifest}"
        line = ("--input_dir", tmp_path / "mt", "--output_dir", out, "--no_tokenizer", "--verify")
        assert "epsilon 1e-05" in to_hf(*line).succeeded().err
        assert same(gemma.stored(out), gemma.stored(source))
        for key, value in said(gemma.write(tmp_path / "five")).items():
            if manifest or key in ("rope_parameters", "layer_types", "sliding_window", "query_pre_attn_scalar"):
                assert spelling.get(key) is ... or said(out)[key] == value, key
        assert {key: said(out)[key] for key, value in OLD.items() if value is not ... and key != "rope_scaling"} == {
            key: value for key, value in OLD.items() if value is not ... and key != "rope_scaling"
        }
        assert said(out)["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize("within", [False, True], ids=["the hub's names", "names of newer releases"])
@pytest.mark.parametrize("manifest", [True, False])
def test_repository_with_vision(within: bool, manifest: bool, to_megatron, to_hf, tmp_path: Path) -> None:
    source = gemma.with_vision(tmp_path / "hf", within)
    report = to_megatron("gemma3", "--model-path", source, "--out", tmp_path / "mt", "--verify").succeeded()
    assert "4 tensors that are not the text model's stay behind" in report.out
    assert same(read_torch_dist(tmp_path / "mt")[0], _of_text(to_megatron, tmp_path))
    if not manifest:
        (tmp_path / "mt" / "conversion_manifest.json").unlink()
    line = ("--input_dir", tmp_path / "mt", "--no_tokenizer", "--verify")
    to_hf(*line, "--output_dir", tmp_path / "whole", "--reference", source).succeeded()
    assert same(gemma.stored(tmp_path / "whole"), gemma.stored(source))
    for key, value in gemma.OUTER.items():
        assert said(tmp_path / "whole")[key] == value
    assert said(tmp_path / "whole")["text_config"]["layer_types"] == said(source)["text_config"]["layer_types"]
    assert (tmp_path / "whole" / "preprocessor_config.json").is_file()
    report = to_hf(*line, "--output_dir", tmp_path / "text").succeeded()
    text = gemma.stored(tmp_path / "text")
    if manifest:
        assert "vision tensors" in report.err
        assert text.keys() == {name for name in gemma.stored(source) if "layers" in name or "text" in name} | {
            gemma.in_repository(name, within) for name in ("model.embed_tokens.weight", "model.norm.weight")
        }
    else:
        assert said(tmp_path / "text")["architectures"] == ["Gemma3ForCausalLM"]
        assert same(text, gemma.stored(gemma.write(tmp_path / "alone")))


def _of_text(to_megatron, tmp_path: Path) -> dict[str, Any]:
    source = gemma.write(tmp_path / "same-text")
    to_megatron("gemma3", "--model-path", source, "--out", tmp_path / "of-text").succeeded()
    return read_torch_dist(tmp_path / "of-text")[0]


@pytest.mark.parametrize(
    ("layers", "pattern", "window"),
    [("0010010", [2, 1], 6), ("0101010", [1, 1], 6), ("0000000", [7, 1], 6), ("1111111", [0, 1], None)],
)
def test_patterns_of_layers(layers: str, pattern: list[int], window: int | None, to_megatron, to_hf, tmp_path) -> None:
    kinds = [KINDS[int(kind)] for kind in layers]
    source = gemma.write(tmp_path / "hf", gemma.model(layer_types=kinds))
    to_megatron("gemma3", "--model-path", source, "--out", tmp_path / "mt", "--verify").succeeded()
    section = section_of(tmp_path / "mt")
    assert (section["interleaved_attn_pattern"], section["window_size"]) == (pattern, window)
    (tmp_path / "mt" / "conversion_manifest.json").unlink()
    line = ("--input_dir", tmp_path / "mt", "--no_tokenizer", "--verify")
    to_hf(*line, "--output_dir", tmp_path / "out").succeeded()
    assert said(tmp_path / "out")["layer_types"] == kinds


def test_padded_rows_come_back(to_megatron, to_hf, tmp_path: Path) -> None:
    source = gemma.write(tmp_path / "hf")
    line = ("gemma3", "--model-path", source, "--out", tmp_path / "mt", "--make-vocab-size-divisible-by", 64)
    to_megatron(*line).succeeded()
    assert len(read_torch_dist(tmp_path / "mt")[0]["embedding.word_embeddings.weight"]) == 128
    (tmp_path / "mt" / "conversion_manifest.json").unlink()
    to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "out", "--no_tokenizer", "--verify").succeeded()
    assert same(gemma.stored(tmp_path / "out"), gemma.stored(source))


@pytest.mark.parametrize("target", ["megatron-core", "megatron-llm"])
def test_other_targets(target: str, to_megatron, tmp_path: Path) -> None:
    source = gemma.write(tmp_path / "hf")
    line = ("gemma3", "--model-path", source, "--out", tmp_path / "mt")
    to_megatron(*line, "--target", target).refused("norms behind attention", "--target megatron-bridge")
    assert not (tmp_path / "mt").exists()
    to_megatron(*line, "--ckpt-format", "torch").refused("--ckpt-format torch_dist")
    to_megatron(*line).succeeded()
    line = ("gemma3", "--model-path", tmp_path / "mt", "--out", tmp_path / "mt2", "--target", target)
    to_megatron(*line).refused("--target megatron-bridge")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": [KINDS[layer in (1, 4)] for layer in range(7)]}, ["layers 1, 4 of 7", "every N-th"]),
        ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping"]),
        ({"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping"]),
        ({"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ({"hidden_activation": "silu"}, ["hidden_activation"]),
        ({"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar 0"]),
        ({"query_pre_attn_scalar": "big"}, ["query_pre_attn_scalar 'big'"]),
        ({"rope_local_base_freq": 5e5}, ["two values of rope_local_base_freq"]),
        ({"rope_parameters": {**gemma.ROPES, "chunked": {}}}, ["rope_parameters"]),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "linear", "factor": 8.0}}},
         ["scaled only for full_attention"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 8.0}}}, ["yarn"]),
        ({"rope_parameters": {"full_attention": 3}}, ["rope_parameters"]),
        ({**OLD, "rope_scaling": {"type": "linear", "factor": 8.0}}, ["'linear' and no rope_type", "rename type"]),
        ({"layer_types": ..., "sliding_window_pattern": 0}, ["sliding_window_pattern 0"]),
        ({"sliding_window": None}, ["no sliding_window"]),
        ({"attention_bias": True}, ["attention_bias"]),
    ],
    ids=str,
)  # fmt: skip
def test_configs_that_are_refused(changes: dict[str, Any], words: list[str], to_megatron, tmp_path: Path) -> None:
    source = gemma.write(tmp_path / "hf", config=changes)
    to_megatron("gemma3", "--model-path", source, "--out", tmp_path / "mt").refused(*words)
    assert not (tmp_path / "mt").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rotary_base": 1e6}, ["rotary_base 1000000.0"]),
        ({"rotary_base": [1e4, 0]}, ["rotary_base"]),
        ({"interleaved_attn_pattern": [0, 0]}, ["interleaved_attn_pattern [0, 0]"]),
        ({"interleaved_attn_pattern": "5:1"}, ["interleaved_attn_pattern"]),
        ({"window_size": None}, ["window_size None"]),
        ({"window_size": [511, 0]}, ["window_size"]),
        ({"softmax_scale": -1}, ["softmax_scale -1"]),
        ({"rope_scaling_factor": "8"}, ["rope_scaling_factor"]),
        ({"seq_len_interpolation_factor": 8.0}, ["seq_len_interpolation_factor"]),
        ({"activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"}}, ["activation_func"]),
        ({"layernorm_zero_centered_gamma": False}, ["layernorm_zero_centered_gamma"]),
    ],
    ids=str,
)
def test_providers_that_are_refused(changes: dict, words: list[str], to_megatron, to_hf, tmp_path: Path) -> None:
    source = gemma.write(tmp_path / "hf")
    to_megatron("gemma3", "--model-path", source, "--out", tmp_path / "mt").succeeded()
    path = tmp_path / "mt" / "iter_0000000" / "run_config.yaml"
    content = yaml.safe_load(path.read_text())
    content["model"] |= changes
    path.write_text(yaml.safe_dump(content))
    to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "out", "--no_tokenizer").refused(*words)


def test_absent_fields_are_the_providers_defaults(to_megatron, to_hf, tmp_path: Path) -> None:
    source = gemma.write(tmp_path / "hf", gemma.model(query_pre_attn_scalar=256))
    to_megatron("gemma3", "--model-path", source, "--out", tmp_path / "mt").succeeded()
    (tmp_path / "mt" / "conversion_manifest.json").unlink()
    path = tmp_path / "mt" / "iter_0000000" / "run_config.yaml"
    content = yaml.safe_load(path.read_text())
    for name in ("softmax_scale", "interleaved_attn_pattern"):
        del content["model"][name]
    path.write_text(yaml.safe_dump(content))
    line = ("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "out", "--no_tokenizer")
    to_hf(*line).succeeded()
    assert said(tmp_path / "out")["query_pre_attn_scalar"] == 256
    assert said(tmp_path / "out")["layer_types"] == said(source)["layer_types"]
