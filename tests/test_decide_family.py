"""--model has no default: what the checkpoint says or shows decides, and several candidates are an error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
from conftest import Script
from megatron_files import write_checkpoint
from naive_layout import megatron_ranks

from weights_conversion.sources.families import Features, decide_family, read_features

RESET = {
    "use_cpu_initialization": True, "perform_initialization": False, "no_save_optim": True, "no_save_rng": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ({"theta": 1e4, "epsilon": 1e-5, "window": False}, ("llama2",)),
        ({"theta": 1e4, "epsilon": 1e-6, "window": False}, ("llama",)),
        ({"theta": 1e4, "window": False}, ("llama2",)),
        ({"theta": 1e6, "epsilon": 1e-5, "window": False, "positions": 16384}, ("codellama",)),
        ({"theta": 1e4, "epsilon": 1e-5, "window": False, "rows": 32016}, ("codellama",)),
        ({"theta": 1e4, "epsilon": 1e-5, "window": True}, ("mistral",)),
        ({"theta": 1e6, "window": False, "grouped": True, "positions": 32768}, ("codellama", "mistral")),
        ({"theta": 1e6, "window": False, "grouped": True, "ratio": 3.5}, ("codellama", "mistral")),
        ({"theta": 1e6, "window": False, "grouped": True, "positions": 32768, "rows": 32768}, ("mistral",)),
        ({"theta": 1e8, "window": False, "grouped": True, "positions": 32768, "rows": 131072}, ("mistral",)),
        ({"parallel_attention": True, "window": False}, ("falcon",)),
        ({"theta": 3e5, "epsilon": 1e-5, "window": False}, ()),
        ({"theta": 5e5, "epsilon": 1e-5, "window": False}, ("llama3",)),
        ({"theta": 1e4, "epsilon": 1e-5, "window": False, "rows": 128256}, ("llama3",)),
        ({"theta": 1e4, "epsilon": 1e-5, "window": False, "qkv_bias": True}, ("qwen2",)),
        ({"theta": 1e4, "epsilon": 1e-5, "window": False, "qk_norms": True}, ("qwen3",)),
        ({"theta": 1e6, "window": False, "qkv_bias": True, "qk_norms": True}, ()),
        ({}, ("codellama", "llama", "llama2", "llama3", "mistral")),
    ],
)  # fmt: skip
def test_what_a_checkpoint_shows(shown: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert decide_family({}, Features(**shown)) == expected


def test_what_a_checkpoint_says_stands_above() -> None:
    assert decide_family({"manifest": "llama2"}, Features(theta=1e6, window=False)) == ("llama2",)


@pytest.mark.parametrize(
    ("args", "theta", "epsilon", "window"),
    [
        ({}, 1e4, 1e-5, False),
        (RESET, None, None, None),
        (RESET | {"rope_theta": 1e6, "layernorm_epsilon": 1e-6, "sliding_window_size": 9}, 1e6, 1e-6, True),
    ],
)
def test_reset_args_say_nothing_where_they_hold_the_tools_defaults(
    args: dict[str, Any], theta: float | None, epsilon: float | None, window: bool | None
) -> None:
    found = read_features({"rope_theta": 1e4, "layernorm_epsilon": 1e-5} | args, [], 32000)
    assert (found.theta, found.epsilon, found.window) == (theta, epsilon, window)


def trained(folder: Path, model: tm.Tiny, **args: Any) -> Path:
    """A checkpoint of Megatron-LLM whose args name no model."""
    ranks = megatron_ranks(model.config(), model.tensors(), 1, 1, rows=model.vocab)
    write_checkpoint(folder, ranks, tm.training_args(model, 1, 1, rows=model.vocab) | {"model_name": None} | args, 7)
    return folder


@pytest.mark.parametrize(
    ("name", "family"),
    [("llama2", "llama2"), ("llama", "llama"), ("codellama", "codellama"), ("mistral-v0.1", "mistral"),
     ("falcon-7b", "falcon")],
)  # fmt: skip
def test_export_without_a_name(name: str, family: str, to_hf: Script, tmp_path: Path) -> None:
    model = tm.MODELS[name]
    root = trained(tmp_path / "mt", model, max_position_embeddings=4096)
    found = to_hf("--input_dir", root, "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
    assert f"model      {family}," in found.text
    config = tm.read_json(tmp_path / "out" / "config.json")
    assert config["rope_theta"] == model.theta
    assert config.get("sliding_window") == model.window


def test_the_manifest_says_it(imported, to_hf: Script, tmp_path: Path) -> None:
    found = to_hf("--input_dir", imported("mistral-v0.1"), "--output_dir", tmp_path / "out", "--no_tokenizer")
    assert "model      mistral, says its manifest" in found.succeeded().text


def test_megatron_core_without_a_manifest(imported, to_hf: Script, tmp_path: Path) -> None:
    root = shutil.copytree(imported("codellama", "--target", "megatron-core"), tmp_path / "mt")
    (root / "conversion_manifest.json").unlink()
    found = to_hf("--input_dir", root, "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
    assert "model      codellama," in found.text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (RESET, ("codellama", "llama", "mistral", "--model")),
        ({"rope_theta": 3e5}, ("rope_theta 300000", "--model")),
        ({"rope_theta": 1e6, "max_position_embeddings": 32768},
         ("codellama and mistral", "--model codellama or --model mistral")),
    ],
)  # fmt: skip
def test_undecidable(args: dict[str, Any], words: tuple[str, ...], to_hf: Script, tmp_path: Path) -> None:
    root = trained(tmp_path / "mt", tm.MODELS["llama2-gqa"], **args)
    to_hf("--input_dir", root, "--output_dir", tmp_path / "out", "--no_tokenizer").refused(*words)
    assert not (tmp_path / "out").exists()
    result = to_hf("--input_dir", root, "--output_dir", tmp_path / "out", "--no_tokenizer", "--model", "codellama")
    assert result.code == 0, result.text
