"""What a report says: what is read, first; warnings, on stderr; sizes, origins; what an interruption leaves."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from weights_conversion.errors.text import size
from weights_conversion.output.journal import Journal


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (6832720, "6.83 MB"), (76.2e9, "76.2 GB"),
     (137953316864, "138 GB"), (1.5e12, "1.50 TB")],
)  # fmt: skip
def test_sizes(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


def test_what_is_read_is_said_first(sources, to_megatron, tmp_path: Path) -> None:
    source, out = sources("llama2"), tmp_path / "out"
    done = to_megatron("llama2", "--model-path", source, "--out", out).succeeded()
    what = f"{source}: llama2, Hugging Face, 1 file, float32"
    assert done.out.splitlines()[0] == f"source      {what}"
    assert done.err.splitlines()[0] == f"reading {what}"
    assert re.fullmatch(rf"writing {out}: [\d.]+ [kM]B in 1 files?", done.err.splitlines()[1])
    assert " 0.0" not in done.out.split("done ")[0]
    again = to_megatron("llama2", "--model-path", source, "--out", out, "--dry-run", "--overwrite")
    assert "reading" not in again.err


def test_iterations_and_origins(imported, to_hf, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(imported("llama2", "--tensor-model-parallel-size", 2), root)
    for number in (400, 800):
        shutil.copytree(root / "release", root / f"iter_{number:07d}")
        for file in (root / f"iter_{number:07d}").rglob("*.pt"):
            torch.save(torch.load(file, weights_only=False) | {"iteration": number}, file)
    found = to_hf("--input_dir", root, "--output_dir", tmp_path / "hf", "--load_iters", 800, "--rope_theta", 5e5)
    first = found.succeeded().out.splitlines()[0]
    what = "llama2, Megatron-LLM, TP 2 PP 1, iteration 800 (there are 400, 800, release), float32"
    assert first == f"source      {root}: {what}"
    (values,) = [line for line in found.out.splitlines() if line.startswith("note        values")]
    assert re.search(r"values     \d+ from the args; from flags: rope_theta$", values)


def test_warnings_come_before_the_work_on_stderr(imported, to_hf, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    line = ["--input_dir", imported("llama2"), "--output_dir", tmp_path / "hf", "--json", file]
    found = to_hf(*line, "--rope_theta", 5e5).succeeded()
    lines = found.err.splitlines()
    warned = next(number for number, line in enumerate(lines) if line.startswith("warning: rope_theta"))
    assert warned < next(number for number, line in enumerate(lines) if line.startswith("reading "))
    assert "\nwarning " not in found.out
    assert any("rope_theta" in warning for warning in json.loads(file.read_text())["warnings"])


def test_an_interruption_names_what_it_leaves(sources, to_megatron, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "my out"
    line = ["llama2", "--model-path", sources("llama2"), "--out", out, "--workers", 1]
    add, calls = Journal.add, []

    def stopping(self, *arguments) -> None:
        add(self, *arguments)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stopping)
        stopped = to_megatron(*line)
    assert stopped.code == 130
    sentence = stopped.err.splitlines()[-1]
    assert sentence.startswith("interrupted: the same command continues")
    assert sentence.endswith(f"; to drop it: rm -r '{out}.partial'")
    whole, done = re.findall(r"([\d.]+ kB)", sentence)
    assert done != whole
    continued = to_megatron(*line).succeeded()
    assert "continued an interrupted run" in continued.out
    wrote = re.search(r"^done        ([\d.]+ kB) in", continued.out, re.M)[1]
    assert float(wrote.split()[0]) < float(whole.split()[0])
