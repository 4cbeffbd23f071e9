"""--verify and --checksums of the two scripts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from weights_conversion.mapping import ops


def layout(tp: int, pp: int) -> list[object]:
    return ["--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp]


def test_verified_round(sources, to_megatron, to_hf, tmp_path: Path) -> None:
    source = sources("llama2-gqa")
    checkpoint, again = tmp_path / "mt", tmp_path / "core"
    there = to_megatron("llama2", "--model-path", source, "--out", checkpoint, *layout(2, 2), "--verify")
    assert "IDENTICAL" in there.succeeded().out
    back = to_hf("--input_dir", checkpoint, "--output_dir", tmp_path / "hf", "--no_tokenizer", "--verify")
    assert "IDENTICAL" in back.succeeded().out
    core = ["--target", "megatron-core", "--dtype", "float32", "--verify"]
    recast = to_megatron("llama2", "--model-path", checkpoint, "--out", again, *core)
    assert "SAME" in recast.succeeded().out.upper()
    assert not list(tmp_path.glob("*.unverified")) + list(tmp_path.glob("*.partial"))


def test_stated_values_are_part_of_the_proof(imported, to_hf, tmp_path: Path) -> None:
    """A value that the user states is what the export must have."""
    arguments = ["--input_dir", imported("llama2-gqa"), "--output_dir", tmp_path / "hf", "--no_tokenizer"]
    to_hf(*arguments, "--rope_theta", 54321, "--verify").succeeded()


def test_failed_proof_sets_the_output_aside(
    sources, to_megatron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake is in what writing and reading share, so that only the forward pass can see it."""
    right = ops.FuseGLU.megatron_rows

    def swapped(self: ops.FuseGLU, start: int, stop: int, rows: int, ctx: ops.Context) -> tuple[ops.Range, ...]:
        return right(self, start, stop, rows, ctx)[::-1]

    monkeypatch.setattr(ops.FuseGLU, "megatron_rows", swapped)
    out = tmp_path / "mt"
    found = to_megatron("llama2", "--model-path", sources("llama2-gqa"), "--out", out, "--verify")
    found.refused("failed its proof", "mlp", "gate", "mt.unverified")
    assert (tmp_path / "mt.unverified" / "release").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["mt.unverified"]


def test_checksums(sources, to_megatron, tmp_path: Path) -> None:
    out = tmp_path / "mt"
    to_megatron("llama2", "--model-path", sources("llama2-gqa"), "--out", out, *layout(2, 1), "--checksums").succeeded()
    listed = dict(reversed(line.split("  ")) for line in (out / "checksums.sha256").read_text().splitlines())
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "checksums.sha256"]
    assert listed == {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
