"""Links in a source that lead out of it: followed, and named in the report."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import Script

from weights_conversion.files import links

MODEL = "llama2-gqa"


def moved(path: Path, to: Path) -> Path:
    """The file or folder lies at `to`, and a link to it where it was."""
    to.parent.mkdir(parents=True, exist_ok=True)
    path.rename(to)
    path.symlink_to(to)
    return to


def notes(text: str) -> list[str]:
    return [line for line in text.splitlines() if "lies elsewhere" in line]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.model"])
def test_an_imports_links_are_named_once(name: str, sources, tmp_path: Path, to_megatron: Script) -> None:
    source = Path(shutil.copytree(sources(MODEL), tmp_path / "hf"))
    real = moved(source / name, tmp_path / "other" / name)
    for options in ((), ("--overwrite",), ("--overwrite", "--dry-run")):
        done = to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out", *options).succeeded()
        (line,) = notes(done.text)
        assert f"{source / name} is a link to {real}" in line


@pytest.mark.parametrize("target", ["megatron-llm", "megatron-core"])
@pytest.mark.parametrize("what", ["file", "folder", "iteration", "manifest"])
@pytest.mark.parametrize("again", ["to_hf", "to_megatron"])
def test_a_checkpoints_links_are_named(
    target: str, what: str, again: str, imported, tmp_path: Path, to_hf: Script, to_megatron: Script
) -> None:
    """Of a rank's file or folder, the iteration's folder, and what stands beside; exported, and to another layout."""
    source = Path(shutil.copytree(imported(MODEL, "--target", target), tmp_path / "source"))
    release = source / "release"
    weights = max((path for path in release.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if what == "folder" and weights.parent == release:
        pytest.skip("torch_dist has no folders of ranks")
    manifest = source / "conversion_manifest.json"
    path = {"file": weights, "folder": weights.parent, "iteration": release, "manifest": manifest}[what]
    moved(path, tmp_path / "other" / path.name)
    if again == "to_hf":
        done = to_hf("--input_dir", source, "--output_dir", tmp_path / "out").succeeded()
    else:
        line = ("llama2", "--model-path", source, "--out", tmp_path / "out", "--tensor-model-parallel-size", 2)
        done = to_megatron(*line).succeeded()
    said = notes(done.text)
    assert said
    assert all(str(tmp_path / "other") in line for line in said)


def test_links_that_stay_are_not_told(sources, tmp_path: Path, to_megatron: Script) -> None:
    """Within the folder, into the hub's cache, and the folder itself."""
    cache = tmp_path / "models--org--x"
    snapshot = cache / "snapshots" / ("c" * 40)
    shutil.copytree(sources(MODEL), snapshot)
    for path in list(snapshot.iterdir()):
        moved(path, cache / "blobs" / path.name)
    (tmp_path / "named").symlink_to(snapshot)
    for source in (snapshot, tmp_path / "named"):
        out = tmp_path / f"out-{source.name}"
        assert notes(to_megatron("llama2", "--model-path", source, "--out", out).succeeded().text) == []
    plain = Path(shutil.copytree(sources(MODEL), tmp_path / "plain"))
    moved(plain / "model.safetensors", plain / "weights" / "1.safetensors")
    assert notes(to_megatron("llama2", "--model-path", plain, "--out", tmp_path / "out").succeeded().text) == []


def test_a_cache_that_leads_on_is_told(tmp_path: Path) -> None:
    """Blobs that are links to private files, or a folder of blobs that is one."""
    cache, private = tmp_path / "models--org--x", tmp_path / "home"
    snapshot = cache / "snapshots" / "c"
    private.mkdir()
    (private / "key").write_text("")
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "b").symlink_to(private / "key")
    (snapshot / "config.json").symlink_to("../../blobs/b")
    assert links.elsewhere(snapshot / "config.json", snapshot) == str(private / "key")
    shutil.rmtree(cache / "blobs")
    (cache / "blobs").symlink_to(private)
    (snapshot / "other.json").symlink_to("../../blobs/key")
    assert links.elsewhere(snapshot / "other.json", snapshot) == str(private / "key")


def test_many_links_are_counted(tmp_path: Path) -> None:
    paths = [tmp_path / "root" / f"{i:02}.distcp" for i in range(25)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(tmp_path / "elsewhere" / path.name)
    said = links.told(tmp_path / "root", paths)
    assert len(said) == 11
    assert said[-1].startswith("15 more files")
    assert os.path.join(tmp_path, "elsewhere", "09.distcp") in said[9]
