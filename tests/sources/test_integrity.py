"""integrity.json, as newer Megatron-Core writes it beside the items, is checked where sums or a proof are asked for."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import GOLDEN, run
from golden_core import root_of

CASE = GOLDEN / "core-qwen3"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    out = Path(shutil.copytree(CASE / "megatron-torch_dist", tmp_path / "in"))
    folder = root_of(out)
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    (folder / "integrity.json").write_text(json.dumps({"algorithm": "sha256", "files": sums}))
    return out


def spoil(checkpoint: Path) -> None:
    with (root_of(checkpoint) / "metadata.json").open("ab") as file:
        file.write(b" ")


@pytest.mark.parametrize("flag", ["--checksums", "--verify"])
def test_right_sums(flag: str, checkpoint: Path, to_hf, tmp_path: Path) -> None:
    said = to_hf("--input_dir", checkpoint, "--output_dir", tmp_path / "out", "--no_tokenizer", flag).succeeded()
    assert "are what its integrity.json says" in said.out


@pytest.mark.parametrize("flag", ["--checksums", "--verify"])
def test_a_changed_file_is_named(flag: str, checkpoint: Path, to_hf, tmp_path: Path) -> None:
    spoil(checkpoint)
    to_hf("--input_dir", checkpoint, "--output_dir", tmp_path / "out", "--no_tokenizer", flag).refused(
        "metadata.json is not what integrity.json says"
    )
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(checkpoint: Path, to_megatron, tmp_path: Path) -> None:
    (root_of(checkpoint) / "metadata.json").unlink()
    to_megatron("qwen3", "--model-path", checkpoint, "--out", tmp_path / "out", "--checksums").refused(
        "metadata.json is missing"
    )


def test_unasked_nothing_is_summed(checkpoint: Path, to_hf, tmp_path: Path) -> None:
    spoil(checkpoint)
    to_hf("--input_dir", checkpoint, "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()


def test_verify_counts_it_as_different(checkpoint: Path) -> None:
    spoil(checkpoint)
    found = run("weights_conversion.verify", CASE / "hf", checkpoint, "--exact-only")
    assert found.code == 1
    assert "metadata.json is not what integrity.json says" in found.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"algorithm": "md5", "files": {}}, "md5"),
        ({"algorithm": "sha256", "files": {"../x": "0"}}, "own files"),
        ({"algorithm": "sha256"}, "own files"),
        ([], "integrity.json"),
    ],
)
def test_a_listing_that_is_none(content, words: str, checkpoint: Path, to_hf, tmp_path: Path) -> None:
    (root_of(checkpoint) / "integrity.json").write_text(json.dumps(content))
    to_hf("--input_dir", checkpoint, "--output_dir", tmp_path / "out", "--no_tokenizer", "--checksums").refused(words)


def test_sums_that_are_no_file_are_not_passed_over(checkpoint: Path, to_hf, tmp_path: Path) -> None:
    (root_of(checkpoint) / "integrity.json").unlink()
    (root_of(checkpoint) / "integrity.json").symlink_to("/nowhere/at/all")
    to_hf("--input_dir", checkpoint, "--output_dir", tmp_path / "out", "--no_tokenizer", "--checksums").refused(
        "integrity.json"
    )
