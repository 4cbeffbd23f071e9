"""Which of several statements about the forward pass counts: flag, args, manifest, family. All others are named."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
from conftest import Script, run
from megatron_files import load_rank, save_rank

from weights_conversion.configs import manifest

Trained = Callable[..., Path]
NOT_RESET = dict.fromkeys(("use_cpu_initialization", "no_save_optim", "no_save_rng"))
RESET = {
    "use_cpu_initialization": True, "perform_initialization": False, "no_save_optim": True, "no_save_rng": True,
    "rope_theta": 10000.0, "layernorm_epsilon": 1e-5, "rope_scaling_factor": 1.0, "sliding_window_size": None,
}  # fmt: skip


@pytest.fixture
def trained(imported, tmp_path: Path) -> Trained:
    """An import of a model that was trained for a while, with other args."""

    def make(name: str, **changes: Any) -> Path:
        root = tmp_path / "trained"
        shutil.copytree(imported(name), root)
        (root / "release").rename(root / "iter_0000050")
        (root / "latest_checkpointed_iteration.txt").write_text("50")
        path = root / "iter_0000050" / "mp_rank_00" / "model_optim_rng.pt"
        content = load_rank(path)
        content["iteration"] = 50
        vars(content["args"]).update(NOT_RESET | {"iteration": 50} | changes)
        save_rank(content, path)
        return root

    return make


def exported(to_hf: Script, root: Path, *options: Any, model: str = "llama2") -> tuple[dict[str, Any], str]:
    """The config.json of an export, and what the run said."""
    out = root.parent / "hf"
    arguments = ("--input_dir", root, "--output_dir", out, "--model", model, "--no_tokenizer")
    said = to_hf(*arguments, *options).succeeded().text
    return tm.read_json(out / "config.json"), said


@pytest.mark.parametrize(
    ("changes", "key", "value", "before"),
    [
        ({"rope_scaling_factor": 2.0}, "rope_scaling", 2.0, "1.0"),
        ({"max_position_embeddings": 8192, "seq_length": 8192}, "max_position_embeddings", 8192, "4096"),
        ({"rope_theta": 5e5}, "rope_theta", 5e5, "10000.0"),
        ({"layernorm_epsilon": 1e-6}, "rms_norm_eps", 1e-6, "1e-05"),
        ({"max_position_embeddings": 128, "seq_length": 128}, "max_position_embeddings", 4096, "128"),
    ],
)
def test_training_outranks_the_import(changes, key, value, before, trained, to_hf) -> None:
    """But for a shorter context, which says nothing of the model."""
    (name,) = set(changes) - {"seq_length"}
    config, said = exported(to_hf, trained("llama2", **changes))
    found = config[key]["factor"] if key == "rope_scaling" else config[key]
    assert found == value
    assert f"{name} is {value} in the" in said
    assert f"{before} in the" in said


def test_training_without_the_window(trained, to_hf) -> None:
    config, said = exported(to_hf, trained("mistral-v0.1", sliding_window_size=None), model="mistral")
    assert config["sliding_window"] is None
    assert "sliding_window_size is None in the args and 4096 in the manifest" in said


def test_values_that_cannot_have_been_reset(trained, to_hf) -> None:
    """The resharding tool's own defaults are not believed, other values are."""
    config, said = exported(to_hf, trained("llama2", **(RESET | {"layernorm_epsilon": 1e-6, "rope_theta": 1e4})))
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-6, 1e4)
    assert "layernorm_epsilon is 1e-06 in the args and 1e-05 in the manifest" in said


def test_reset_values_come_from_the_manifest(trained, to_hf) -> None:
    config, said = exported(to_hf, trained("codellama", **RESET), model="codellama")
    assert config["rope_theta"] == 1e6
    assert "rope_theta is 10000.0 in the args, which the resharding tool has reset, and 1000000.0" in said


def test_a_flag_says_over_what(trained, to_hf) -> None:
    root = trained("llama2", rope_theta=5e5)
    config, said = exported(to_hf, root, "--rope_theta", 1e6)
    assert config["rope_theta"] == 1e6
    assert "rope_theta is 1000000.0 by --rope_theta, over 500000.0 in the args and 10000.0 in the manifest" in said


def test_verify_sees_what_training_was_told(trained, to_hf, sources) -> None:
    """An export with the import's factor is another model, though its weights are the same."""
    result = run("weights_conversion.verify", sources("llama2"), trained("llama2", rope_scaling_factor=2.0))
    assert result.code == 1
    assert "rope_scaling_factor is 1.0 in the source and 2.0 in the checkpoint" in result.out


# --- what the family cannot have --------------------------------------------------------------------------------------


def test_window_of_megatron_llm_in_another_family(trained, to_hf, to_megatron, tmp_path: Path) -> None:
    """A checkpoint of Mistral that does not say so: as llama2 its window would be gone."""
    root = trained("mistral-v0.1", model_name=None, load=None)
    (root / "conversion_manifest.json").unlink()
    words = ("sliding_window_size 4096", "llama2", "--model mistral")
    to_hf("--input_dir", root, "--output_dir", tmp_path / "a", "--model", "llama2", "--no_tokenizer").refused(*words)
    to_megatron("llama2", "--model-path", root, "--out", tmp_path / "b").refused(*words)
    to_megatron("llama2", "--model-path", root, "--out", tmp_path / "b", "--target", "megatron-core").refused(*words)
    llama = tm.write_huggingface(tmp_path / "c", replace(tm.MODELS["mistral-v0.1"], family="llama2"), tokenizer=False)
    assert run("weights_conversion.verify", llama, root, "--model", "llama2").code == 2
    assert run("weights_conversion.verify", llama, root).code == 2


@pytest.mark.parametrize(
    ("name", "value"), [("glu_activation", "geglu"), ("use_rms_norm", False), ("use_bias", True), ("use_post_ln", True)]
)
def test_forward_pass_of_another_family(name: str, value: Any, trained, to_hf, to_megatron, tmp_path: Path) -> None:
    root = trained("llama2", **{name: value})
    to_hf("--input_dir", root, "--output_dir", tmp_path / "a", "--model", "llama2", "--no_tokenizer").refused(name)
    to_megatron("llama2", "--model-path", root, "--out", tmp_path / "b").refused(name)


# --- Megatron-Core ----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained_core(to_megatron, tmp_path: Path) -> Callable[..., Path]:
    """A Megatron-Core import, with its manifest, whose args training has changed."""

    def make(model: tm.Tiny, **changes: Any) -> Path:
        source, root = tm.write_huggingface(tmp_path / "src", model, tokenizer=False, spelling=4), tmp_path / "core"
        to_megatron(model.family, "--model-path", source, "--out", root, "--target", "megatron-core").succeeded()
        (root / "release").rename(root / "iter_0000050")
        (root / "latest_checkpointed_iteration.txt").write_text("50")
        path = root / "iter_0000050" / "common.pt"
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, weights_only=True)
        vars(content["args"]).update(changes)
        torch.save(content | {"iteration": 50}, path)
        return root

    return make


WINDOWED = tm.Tiny("windowed", "mistral", layers=2, heads=4, groups=2, max_positions=64, window=5)


def test_core_window_that_training_was_not_given(trained_core, to_hf) -> None:
    """--use-checkpoint-args does not restore it, so a run without the flag has trained without a window."""
    config, said = exported(to_hf, trained_core(WINDOWED, window_size=None), model="mistral")
    assert config["sliding_window"] is None
    assert "sliding_window_size is None in the args and 5 in the manifest" in said


def test_core_epsilon_and_base(trained_core, to_hf) -> None:
    root = trained_core(replace(WINDOWED, name="other", family="llama2", window=None), norm_epsilon=1e-6, rotary_base=7)
    config, said = exported(to_hf, root)
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-6, 7.0)
    assert "layernorm_epsilon is 1e-06 in the args and 1e-05 in the manifest" in said


def test_fields_of_a_manifest_are_of_their_types() -> None:
    """Each field of a model is looked at before it is used, whatever a manifest that was changed by hand holds."""
    apart = {"rope_scaling", "window_layers", *manifest.PARTS}
    for name, declared in manifest.ModelConfig.__dataclass_fields__.items():
        assert name in apart or declared.type in manifest._TYPES, name
        for value in ([[]], {"x": 1}):
            model = {"num_layers": 2, name: value}
            assert name == "rope_scaling" or manifest._malformed({"model": model}), name


@pytest.mark.parametrize("pattern", ["MX", "M", "M*-", [[]], 7])
def test_a_layer_pattern_that_is_none(pattern: object) -> None:
    (problem,) = manifest._malformed({"model": {"num_layers": 2, "hybrid_layer_pattern": pattern}})
    assert problem.startswith("hybrid_layer_pattern")
