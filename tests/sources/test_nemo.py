"""Folders of NeMo 2 and of NeMo-RL, of a tiny llama3: any of the folders around the weights means the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import dist_files
import pytest
import tiny_models as tm
import torch
import yaml
from bridge_folders import as_bridge, model_section
from conftest import GOLDEN
from golden_core import read_torch_dist

CASE = GOLDEN / "core-llama3"
RUN = "default--reduced_train_loss=2.1034-epoch=0-consumed_samples=64.0-last"


def same(folder: Path, wanted: Path) -> bool:
    found, expected = tm.read_huggingface(folder), tm.read_huggingface(wanted)
    return found.keys() == expected.keys() and all(torch.equal(found[name], t) for name, t in expected.items())


def model_yaml(config: dict[str, Any]) -> dict[str, Any]:
    """As NeMo 2 dumps it: each field of the dataclass, functions and classes as _target_."""
    scaling = config["rope_scaling"]
    fields = {
        "_target_": "nemo.collections.llm.gpt.model.llama.Llama31Config8B",
        "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"},
        "add_bias_linear": False,
        "data_step_fn": {"_call_": False, "_target_": "nemo.collections.llm.gpt.model.base.gpt_data_step"},
        "ffn_hidden_size": config["intermediate_size"],
        "gated_linear_unit": True,
        "hidden_size": config["hidden_size"],
        "high_freq_factor": scaling["high_freq_factor"],
        "kv_channels": None,
        "layernorm_epsilon": config["rms_norm_eps"],
        "low_freq_factor": scaling["low_freq_factor"],
        "make_vocab_size_divisible_by": 128,
        "normalization": "RMSNorm",
        "num_attention_heads": config["num_attention_heads"],
        "num_layers": config["num_hidden_layers"],
        "num_query_groups": config["num_key_value_heads"],
        "old_context_len": scaling["original_max_position_embeddings"],
        "params_dtype": {"_call_": False, "_target_": "torch.bfloat16"},
        "position_embedding_type": "rope",
        "rotary_base": config["rope_theta"],
        "rotary_percent": 1.0,
        "scale_factor": scaling["factor"],
        "seq_len_interpolation_factor": None,
        "seq_length": config["max_position_embeddings"],
        "share_embeddings_and_output_weights": False,
        "transformer_layer_spec": {
            "_call_": False, "_target_": "nemo.collections.llm.gpt.model.base.default_layer_spec",
        },
        "vocab_size": None,
    }  # fmt: skip
    tokenizer = {"_target_": "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer",
                 "pretrained_model_name": "context/nemo_tokenizer", "use_fast": True}  # fmt: skip
    return {"_target_": "nemo.collections.llm.gpt.model.llama.LlamaModel", "config": fields, "optim": None,
            "tokenizer": tokenizer}  # fmt: skip


@pytest.fixture
def nemo(tmp_path: Path) -> Path:
    """experiment/checkpoints/RUN/{weights,context}."""
    run = tmp_path / "experiment" / "checkpoints" / RUN
    tensors, _ = read_torch_dist(CASE / "megatron-torch_dist")
    dist_files.write(run / "weights", {f"module.{key}": dist_files.whole(tensor) for key, tensor in tensors.items()})
    torch.save({"epoch": 0, "global_step": 8, "pytorch-lightning_version": "2.5.2"}, run / "weights" / "common.pt")
    (run / "context").mkdir()
    config = tm.read_json(CASE / "hf" / "config.json")
    (run / "context" / "model.yaml").write_text(yaml.safe_dump(model_yaml(config)))
    (run / "context" / "io.json").write_text("{}")
    return tmp_path / "experiment"


@pytest.mark.parametrize("inner", [".", "checkpoints", f"checkpoints/{RUN}", f"checkpoints/{RUN}/weights"])
def test_nemo_2(inner: str, nemo: Path, to_hf, tmp_path: Path) -> None:
    rows = tm.read_json(CASE / "hf" / "config.json")["vocab_size"]
    said = to_hf("--input_dir", nemo / inner, "--output_dir", tmp_path / "out", "--no_tokenizer",
                 "--true_vocab_size", rows, "--verify")  # fmt: skip
    assert "context/model.yaml" in said.succeeded().out
    assert same(tmp_path / "out", CASE / "hf")
    wanted, found = (tm.read_json(folder / "config.json") for folder in (CASE / "hf", tmp_path / "out"))
    assert found["rope_scaling"].items() >= wanted["rope_scaling"].items()
    for key in ("rope_theta", "rms_norm_eps", "max_position_embeddings", "model_type"):
        assert found[key] == wanted[key]


def test_the_tokenizer_in_its_context(nemo: Path, to_hf, tmp_path: Path) -> None:
    place = nemo / "checkpoints" / RUN / "context" / "nemo_tokenizer"
    place.mkdir()
    tm.write_tokenizer(place, tm.DENSE["llama3"])
    said = to_hf("--input_dir", nemo, "--output_dir", tmp_path / "out", "--model", "llama3", "--dry_run")
    assert "nemo_tokenizer" in said.text


def test_the_context_alone_is_named(nemo: Path, to_hf, tmp_path: Path) -> None:
    to_hf("--input_dir", nemo / "checkpoints" / RUN / "context", "--output_dir", tmp_path / "out",
          "--no_tokenizer").refused("context of a NeMo 2 checkpoint", RUN)  # fmt: skip


def test_weights_without_their_context(nemo: Path, to_hf, tmp_path: Path) -> None:
    shutil.rmtree(nemo / "checkpoints" / RUN / "context")
    to_hf("--input_dir", nemo, "--output_dir", tmp_path / "out", "--no_tokenizer").refused("context/model.yaml")


# ---- NeMo-RL


@pytest.fixture
def results(imported, tmp_path: Path) -> Path:
    """results/step_N/policy/{weights/{iter_0000000, trackers}, tokenizer}, and a step that is not finished."""
    root = imported("llama2", "--target", "megatron-core")
    for number in (5, 10):
        step = tmp_path / "results" / f"step_{number}"
        as_bridge(root, step / "policy" / "weights", model_section(tm.MODELS["llama2"]))
        (step / "policy" / "tokenizer").mkdir()
        (step / "training_info.json").write_text("{}")
    shutil.copytree(tmp_path / "results" / "step_5", tmp_path / "results" / "tmp_step_15")
    return tmp_path / "results"


@pytest.mark.parametrize(
    ("inner", "options"),
    [
        (".", ("--load_iters", 10)),
        ("step_10", ()),
        ("step_10/policy", ()),
        ("step_10/policy/weights", ()),
        ("step_10/policy/weights/iter_0000000", ()),
    ],
)
def test_nemo_rl(inner: str, options: tuple[Any, ...], results: Path, sources, to_hf, tmp_path: Path) -> None:
    said = to_hf("--input_dir", results / inner, "--output_dir", tmp_path / "out", "--no_tokenizer",
                 "--model", "llama2", *options).succeeded()  # fmt: skip
    assert "step_10" in said.text
    assert same(tmp_path / "out", sources("llama2"))


def test_several_steps_are_named(results: Path, to_hf, tmp_path: Path) -> None:
    said = to_hf("--input_dir", results, "--output_dir", tmp_path / "out", "--no_tokenizer").refused("step_5")
    assert "step_10" in said.err
    assert "tmp_step" not in said.err
