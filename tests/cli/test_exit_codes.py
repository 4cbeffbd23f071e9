"""Exit codes that job scripts build on: a finished command run again, a dry run that could not succeed, verify."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import run


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def attributes(tmp_path: Path) -> None:
    try:
        os.setxattr(tmp_path, "user.test", b"")
    except (OSError, AttributeError):
        pytest.skip("this filesystem has no extended attributes, which tell whose run an OUT is")


def export_of(imported) -> list[object]:
    return ["--input_dir", imported("llama2"), "--no_tokenizer", "--output_dir"]


@pytest.mark.parametrize("options", [(), ("--verify",), ("--dry-run",)])
def test_a_finished_import_again(attributes, options, sources, to_megatron, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = ["llama2", "--model-path", sources("llama2"), "--out", out]
    first = [option for option in options if option != "--dry-run"]
    to_megatron(*line, *first).succeeded()
    before = tree(tmp_path)
    again = to_megatron(*line, *options).succeeded()
    assert "already complete" in again.out
    assert ("identical" in again.out.lower()) == ("--verify" in options)
    assert tree(tmp_path) == before


def test_a_finished_export_again(attributes, imported, to_hf, tmp_path: Path) -> None:
    out = tmp_path / "out"
    to_hf(*export_of(imported), out).succeeded()
    before = tree(out)
    assert "already complete" in to_hf(*export_of(imported), out, "--workers", 1).succeeded().out
    assert tree(out) == before
    to_hf(*export_of(imported), out, "--overwrite").succeeded()


@pytest.mark.parametrize("what", ["option", "source", "changed", "removed", "added", "copied"])
def test_what_is_not_the_same_command(attributes, what: str, imported, to_hf, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(imported("llama2"), source)
    line = ["--input_dir", source, "--no_tokenizer", "--output_dir", out]
    to_hf(*line).succeeded()
    if what == "option":
        line += ["--dtype", "float32"]
    elif what == "source":
        for file in source.rglob("*.pt"):  # the same bytes, written again: who knows
            file.write_bytes(file.read_bytes())
    elif what == "changed":
        (out / "config.json").write_text((out / "config.json").read_text() + " ")
    elif what == "removed":
        (out / "generation_config.json").unlink()
    elif what == "added":
        (out / "notes.txt").write_text("mine")
    else:
        copy = tmp_path / "copy"
        shutil.copytree(out, copy, copy_function=shutil.copyfile)
        shutil.rmtree(out)
        copy.rename(out)
    before = tree(out)
    to_hf(*line).refused(str(out))
    assert tree(out) == before


def test_a_failed_proof_of_what_is_there(attributes, sources, to_megatron, tmp_path: Path) -> None:
    """A damage that leaves sizes and times: --verify proves, or fails."""
    line = ["llama2", "--model-path", sources("llama2"), "--out", tmp_path / "out", "--verify"]
    to_megatron(*line).succeeded()
    file = next((tmp_path / "out").rglob("*.pt"))
    stat = file.stat()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    to_megatron(*line).refused("proof")


def test_a_dry_run_that_could_not_succeed(sources, imported, to_megatron, to_hf, tmp_path, monkeypatch) -> None:
    from weights_conversion.engine import memory
    from weights_conversion.output import space

    monkeypatch.setattr(space, "free_space", lambda out: 1000)
    line = ["llama2", "--model-path", sources("llama2"), "--out", tmp_path / "out", "--dry-run"]
    found = to_megatron(*line).refused("free", str(tmp_path / "out"))
    assert "memory      about" in found.out, "the plan is shown all the same"
    to_hf(*export_of(imported), tmp_path / "hf", "--dry_run").refused("free")
    monkeypatch.setattr(memory, "_left_on_machine", lambda root: iter([1 << 20]))
    monkeypatch.setattr(memory, "peak", lambda: 0)
    to_megatron(*line).refused("2 problems", "memory", "free")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--ranks", 4], ["--rank_rate", 1], ["--filesystem-bandwidth", 2.5]])
def test_a_prediction_is_a_dry_runs(options, to_megatron, to_hf, tmp_path: Path) -> None:
    for result in (
        to_megatron("llama2", "--out", tmp_path / "out", *options),
        to_hf("--input_dir", tmp_path, "--output_dir", tmp_path / "out", *options),
    ):
        result.refused("--dry-run", "torchrun", code=2)


def test_verify_tells_difference_from_trouble(sources, imported, tmp_path: Path) -> None:
    assert run("weights_conversion.verify", sources("llama2"), imported("llama2"), "--exact-only").code == 0
    assert run("weights_conversion.verify", sources("llama2"), imported("llama2-gqa"), "--exact-only").code == 1
    run("weights_conversion.verify", sources("llama2"), tmp_path / "nowhere").refused("nowhere", code=2)
