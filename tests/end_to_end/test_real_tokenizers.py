"""Published tokenizers beside tiny models of their families: every file and every id stays, on all ways.

`bash tests/fetch_tokenizers.sh FOLDER` fetches them; REAL_TOKENIZERS names that folder.
"""

from __future__ import annotations

import base64
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiny_models as tm
import tokenizer_models as tiny
import torch

GIVEN = os.environ.get("REAL_TOKENIZERS")
SMALL = {"layers": 2, "hidden": 16, "ffn": 16, "heads": 2, "groups": 2, "head_dim": 8, "dtype": torch.bfloat16}
# name: (the tiny model, rows, tokens, ids of "Hello world" by the published tokenizer)
JSON_ALONE = {
    "llama3": (tm.DENSE["llama3-8b"], 128256, 128256, [9906, 1917]),  # of the first week: it set no bos
    "llama3_1": (tm.DENSE["llama3"], 128256, 128256, [128000, 9906, 1917]),
    "qwen3": (tm.DENSE["qwen3"], 151936, 151669, [9707, 1879]),
    "llama2": (tm.MODELS["mistral-v0.1"], 32000, 32000, [1, 22557, 1526]),  # in truth Mistral's first
}
PADDED_TO = {rows: -(-rows // 896) * 896 for rows in (128256, 151936, 32000)}
WAYS = {
    "torch": ["--ckpt-format", "torch", "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2,
              "--make-vocab-size-divisible-by", 448],
    "torch_dist": ["--ckpt-format", "torch_dist", "--make-vocab-size-divisible-by", 896],
}  # fmt: skip
CHAT = [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Rhine."}]


def given(name: str) -> Path:
    """A fetched folder or file. Skips the test where there is none."""
    if GIVEN is None:
        pytest.skip("REAL_TOKENIZERS names no folder of published tokenizers (bash tests/fetch_tokenizers.sh FOLDER)")
    if not (path := Path(GIVEN).resolve() / name).exists():
        pytest.skip(f"{name} could not be fetched (bash tests/fetch_tokenizers.sh {GIVEN})")
    return path


def model_with(folder: Path, model: tm.Tiny, rows: int, files: dict[str, Path]) -> Path:
    tm.write_huggingface(folder, replace(model, vocab=rows, **SMALL), tokenizer=False)
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
    return folder


@pytest.fixture
def source(tmp_path: Path):
    """A tiny model with a published tokenizer.json and tokenizer_config.json."""

    def make(name: str) -> Path:
        folder = given(f"{name}/tokenizer.json").parent
        model, rows, _, _ = JSON_ALONE[name]
        return model_with(tmp_path / "hf", model, rows, {path.name: path for path in folder.iterdir()})

    return make


def family(name: str) -> str:
    return JSON_ALONE[name][0].family


def loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "way"),
    [("llama3", "torch_dist"), ("llama3_1", "torch"), ("qwen3", "torch"), ("qwen3", "torch_dist"), ("llama2", "torch")],
)
def test_json_alone(name: str, way: str, source, to_megatron, to_hf, tmp_path: Path) -> None:
    """Byte for byte, with the source's ids, special tokens and chat template; padding rows are gone again."""
    hf = source(name)
    _, rows, tokens, hello = JSON_ALONE[name]
    said = to_megatron(
        family(name), "--model-path", hf, "--out", tmp_path / "m", "--target", "megatron-core", *WAYS[way]
    ).succeeded()  # fmt: skip
    assert "--tokenizer-type HuggingFaceTokenizer" in said.text
    if way == "torch":
        assert f"{rows} rows of the source, {PADDED_TO[rows]} written" in said.text
    said = to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out").succeeded()
    assert f"{tokens} tokens, tokenizer.json kept" in said.text
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == given(f"{name}/{file}").read_bytes(), file
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in hf.iterdir()}
    assert tm.read_json(tmp_path / "out" / "config.json")["vocab_size"] == rows
    assert len(tm.read_huggingface(tmp_path / "out")["lm_head.weight"]) == rows
    before, after = loaded(hf), loaded(tmp_path / "out")
    assert after("Hello world")["input_ids"] == hello
    assert [after(text)["input_ids"] for text in tiny.TEXTS] == [before(text)["input_ids"] for text in tiny.TEXTS]
    assert after.get_vocab() == before.get_vocab()
    assert len(after) == tokens
    assert (after.bos_token_id, after.eos_token_id) == (before.bos_token_id, before.eos_token_id)
    if before.chat_template:
        assert after.apply_chat_template(CHAT, tokenize=False) == before.apply_chat_template(CHAT, tokenize=False)


def test_padding_without_a_manifest(source, to_megatron, to_hf, tmp_path: Path) -> None:
    """As training leaves it: --reference says how many rows are the model's; the tokenizer's length never does."""
    hf = source("qwen3")
    rows = JSON_ALONE["qwen3"][1]
    to_megatron("qwen3", "--model-path", hf, "--out", tmp_path / "m", *WAYS["torch"]).succeeded()
    for path in (tmp_path / "m").iterdir():
        if path.is_file() and not path.name.startswith("latest"):
            path.unlink()
    to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out", "--reference", hf).succeeded()
    assert tm.read_json(tmp_path / "out" / "config.json")["vocab_size"] == rows
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
    to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "all", "--vocab_file", hf).succeeded()
    assert tm.read_json(tmp_path / "all" / "config.json")["vocab_size"] == PADDED_TO[rows]


def test_another_end(source, to_megatron, to_hf, tmp_path: Path) -> None:
    """Llama 3's base models end with <|end_of_text|>; a chat fine-tune ends with <|eot_id|>."""
    hf = source("llama3")
    to_megatron("llama3", "--model-path", hf, "--out", tmp_path / "m").succeeded()
    to_hf(
        "--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out",
        "--override_special_tokens", "eos=<|eot_id|>", "pad=<|reserved_special_token_0|>",
    ).succeeded()  # fmt: skip
    after = loaded(tmp_path / "out")
    assert (after.eos_token_id, after.pad_token_id, after.bos_token_id) == (128009, 128002, 128000)
    assert tm.read_json(tmp_path / "out" / "config.json")["eos_token_id"] == 128009
    assert after.get_vocab() == loaded(hf).get_vocab()
    assert after("Hello world")["input_ids"] == JSON_ALONE["llama3"][3]


def test_megatron_llm_s_rule_needs_a_sentencepiece_model(source, to_megatron, to_hf, tmp_path: Path) -> None:
    """Llama 3 8B trained in Megatron-LLM: what was added depends on a tokenizer.model, which there is none of."""
    hf = source("llama3")
    to_megatron("llama3", "--model-path", hf, "--out", tmp_path / "m", "--target", "megatron-llm").succeeded()
    out = ("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out")
    to_hf(*out, "--new_tokens").refused("no tokenizer.model", "--no_new_tokens")
    to_hf(*out, "--vocab_extra_ids_list", "<x>").refused("<x> = 128256", "--true_vocab_size")
    to_hf(*out).succeeded()
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()


# the published file: (the tiny model, its pieces)
SENTENCEPIECE = {
    "tokenizer.model.v1": (tm.MODELS["mistral-v0.1"], 32000),
    "mistral_instruct_tokenizer_240216.model.v2": (tm.MODELS["mistral-v0.2"], 32768),
    "mistral_instruct_tokenizer_240323.model.v3": (tm.MODELS["mistral-v0.3"], 32768),
    "mistral_instruct_tokenizer_241114.model.v7": (tm.MODELS["mistral-v0.3"], 32768),
}


@pytest.mark.parametrize("target", ["megatron-core", "megatron-llm"])
@pytest.mark.parametrize("file", SENTENCEPIECE)
def test_sentencepiece_alone(file: str, target: str, to_megatron, to_hf, tmp_path: Path) -> None:
    """tokenizer.model stays; the tokenizer.json built from it cuts text as sentencepiece does; nothing is added.

    Where Megatron-LLM trained with new tokens, they stand behind the pieces by its rule.
    """
    path = given(f"mistral/{file}")
    model, pieces = SENTENCEPIECE[file]
    hf = model_with(tmp_path / "hf", model, pieces + 128, {"tokenizer.model": path})
    to_megatron("mistral", "--model-path", hf, "--out", tmp_path / "m", "--target", target).succeeded()
    to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out").succeeded()
    assert (tmp_path / "out/tokenizer.model").read_bytes() == path.read_bytes()
    after, theirs = loaded(tmp_path / "out"), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert len(after) == pieces
    for text in tiny.TEXTS:
        assert after.encode(text, add_special_tokens=False) == theirs.encode(text), text
    if target == "megatron-llm":
        to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "new", "--new_tokens").succeeded()
        assert loaded(tmp_path / "new").get_vocab() == tiny.MegatronSentencePiece(path, new_tokens=True).ids


def tiktoken_ids(data: dict[str, Any], text: str) -> list[int]:
    """Tiktoken's rule, stated plainly: the pair whose join has the lowest rank is joined first, the leftmost one."""
    import regex

    ranks = {base64.b64decode(item["token_bytes"]): item["rank"] for item in data["vocab"][: 131072 - 1000]}
    ids = []
    for word in regex.findall(data["config"]["pattern"], text):
        parts = [bytes([byte]) for byte in word.encode()]
        while len(parts) > 1:
            joins = [(ranks.get(parts[i] + parts[i + 1], 1 << 30), i) for i in range(len(parts) - 1)]
            rank, i = min(joins)
            if rank == 1 << 30:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [1000 + ranks[part] for part in parts]
    return ids


def test_tekken_alone(to_megatron, to_hf, tmp_path: Path) -> None:
    """Nemo's: kept, and a tokenizer.json with the same ids beside it."""
    path = given("mistral/tekken_240718.json")
    hf = model_with(tmp_path / "hf", tm.MODELS["mistral-v0.2"], 131072, {"tekken.json": path})
    said = to_megatron("mistral", "--model-path", hf, "--out", tmp_path / "m", "--target", "megatron-core")
    assert "tekken.json alone" in said.succeeded().text
    assert (tmp_path / "m/tekken.json").read_bytes() == path.read_bytes()
    to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out").succeeded()
    assert (tmp_path / "out/tekken.json").read_bytes() == path.read_bytes()
    shutil.move(tmp_path / "out/tekken.json", tmp_path / "kept.json")  # else mistral-common's, where it is installed
    after, data = loaded(tmp_path / "out"), tm.read_json(path)
    assert len(after) == 131072
    assert (after.bos_token_id, after.eos_token_id, after.pad_token_id) == (1, 2, 11)
    assert after.convert_tokens_to_ids(["[INST]", "[/INST]", "[SUFFIX]", "<SPECIAL_999>"]) == [3, 4, 16, 999]
    assert after("Hello world")["input_ids"] == [1, 22177, 4304]
    for text in (text.replace("[INST]", "[I]") for text in tiny.TEXTS):  # special tokens are no text there
        assert after.encode(text, add_special_tokens=False) == tiktoken_ids(data, text), text
        assert after.decode(after.encode(text, add_special_tokens=False)) == text


def test_tekken_beside_others(to_megatron, to_hf, tmp_path: Path) -> None:
    """As Nemo's repository has it, all stay; where a token is replaced, tekken.json would say something else."""
    path = given("mistral/tekken_240911.json")
    bare = model_with(tmp_path / "bare", tm.MODELS["mistral-v0.2"], 131072, {"tekken.json": path})
    to_megatron("mistral", "--model-path", bare, "--out", tmp_path / "bare-m").succeeded()
    to_hf("--input_dir", tmp_path / "bare-m", "--output_dir", tmp_path / "hf").succeeded()
    to_megatron("mistral", "--model-path", tmp_path / "hf", "--out", tmp_path / "m").succeeded()
    said = to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out").succeeded()
    assert "tokenizer.json kept" in said.text
    for name in ("tekken.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name
    said = to_hf(
        "--input_dir", tmp_path / "m", "--output_dir", tmp_path / "other", "--override_special_tokens", "eos=[/INST]"
    ).succeeded()  # fmt: skip
    assert "tekken.json is left out" in said.text
    assert not (tmp_path / "other/tekken.json").exists()
    assert loaded(tmp_path / "other").eos_token_id == 4
