"""--model has no default: what the checkpoint says or shows decides, and several candidates are an error."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
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


def undecided(folder: Path, **args: Any) -> Path:
    """Theta 1e6, groups and a long context: codellama or mistral."""
    return trained(folder, tm.MODELS["mistral-v0.3"], sliding_window_size=None, max_position_embeddings=32768, **args)


def test_a_reference_s_model_type_decides(to_hf: Script, tmp_path: Path) -> None:
    root, out = undecided(tmp_path / "m"), tmp_path / "out"
    arguments = ("--input_dir", root, "--output_dir", out, "--no_tokenizer")
    to_hf(*arguments).refused("codellama and mistral")
    reference = tm.write_huggingface(tmp_path / "hf", tm.MODELS["mistral-v0.3"])
    assert "model_type mistral" in to_hf(*arguments, "--reference", reference).succeeded().text
    assert tm.read_json(out / "config.json")["model_type"] == "mistral"


@pytest.mark.parametrize(
    ("stored", "flag", "family"), [(None, 9, "mistral"), (None, 0, "llama2"), (9, 0, "llama2"), (9, 5, "mistral")]
)
def test_a_stated_window_decides(stored: int | None, flag: int, family: str, to_hf: Script, tmp_path: Path) -> None:
    """Without --model too; and over what a checkpoint says, which is told."""
    root = trained(tmp_path / "m", tm.MODELS["llama2-gqa"], sliding_window_size=stored)
    arguments = ("--input_dir", root, "--output_dir", tmp_path / "out", "--no_tokenizer")
    said = to_hf(*arguments, "--sliding_window_size", flag).succeeded().text
    assert f"model      {family}" in said
    config = tm.read_json(tmp_path / "out" / "config.json")
    assert config.get("sliding_window") == (flag or None)
    if (stored, flag) == (9, 5):
        assert "over 9 in the args" in said


def test_a_stated_window_of_a_family_without(to_hf: Script, tmp_path: Path) -> None:
    root = trained(tmp_path / "m", tm.MODELS["llama2-gqa"])
    arguments = ("--input_dir", root, "--output_dir", tmp_path / "out", "--no_tokenizer", "--model", "llama2")
    to_hf(*arguments, "--sliding_window_size", 0).succeeded()
    to_hf(*arguments, "--sliding_window_size", 9, "--overwrite").refused("llama2 has none", code=2)


@pytest.mark.parametrize(("name", "tied"), [("llama3-tied", True), ("llama3", False)])
@pytest.mark.parametrize("form", [(), ("--ckpt-format", "torch")], ids=["torch_dist", "torch"])
def test_a_tied_head_shows(name: str, tied: bool, form, to_megatron: Script, to_hf: Script, tmp_path: Path) -> None:
    """Args that do not say whether head and embedding are one, and no manifest."""
    source = tm.write_huggingface(tmp_path / "hf", tm.DENSE[name])
    to_megatron("llama3", "--model-path", source, "--out", tmp_path / "m", *form).succeeded()
    (tmp_path / "m" / "conversion_manifest.json").unlink()
    path = next(path for pattern in ("common.pt", "*.pt") for path in (tmp_path / "m").rglob(pattern))
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    del content["args"].untie_embeddings_and_output_weights
    torch.save(content, path)
    to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
    assert tm.read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"] is tied
