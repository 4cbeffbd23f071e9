"""What is seen of a proof: its progress, and the error of each layer as text and as a picture."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run
from safetensors.torch import load_file, save_file

from weights_conversion.engine import progress
from weights_conversion.verification.plot import sparkline

VERIFY = "weights_conversion.verify"


@pytest.fixture
def parted(sources, tmp_path: Path) -> tuple[Path, Path]:
    """A model, and the same with another matrix in its last layer."""
    changed = tmp_path / "changed"
    shutil.copytree(sources("llama2"), changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 3
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    return sources("llama2"), changed


class Stream(io.TextIOWrapper):
    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "▁ layers ▁▁█▆ end ▃ "), ("ascii", ". layers ..#* end : ")])
def test_sparkline(encoding: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Stream(encoding))
    text = sparkline([0.0, 1e-6, 1e-5, 1e30, 0.03, 0.0005])
    assert shown.replace(": ", "- ") in text or shown in text
    assert "layers 0 to 3" in text


def test_the_layer_where_the_sides_part_is_seen(parted, tmp_path: Path) -> None:
    file = tmp_path / "proof.json"
    found = run(VERIFY, *parted, "--json", file)
    assert found.code == 1
    (line,) = [line for line in found.out.splitlines() if line.startswith("errors ")]
    layers = line.split("layers ")[1].split(" ")[0]
    assert layers[0] in "▁."
    assert layers[1] not in "▁."
    errors = json.loads(file.read_text())["numeric"]["errors"]
    assert len(errors) == 4
    assert errors[:2] == [0.0, 0.0]
    assert errors[2] > 0.01
    same = run(VERIFY, parted[0], parted[0]).succeeded()
    assert "errors " not in same.out


def test_a_picture(parted, tmp_path: Path) -> None:
    file = tmp_path / "layers.png"
    found = run(VERIFY, *parted, "--plot", file)
    if importlib.util.find_spec("matplotlib") is None:
        assert (found.code, found.out) == (2, "")
        assert "pip install matplotlib" in found.err
        return
    assert found.code == 1, found.text
    assert file.read_bytes().startswith(b"\x89PNG")
    run(VERIFY, *parted, "--plot", tmp_path / "layers.txt").refused(".png", code=2)


def test_progress_lines_in_a_log(sources, imported, to_hf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    found = run(VERIFY, sources("llama2"), sources("llama2"))
    assert "running both models: 4 of 4 steps, 0 s left" in found.err
    assert "comparing weights: " not in found.err  # beside the forward pass, which is at most a layer behind
    alone = run(VERIFY, sources("llama2"), sources("llama2"), "--exact-only")
    assert "comparing weights: " in alone.err
    done = to_hf("--input_dir", imported("llama2"), "--output_dir", tmp_path / "hf", "--verify").succeeded()
    assert [kind in done.err for kind in ("converting: ", "running both models: ")] == [True] * 2
    assert "0.00 GB/s" not in done.text + found.text + alone.text


def test_a_bar_on_a_terminal(sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: True)))
    found = run(VERIFY, sources("llama2"), sources("llama2")).succeeded()
    assert "running both models: 100%" in found.err
    found = run(VERIFY, sources("llama2"), sources("llama2"), "--exact-only").succeeded()
    assert "comparing weights: 100%" in found.err
