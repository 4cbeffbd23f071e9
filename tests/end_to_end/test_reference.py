"""--reference: what Megatron's args cannot carry comes from a Hugging Face model, and what it contradicts is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models as tm
import torch
from conftest import REPOSITORY
from hub_standin import HubStandIn, Repository


@pytest.fixture
def trained(sources, to_megatron, tmp_path: Path):
    """(a checkpoint that nothing but its args describes, the Hugging Face model that it was trained from)."""
    hf = tm.write_huggingface(tmp_path / "hf", tm.MODELS["llama2-gqa"])
    config = tm.read_json(hf / "config.json") | {"eos_token_id": [2, 7], "custom_note": "kept"}
    tm.write_json(hf / "config.json", config)
    tm.write_json(hf / "generation_config.json", {"temperature": 0.6, "do_sample": True, "eos_token_id": [2, 7]})
    to_megatron(
        "llama2", "--model-path", hf, "--out", tmp_path / "m", "--target", "megatron-core",
        "--make-vocab-size-divisible-by", 256,
    ).succeeded()  # fmt: skip
    for file in (tmp_path / "m").iterdir():
        if file.is_file() and not file.name.startswith("latest"):
            file.unlink()
    return tmp_path / "m", hf


def test_fields_that_args_cannot_carry(trained, to_hf, tmp_path: Path) -> None:
    checkpoint, hf = trained
    result = to_hf("--input_dir", checkpoint, "--output_dir", tmp_path / "out", "--reference", hf).succeeded()
    config, source = tm.read_json(tmp_path / "out" / "config.json"), tm.read_json(hf / "config.json")
    assert (config["eos_token_id"], config["vocab_size"]) == ([2, 7], source["vocab_size"])
    assert tm.read_json(tmp_path / "out" / "generation_config.json")["temperature"] == 0.6
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (hf / "tokenizer.model").read_bytes()
    assert str(hf) in result.text


def test_a_contradicted_number_is_named(trained, to_hf, tmp_path: Path) -> None:
    checkpoint, hf = trained
    config = tm.read_json(hf / "config.json")
    config["rope_parameters"]["rope_theta"] = 500000.0
    tm.write_json(hf / "config.json", config)
    arguments = ("--input_dir", checkpoint, "--output_dir", tmp_path / "out", "--reference", hf, "--no_tokenizer")
    result = to_hf(*arguments).succeeded()
    assert "rope_theta is 10000.0 in the checkpoint, which is used, and 500000.0" in result.text
    assert tm.read_json(tmp_path / "out" / "config.json")["rope_theta"] == 10000.0


def test_another_model_is_refused(trained, sources, to_hf, tmp_path: Path) -> None:
    checkpoint, _ = trained
    arguments = ("--input_dir", checkpoint, "--output_dir", tmp_path / "out", "--reference", sources("llama2"))
    to_hf(*arguments, "--no_tokenizer").refused("num_layers is 4 in the checkpoint and 2", "is another model")
    assert not (tmp_path / "out").exists()


def test_what_the_args_have_lost_is_the_reference_s(trained, to_hf, tmp_path: Path) -> None:
    """Before the family's usual value."""
    checkpoint, hf = trained
    config = tm.read_json(hf / "config.json") | {"rms_norm_eps": 1e-3}
    tm.write_json(hf / "config.json", config)
    common = checkpoint / "release" / "common.pt"
    content = torch.load(common, weights_only=False)
    del content["args"].norm_epsilon, content["args"].layernorm_epsilon
    torch.save(content, common)
    arguments = ("--input_dir", checkpoint, "--output_dir", tmp_path / "out", "--reference", hf, "--no_tokenizer")
    assert "layernorm_epsilon 0.001" in to_hf(*arguments, "--model", "llama2").succeeded().text
    assert tm.read_json(tmp_path / "out" / "config.json")["rms_norm_eps"] == 1e-3


def instruct(folder: Path, source: Path) -> Path:
    """The same model after its chat training: other ends, sampling, and number type."""
    shutil.copytree(source, folder)
    config = tm.read_json(folder / "config.json") | {
        "eos_token_id": [2, 9],
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    tm.write_json(folder / "config.json", config)
    tm.write_json(folder / "generation_config.json", {"temperature": 0.3, "do_sample": True, "eos_token_id": [2, 9]})
    (folder / "model.safetensors").unlink()
    return folder


def test_a_flag_outranks_the_import_s_manifest(sources, to_megatron, to_hf, tmp_path: Path) -> None:
    """Imported from a base model, exported with its chat model's ids and sampling; each difference is named."""
    hf = sources("llama2-gqa")
    to_megatron("llama2", "--model-path", hf, "--out", tmp_path / "m").succeeded()
    chat = instruct(tmp_path / "chat", hf)
    result = to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out", "--reference", chat).succeeded()
    config, generation = (tm.read_json(tmp_path / "out" / f"{name}config.json") for name in ("", "generation_"))
    assert (config["eos_token_id"], config["pad_token_id"]) == ([2, 9], 0)
    assert generation == tm.read_json(chat / "generation_config.json")
    assert config["torch_dtype"] == "bfloat16"  # the weights' own
    for words in (
        f"eos_token_id is [2, 9] in {chat}, which is used, and 2 in the manifest",
        f"temperature of generation_config.json is 0.3 in {chat}",
        "torch_dtype: 'float32' in the reference, 'bfloat16' here",
    ):
        assert words in result.text


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rms_norm_eps": 1e-3}, "layernorm_epsilon is 1e-05 in the checkpoint, which is used, and 0.001"),
        ({"max_position_embeddings": 8192}, "max_position_embeddings is 4096"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling_factor is 1.0"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling is None"),
    ],
)
def test_every_silent_value_is_compared(changes, word: str, trained, to_hf, tmp_path: Path) -> None:
    checkpoint, hf = trained
    config = {"rope_theta": 10000.0} | tm.read_json(hf / "config.json") | changes
    config.pop("rope_parameters")
    tm.write_json(hf / "config.json", config)
    arguments = ("--input_dir", checkpoint, "--output_dir", tmp_path / "out", "--reference", hf, "--no_tokenizer")
    result = to_hf(*arguments, "--model", "llama2").succeeded()
    assert word in result.text
    assert f"--reference {hf}" in result.text


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_hidden_layers": 2}, "num_layers is 4 in the checkpoint and 2"),
        ({"num_attention_heads": 16, "head_dim": 8}, "num_attention_heads is 8"),
        ({"num_key_value_heads": 2}, "num_attention_heads_kv is 4"),
        ({"head_dim": 16}, "kv_channels is 8"),
        ({"intermediate_size": 96}, "ffn_hidden_size is 80"),
        ({"hidden_size": 128, "head_dim": 8}, "hidden_size is 64"),
        ({"tie_word_embeddings": True}, "tie_embed_logits is False"),
        ({"vocab_size": 600}, "--reference says 600 vocabulary rows, but the embedding has 512"),
        ({"model_type": "qwen2"}, "qwen2"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_every_size_is_compared(changes, word: str, trained, to_hf, tmp_path: Path) -> None:
    checkpoint, hf = trained
    tm.write_json(hf / "config.json", tm.read_json(hf / "config.json") | changes)
    arguments = ("--input_dir", checkpoint, "--output_dir", tmp_path / "out", "--reference", hf, "--no_tokenizer")
    to_hf(*arguments, "--model", "llama2").refused(word)
    assert not (tmp_path / "out").exists()


def test_rows_that_training_may_have_added(trained, to_hf, tmp_path: Path) -> None:
    """The embedding has 512 rows where the reference's 320 need no more than 384 with padding to 128: it is told."""
    checkpoint, hf = trained
    common = checkpoint / "release" / "common.pt"
    content = torch.load(common, weights_only=False)
    content["args"].make_vocab_size_divisible_by = 128
    torch.save(content, common)
    arguments = ("--input_dir", checkpoint, "--output_dir", tmp_path / "out", "--reference", hf)
    result = to_hf(*arguments, "--model", "llama2").succeeded()
    assert "192 are left out, since the reference's vocab_size is 320: more than padding needs" in result.text
    assert tm.read_json(tmp_path / "out" / "config.json")["vocab_size"] == 320


def test_without_a_tokenizer_of_its_own(trained, to_hf, tmp_path: Path) -> None:
    """It is then looked for where it is without a reference."""
    checkpoint, hf = trained
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.move(hf / name, checkpoint / name)
    arguments = ("--input_dir", checkpoint, "--output_dir", tmp_path / "out", "--reference", hf)
    assert f"the checkpoint, {checkpoint}" in to_hf(*arguments).succeeded().text
    assert (tmp_path / "out" / "tokenizer.model").is_file()


def test_a_repository(trained, tmp_path: Path) -> None:
    """Its small files are fetched, its weights are not."""
    checkpoint, hf = trained
    files = {path.name: path.read_bytes() for path in hf.iterdir()}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    with HubStandIn({"org/chat": Repository(files)}) as server:
        settings = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        line = [sys.executable, REPOSITORY / "megatron_to_hf.py", "--input_dir", checkpoint, "--reference", "org/chat"]
        done = subprocess.run(
            [*map(str, line), "--output_dir", str(tmp_path / "out")], env=inherited | settings, capture_output=True,
            text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "model.safetensors" not in server.fetched()
    assert tm.read_json(tmp_path / "out" / "generation_config.json")["temperature"] == 0.6
    assert tm.read_json(tmp_path / "out" / "config.json")["custom_note"] == "kept"
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == files["tokenizer.model"]
