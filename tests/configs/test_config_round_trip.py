"""config.json and generation_config.json through Megatron and back, training in between included."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
from conftest import Script
from megatron_files import assert_same_tensors, read_checkpoint, write_checkpoint
from naive_layout import megatron_ranks

SPELLED_TWICE = {"rope_theta", "rope_scaling", "rope_parameters", "dtype", "torch_dtype", "transformers_version"}
ROUND = [
    "codellama",
    "codellama-34b",
    "llama",
    "llama2-linear",
    "llama2-wide-heads",
    "mistral-v0.1",
    "mistral-v0.2",
    "mistral-v0.3",
    "mistral-wide-heads",
    "falcon-7b",
    "falcon-40b",
    "falcon-11b",
]


def rope_meanings(config: dict[str, Any]) -> set[tuple[Any, ...]]:
    """(theta, kind, factor) as transformers 4 and as transformers 5 read them; one element when they agree."""
    found = set()
    if "rope_theta" in config:
        scaling = config.get("rope_scaling") or {}
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        found.add((config["rope_theta"], kind, scaling.get("factor")))
    if config.get("rope_parameters"):
        rope = config["rope_parameters"]
        found.add((rope["rope_theta"], rope.get("rope_type", "default"), rope.get("factor")))
    return found


def assert_equal_in_meaning(found: dict[str, Any], source: dict[str, Any]) -> None:
    assert rope_meanings(found) == rope_meanings(source)
    assert "rope_theta" in found, "transformers 4, vLLM and llama.cpp read the theta here"
    assert (source.get("dtype") or source.get("torch_dtype")) in (found.get("dtype"), found.get("torch_dtype"))
    for key in source.keys() - SPELLED_TWICE:
        assert found.get(key) == source[key], key


def auto_meaning(folder: Path) -> dict[str, Any]:
    """What the installed transformers reads from a folder."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    rope = getattr(config, "rope_parameters", None) or {}
    scaling = getattr(config, "rope_scaling", None) or rope
    linear = "linear" in (scaling.get("rope_type"), scaling.get("type"))
    return {
        "class": type(config).__name__,
        "theta": rope.get("rope_theta") or config.rope_theta,
        "factor": scaling.get("factor") if linear else None,
        "positions": config.max_position_embeddings,
        "window": getattr(config, "sliding_window", None),
        "eps": getattr(config, "rms_norm_eps", None) or config.layer_norm_epsilon,
        "bos": config.bos_token_id,
        "eos": config.eos_token_id,
        "dtype": getattr(config, "dtype", None) or config.torch_dtype,
        "tied": config.tie_word_embeddings,
        "rows": config.vocab_size,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }


def expected_meaning(model: tm.Tiny) -> dict[str, Any]:
    kind = {"mistral": "MistralConfig", "falcon": "FalconConfig"}.get(model.family, "LlamaConfig")
    return {
        "class": kind,
        "theta": model.theta,
        "factor": model.linear_factor,
        "positions": model.max_positions,
        "window": model.window,
        "eps": model.eps,
        "bos": 11 if model.falcon else 1,
        "eos": 11 if model.falcon else (list(model.eos) if isinstance(model.eos, tuple) else model.eos),
        "dtype": model.dtype,
        "tied": model.tied,
        "rows": model.vocab,
        "head_dim": model.head_dim,
    }


def export(to_hf: Script, checkpoint: Path, out: Path, family: str, *options: Any) -> dict[str, Any]:
    to_hf("--input_dir", checkpoint, "--output_dir", out, "--model", family, *options).succeeded()
    return tm.read_json(out / "config.json")


@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize("name", ROUND)
def test_round_trip(name: str, spelling: int, to_megatron, to_hf, tmp_path: Path) -> None:
    model = tm.MODELS[name]
    source = tm.write_huggingface(tmp_path / "hf", model, spelling=spelling)
    to_megatron(model.family, "--model-path", source, "--out", tmp_path / "mt").succeeded()
    found = export(to_hf, tmp_path / "mt", tmp_path / "back", model.family)
    assert_equal_in_meaning(found, tm.read_json(source / "config.json"))
    assert auto_meaning(tmp_path / "back") == expected_meaning(model)
    generation = tm.read_json(tmp_path / "back" / "generation_config.json")
    wanted = tm.read_json(source / "generation_config.json")
    assert {key: generation.get(key) for key in wanted} == wanted


@pytest.mark.parametrize("name", ["codellama", "llama2-linear", "mistral-v0.2"])
@pytest.mark.parametrize("spelling", [4, 5])
def test_round_trip_logits(name: str, spelling: int, to_megatron, to_hf, tmp_path: Path, tokens: torch.Tensor) -> None:
    """Whichever transformers wrote the source, the one installed here computes the source's logits from the export."""
    model = tm.MODELS[name]
    source = tm.write_huggingface(tmp_path / "hf", model, spelling=spelling)
    to_megatron(model.family, "--model-path", source, "--out", tmp_path / "mt").succeeded()
    export(to_hf, tmp_path / "mt", tmp_path / "back", model.family)
    expected = tm.transformers_logits(model, model.tensors(), tokens)
    torch.testing.assert_close(tm.folder_logits(tmp_path / "back", tokens), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ROUND)
def test_from_args_alone(name: str, to_hf, tmp_path: Path) -> None:
    """Without a manifest, args and the family say the same."""
    model = tm.MODELS[name]
    ranks = megatron_ranks(model.config(), model.tensors())
    write_checkpoint(tmp_path / "mt", ranks, tm.training_args(model), 9)
    export(to_hf, tmp_path / "mt", tmp_path / "back", model.family, "--no_tokenizer")
    assert auto_meaning(tmp_path / "back") == expected_meaning(model)


def test_lists_and_unknown_keys(to_megatron, to_hf, tmp_path: Path) -> None:
    """Several end tokens, sampling settings, and keys that nobody here knows come back."""
    model = replace(tm.MODELS["llama2"], eos=(2, 7), name="lists")
    source = tm.write_huggingface(tmp_path / "hf", model, changes={"my_own_key": {"a": [1, 2]}, "pad_token_id": 0})
    generation = {"bos_token_id": 1, "eos_token_id": [2, 7], "temperature": 0.6, "top_p": 0.9, "do_sample": True}
    tm.write_json(source / "generation_config.json", generation)
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "mt").succeeded()
    found = export(to_hf, tmp_path / "mt", tmp_path / "back", "llama2")
    assert (found["eos_token_id"], found["my_own_key"], found["pad_token_id"]) == ([2, 7], {"a": [1, 2]}, 0)
    back = tm.read_json(tmp_path / "back" / "generation_config.json")
    assert {key: back.get(key) for key in generation} == generation


def test_dtype_follows_the_files(to_megatron, to_hf, tmp_path: Path) -> None:
    model = tm.MODELS["codellama"]
    source = tm.write_huggingface(tmp_path / "hf", model)
    to_megatron("codellama", "--model-path", source, "--out", tmp_path / "mt", "--dtype", "float32").succeeded()
    export(to_hf, tmp_path / "mt", tmp_path / "back", "codellama")
    assert auto_meaning(tmp_path / "back")["dtype"] == torch.float32
    assert tm.read_huggingface(tmp_path / "back")["lm_head.weight"].dtype == torch.float32


# --- training in between ----------------------------------------------------------------------------------------------

RESET = {  # what the original's resharding tool makes of args
    "rope_theta": 10000.0,
    "layernorm_epsilon": 1e-5,
    "sliding_window_size": None,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "rope_scaling_factor": 1.0,
    "use_cpu_initialization": True,
    "perform_initialization": False,
    "no_save_optim": True,
    "no_save_rng": True,
}


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("name", ["codellama", "llama", "mistral-v0.1", "mistral-v0.2", "llama2-linear", "falcon-40b"])
def test_trained_beside_the_manifest(name: str, reset: bool, imported, to_hf, tmp_path: Path) -> None:
    """A later iteration in the same folder, trained at a shorter length: the source's numbers come back."""
    model = tm.MODELS[name]
    root = tmp_path / "mt"
    shutil.copytree(imported(name), root)
    trained = {key: tensor * 2 for key, tensor in model.tensors().items()}
    ranks = megatron_ranks(model.config(), trained, 2, 2, rows=512)
    args = tm.training_args(model, 2, 2, rows=512) | {"seq_length": 128, "max_position_embeddings": 128}
    write_checkpoint(root, ranks, args | (RESET if reset else {}), 100)
    export(to_hf, root, tmp_path / "back", model.family)
    assert_same_tensors(tm.read_huggingface(tmp_path / "back"), trained)
    assert auto_meaning(tmp_path / "back") == expected_meaning(model)


@pytest.mark.parametrize(
    ("name", "theta", "eps"), [("codellama", 1e6, 1e-5), ("llama", 1e4, 1e-6), ("llama2", 1e4, 1e-5)]
)
def test_reset_args_without_manifest(name: str, theta: float, eps: float, to_hf, tmp_path: Path) -> None:
    """The resharding tool's args are not believed where the family knows better; a warning names both values."""
    model = tm.MODELS[name]
    ranks = megatron_ranks(model.config(), model.tensors(), 2, rows=512)
    write_checkpoint(tmp_path / "mt", ranks, tm.training_args(model, 2, rows=512) | RESET, 100)
    common = ["--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "back", "--model", model.family]
    result = to_hf(*common, "--no_tokenizer", "--true_vocab_size", model.vocab).succeeded()
    found = auto_meaning(tmp_path / "back")
    assert (found["theta"], found["eps"]) == (theta, eps)
    if name == "codellama":
        assert "10000" in result.text
        assert "1000000" in result.text.replace("1e6", "1000000").replace("1e+06", "1000000")


def test_reset_window_is_said(to_hf, tmp_path: Path) -> None:
    """Mistral's window is gone from reset args; the family's is used, and both are named."""
    model = tm.MODELS["mistral-v0.1"]
    ranks = megatron_ranks(model.config(), model.tensors())
    write_checkpoint(tmp_path / "mt", ranks, tm.training_args(model) | RESET, 100)
    common = ["--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "back", "--model", "mistral"]
    result = to_hf(*common, "--no_tokenizer").succeeded()
    assert auto_meaning(tmp_path / "back") == expected_meaning(model)
    assert "4096" in result.text
    assert "reset" in result.text


def test_flags_outrank_the_family(to_hf, tmp_path: Path) -> None:
    """Mistral v0.2 after the resharding tool: nothing but the user knows its theta, and that it has no window."""
    model = tm.MODELS["mistral-v0.2"]
    ranks = megatron_ranks(model.config(), model.tensors())
    write_checkpoint(tmp_path / "mt", ranks, tm.training_args(model) | RESET, 100)
    flags = ["--no_tokenizer", "--rope_theta", 1e6, "--sliding_window_size", 0]
    export(to_hf, tmp_path / "mt", tmp_path / "back", "mistral", *flags)
    assert auto_meaning(tmp_path / "back") == expected_meaning(model)


def test_new_tokens_after_training(sources, to_megatron, to_hf, tmp_path: Path) -> None:
    """Imported with room for five new tokens and two extra ids, cut, trained with them: every id keeps its row."""
    import transformers

    model = tm.MODELS["codellama"]
    pieces = 320
    model = replace(model, vocab=pieces, name="codellama-new-tokens")
    source = tm.write_huggingface(tmp_path / "hf", model)
    options = ["--true-vocab-size", pieces + 7, "--tensor-model-parallel-size", 2]
    root = tmp_path / "mt"
    to_megatron("codellama", "--model-path", source, "--out", root, *options).succeeded()
    tensors = read_checkpoint(root).tensors
    args = tm.training_args(model, 2, rows=512) | {
        "seq_length": 128,
        "new_tokens": True,
        "vocab_extra_ids_list": "<a>,<b>",
    }
    write_checkpoint(root, tensors, args, 40)
    found = export(to_hf, root, tmp_path / "back", "codellama")
    assert (found["vocab_size"], found["rope_theta"], found["max_position_embeddings"]) == (327, 1e6, 16384)
    assert tm.read_huggingface(tmp_path / "back")["model.embed_tokens.weight"].shape[0] == 327
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    names = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<a>", "<b>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(pieces, pieces + 7))


def test_tokens_without_rows_are_refused(imported, to_hf, tmp_path: Path) -> None:
    """Trained with new tokens, or so the flag says, but the embedding ends before their ids."""
    model = tm.MODELS["llama2"]
    out = tmp_path / "out"
    result = to_hf("--input_dir", imported("llama2"), "--output_dir", out, "--model", model.family, "--new_tokens")
    result.refused("<CLS>")
    assert not list(tmp_path.iterdir())


def test_overrides_reach_the_configs(imported, to_hf, tmp_path: Path) -> None:
    found = export(
        to_hf, imported("llama2"), tmp_path / "out", "llama2", "--override_special_tokens", "eos=▁the", "bos=▁a"
    )
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    bos, eos = pieces.piece_to_id("▁a"), pieces.piece_to_id("▁the")
    assert 0 not in (bos, eos), "the tokenizer trained here has both pieces"
    assert (found["bos_token_id"], found["eos_token_id"]) == (bos, eos)
    generation = tm.read_json(tmp_path / "out" / "generation_config.json")
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (bos, eos)


def test_override_with_an_equals_sign(to_megatron, to_hf, tmp_path: Path) -> None:
    """Only the first "=" divides; the extra token of training holds one itself."""
    model = replace(tm.MODELS["llama2"], name="equals", vocab=384)
    source = tm.write_huggingface(tmp_path / "hf", model)
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "mt").succeeded()
    options = ["--no_new_tokens", "--vocab_extra_ids_list", "<a=b>,<c>", "--override_special_tokens", "eos=<a=b>"]
    found = export(to_hf, tmp_path / "mt", tmp_path / "out", "llama2", *options)
    assert found["eos_token_id"] == 320
    assert tm.read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == 320


@pytest.mark.parametrize("override", ["nonsense=<s>", "eos", "eos=<no-such-token>"])
def test_bad_overrides(override: str, imported, to_hf, tmp_path: Path) -> None:
    options = [
        "--input_dir",
        imported("llama2"),
        "--output_dir",
        tmp_path / "out",
        "--override_special_tokens",
        override,
    ]
    result = to_hf(*options)
    assert result.code in (1, 2)
    assert result.err
    assert "Traceback" not in result.text
    assert not list(tmp_path.iterdir())
