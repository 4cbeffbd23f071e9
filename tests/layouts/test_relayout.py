"""What another layout or dialect of a trained checkpoint keeps, and what it must not invent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizer_models
from megatron_files import read_checkpoint, write_checkpoint

SIZES = ["--true-vocab-size", 325, "--make-vocab-size-divisible-by", 64]


@pytest.fixture
def trained(sources, to_megatron, tmp_path: Path) -> Path:
    """Import, then training with new tokens, saved to a folder without tokenizer or manifest."""
    imported = tmp_path / "imported"
    to_megatron("llama2", "--model-path", sources("llama2-gqa"), "--out", imported, *SIZES).succeeded()
    read = read_checkpoint(imported)
    args = {
        **vars(read.args),
        "new_tokens": True,
        "load": str(imported),
        "vocab_file": str(imported / "tokenizer.model"),
    }
    write_checkpoint(tmp_path / "trained", read.tensors, args, 100)
    return tmp_path / "trained"


def tokens(folder: Path) -> dict[str, int]:
    return {
        entry["content"]: entry["id"] for entry in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    }


@pytest.mark.parametrize("target", [["--target", "megatron-core"], ["--tensor-model-parallel-size", 2]])
def test_tokens_of_training_are_kept(target: list, trained: Path, to_megatron, to_hf, tmp_path: Path) -> None:
    again = tmp_path / "again"
    to_megatron("llama2", "--model-path", trained, "--out", again, *target).succeeded()
    to_hf("--input_dir", trained, "--output_dir", tmp_path / "direct").succeeded()
    to_hf("--input_dir", again, "--output_dir", tmp_path / "hf").succeeded()
    assert tokens(tmp_path / "hf") == tokens(tmp_path / "direct")
    ids = tokenizer_models.megatron_token_ids(again / "tokenizer.model", new_tokens=True)
    assert tokens(tmp_path / "hf")["<CLS>"] == ids["<CLS>"] == 320


def test_padding_stays(trained: Path, to_megatron, tmp_path: Path) -> None:
    out = tmp_path / "again"
    to_megatron("llama2", "--model-path", trained, "--out", out, "--pipeline-model-parallel-size", 2).succeeded()
    assert read_checkpoint(out).args.padded_vocab_size == 384  # 325 rounded up to 128


@pytest.mark.parametrize(
    ("stated", "said", "rows"),
    [
        (325, "vocabulary 325 rows by --true_vocab_size, 59 padding rows left out", 384),
        (500, "vocabulary 384 rows, all kept: --true-vocab-size 500 adds to them", 512),
    ],
)
def test_a_stated_vocabulary_is_known(
    stated: int, said: str, rows: int, trained: Path, to_megatron, tmp_path: Path
) -> None:
    """What the user states is recorded: the report does not go on to say that nothing does."""
    read = read_checkpoint(trained)
    alone = {name: value for name, value in vars(read.args).items() if name not in ("load", "vocab_file")}
    write_checkpoint(tmp_path / "alone", read.tensors, alone, 100)
    out = tmp_path / "again"
    done = to_megatron("llama2", "--model-path", tmp_path / "alone", "--out", out, "--true-vocab-size", stated)
    done.succeeded()
    assert said in done.out
    assert "nothing records" not in done.text
    assert json.loads((out / "conversion_manifest.json").read_text())["true_vocab_size"] == stated
    assert read_checkpoint(out).args.padded_vocab_size == rows


def test_rows_that_a_layout_adds_are_no_tokens(imported, to_megatron, to_hf, tmp_path: Path) -> None:
    """Where nothing says how many rows are tokens, TP 2 needs 512 of 320: an export of it has as many as before."""
    source, out = tmp_path / "source", tmp_path / "again"
    shutil.copytree(imported("llama2-gqa"), source)
    (source / "conversion_manifest.json").unlink()
    said = to_megatron("llama2", "--model-path", source, "--out", out, "--tensor-model-parallel-size", 2).succeeded()
    assert "vocabulary 320 rows, all kept: nothing records the true number" in said.out
    assert "vocabulary 320 rows of the source, 512 written" in said.out
    assert json.loads((out / "conversion_manifest.json").read_text())["true_vocab_size"] == 320
    for root, name in ((source, "direct"), (out, "hf")):
        to_hf("--input_dir", root, "--output_dir", tmp_path / name, "--model", "llama2", "--no_tokenizer").succeeded()
        assert json.loads((tmp_path / name / "config.json").read_text())["vocab_size"] == 320


def test_values_can_be_stated(to_megatron, to_hf, imported, tmp_path: Path) -> None:
    """What a checkpoint has lost is stated once, when it is written again."""
    out, back = tmp_path / "again", tmp_path / "hf"
    source = tmp_path / "source"
    shutil.copytree(imported("llama2-gqa"), source)
    (source / "conversion_manifest.json").unlink()
    to_megatron("llama2", "--model-path", source, "--out", out, "--rope_theta", 54321).succeeded()
    to_hf("--input_dir", out, "--output_dir", back, "--no_tokenizer").succeeded()
    assert json.loads((back / "config.json").read_text())["rope_theta"] == 54321
    refused = to_megatron("llama2", "--model-path", back, "--out", tmp_path / "x", "--rope_theta", 1)
    refused.refused("--rope_theta", "Megatron sources")


def test_guesses_stay_guesses(sources, to_megatron, to_hf, tmp_path: Path) -> None:
    """A value that the resharding tool has reset, and nothing else records, is warned of after another layout too."""
    imported, lost, again = tmp_path / "imported", tmp_path / "lost", tmp_path / "again"
    to_megatron("mistral", "--model-path", sources("mistral-v0.2"), "--out", imported).succeeded()
    read = read_checkpoint(imported)
    reset = {
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "no_save_optim": True,
        "no_save_rng": True,
    }
    write_checkpoint(lost, read.tensors, {**vars(read.args), **reset, "rope_theta": 10000.0}, "release")
    assert "rope_theta" in to_megatron("mistral", "--model-path", lost, "--out", again).succeeded().out
    found = to_hf("--input_dir", again, "--output_dir", tmp_path / "hf", "--model", "mistral", "--no_tokenizer")
    assert "assumed" in found.succeeded().text
