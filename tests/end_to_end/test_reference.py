"""--reference: what Megatron's args cannot carry comes from a Hugging Face model, and what it contradicts is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models as tm
import torch


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
