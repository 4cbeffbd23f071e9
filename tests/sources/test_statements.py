"""Files beside a checkpoint that state its model too (run_config.yaml, args.json, transformer_config.json): those that
say something else are refused, where that changes a number, and the flag that decides is named."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpt_oss_models as gpt_oss
import pytest
import tiny_models as tm
import torch
from conftest import run

QWEN = tm.DENSE["qwen3"]
SIZES = {
    "num_layers": QWEN.layers, "hidden_size": QWEN.hidden, "ffn_hidden_size": QWEN.ffn, "kv_channels": QWEN.head_dim,
    "num_attention_heads": QWEN.heads, "num_query_groups": QWEN.groups, "layernorm_epsilon": QWEN.eps,
    "qk_layernorm": True, "add_qkv_bias": False, "normalization": "RMSNorm", "add_bias_linear": False,
    "params_dtype": "torch.bfloat16", "bf16": True, "attention_backend": "AttnBackend.auto", "window_size": None,
}  # fmt: skip
KINDS = (type(None), bool, int, float, str, list)
ROPE = {"rotary_base": QWEN.theta, "max_position_embeddings": QWEN.max_positions}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, to_megatron) -> Path:
    root = tmp_path_factory.mktemp("statements")
    source = tm.write_huggingface(root / "hf", QWEN, tokenizer=False, spelling=4)
    to_megatron("qwen3", "--model-path", source, "--out", root / "mt").succeeded()
    return root


@pytest.fixture
def trained(made: Path, tmp_path: Path) -> Callable[..., Path]:
    """The root of an iteration without a manifest, with `changes` of its args."""

    def make(**changes: Any) -> Path:
        root = tmp_path / "run"
        shutil.copytree(made / "mt" / "release", root / "iter_0000050")
        (root / "latest_checkpointed_iteration.txt").write_text("50")
        path = root / "iter_0000050" / "common.pt"
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, weights_only=True)
        vars(content["args"]).update(changes)
        torch.save(content | {"iteration": 50}, path)
        return root

    return make


def run_config(root: Path, values: dict[str, Any]) -> Path:
    path = root / "iter_0000050" / "run_config.yaml"
    path.write_text("model:\n" + "".join(f"  {name}: {json.dumps(value)}\n" for name, value in values.items()))
    return path


def as_json(name: str) -> Callable[[Path, dict[str, Any]], Path]:
    def write(root: Path, values: dict[str, Any]) -> Path:
        (root / name).write_text(json.dumps(values))
        return root / name

    return write


FILES = {
    "run_config.yaml": run_config,
    "args.json": as_json("args.json"),
    "iteration's args.json": as_json("iter_0000050/args.json"),
    "transformer_config.json": as_json("transformer_config.json"),
}


def export(to_hf, root: Path, out: Path, *options: Any):
    return to_hf("--input_dir", root, "--output_dir", out, "--no_tokenizer", *options)


@pytest.mark.parametrize("file", FILES)
def test_the_same_values_say_nothing(file: str, trained, to_hf, tmp_path: Path) -> None:
    root = trained()
    FILES[file](root, SIZES if file.startswith("transformer") else SIZES | ROPE)
    said = export(to_hf, root, tmp_path / "out", "--verify").succeeded()
    assert file.split()[-1] not in said.text


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("rotary_base", 500, "--rope_theta"),
        ("layernorm_epsilon", 0.25, "--layernorm_epsilon"),
        ("qk_layernorm", False, ""),
        ("num_layers", 9, ""),
        ("num_query_groups", 1, ""),
    ],
)
def test_another_value(
    file: str, name: str, value: Any, flag: str, trained, made: Path, to_hf, to_megatron, tmp_path: Path
) -> None:
    root = trained()
    path = FILES[file](root, SIZES | ROPE | {name: value})
    shown = {"rotary_base": "rope_theta", "num_query_groups": "num_attention_heads_kv"}.get(name, name)
    said = f"{path} says {shown} {float(value) if name == 'rotary_base' else value}, which is"
    export(to_hf, root, tmp_path / "out").refused(said, "in the checkpoint's args", f"remove {path.name}", flag)
    to_megatron("qwen3", "--model-path", root, "--out", tmp_path / "to").refused(said)
    assert not (tmp_path / "out").exists()
    if flag:
        used = {"--rope_theta": QWEN.theta, "--layernorm_epsilon": QWEN.eps}[flag]
        export(to_hf, root, tmp_path / "out", flag, used).succeeded()
    compared = run("weights_conversion.verify", made / "hf", root)  # a comparison shows what differs, and may go on
    assert (compared.code, said in compared.text) == (0, True)


def test_a_context_changes_no_number(trained, to_hf, tmp_path: Path) -> None:
    root = trained()
    path = run_config(root, SIZES | {"max_position_embeddings": 99})
    said = export(to_hf, root, tmp_path / "out").succeeded()
    assert f"{path} says max_position_embeddings 99" in said.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("model: [", "is not compared"),
        ("model: {num_layers: 2, hidden_size: 64, softmax_scale: 0.5}", "softmax_scale"),
        ("nothing: 1", "no section `model`"),
    ],
)
def test_a_file_that_is_not_understood_is_named(content: str, words: str, trained, to_hf, tmp_path: Path) -> None:
    root = trained()
    path = root / "iter_0000050" / "run_config.yaml"
    path.write_text(content)
    said = export(to_hf, root, tmp_path / "out").succeeded()
    assert f"{path} states a model too, which is not compared" in said.text
    assert words in said.text


def test_another_programs_args_json(trained, to_hf, tmp_path: Path) -> None:
    root = trained()
    (root / "args.json").write_text('{"learning_rate": 1e-5, "hidden_size": 3}')
    assert "args.json" not in export(to_hf, root, tmp_path / "out").succeeded().text


@pytest.mark.parametrize("file", ["args.json", "run_config.yaml"])
def test_a_file_that_repeats_the_args_is_none(file: str, trained, to_hf, tmp_path: Path) -> None:
    """Where tensors outweigh the checkpoint's own args, they outweigh a copy of these too."""
    root = trained(qk_layernorm=False)
    FILES[file](root, SIZES | ROPE | {"qk_layernorm": False})
    said = export(to_hf, root, tmp_path / "out").succeeded().text
    assert "the args say qk_layernorm False" in said
    assert file not in said


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [({"add_qkv_bias": False}, ()), ({}, ("yarn_correction_range_round_to_int", "yarn_beta_fast", "yarn_beta_slow"))],
    ids=["biases of all linear layers", "no place for yarn's range"],
)
def test_other_words_for_a_gpt_oss(
    changes: dict[str, Any], lacking: tuple[str, ...], to_megatron, to_hf, tmp_path: Path
) -> None:
    line = ("gpt-oss", "--model-path", gpt_oss.write(tmp_path / "hf"), "--out", tmp_path / "mt")
    to_megatron(*line, "--target", "megatron-core", "--ckpt-format", "torch_dist").succeeded()
    (tmp_path / "mt" / "conversion_manifest.json").unlink()
    with torch.serialization.safe_globals([argparse.Namespace]):
        args = vars(torch.load(tmp_path / "mt" / "release" / "common.pt", weights_only=True)["args"])
    plain = {name: value for name, value in args.items() if name not in lacking and type(value) in KINDS}
    (tmp_path / "mt" / "args.json").write_text(json.dumps(plain | changes))
    said = export(to_hf, tmp_path / "mt", tmp_path / "out").succeeded().text
    assert "args.json" not in said
