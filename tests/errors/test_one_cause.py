"""One cause is one line: many files or layers of the same fault, and a folder that is taken for something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tiny_models as tm

from weights_conversion.errors import ConversionError


def test_files_of_all_ranks(imported, to_hf, tmp_path: Path) -> None:
    layout = ("--tensor-model-parallel-size", 4, "--pipeline-model-parallel-size", 2)
    shutil.copytree(imported("llama2", *layout), tmp_path / "run")
    (tmp_path / "run" / "release").rename(tmp_path / "run" / "iter_0000800")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("800")
    found = to_hf("--input_dir", tmp_path / "run", "--output_dir", tmp_path / "hf").refused("is of iteration release")
    (line,) = found.err.splitlines()
    assert "and 7 more like it; the last: " in line
    assert "mp_rank_03_001" in line


def test_few_problems_are_all_told() -> None:
    assert str(ConversionError("file 1 is bad", "file 2 is bad")) == "2 problems:\n  - file 1 is bad\n  - file 2 is bad"
    many = ConversionError(*(f"file {number} is bad" for number in range(32)), "another thing")
    assert str(many).splitlines() == [
        "33 problems:", "  - file 0 is bad (and 31 more like it; the last: file 31 is bad)", "  - another thing",
    ]  # fmt: skip
    assert len(many.problems) == 33


def test_layers_that_are_not_there(sources, to_megatron, tmp_path: Path) -> None:
    shutil.copytree(sources("llama2"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for layers, words in ((5, "(and 26 more, of layers 2 to 4)"), (1, "(and 8 more, of layer 1)")):
        tm.write_json(tmp_path / "model" / "config.json", config | {"num_hidden_layers": layers})
        found = to_megatron("llama2", "--model-path", tmp_path / "model", "--out", tmp_path / "out").refused(words)
        assert len([line for line in found.err.splitlines() if "model.layers" in line]) == 1


def test_a_mistyped_folder_of_metas(to_megatron, tmp_path: Path) -> None:
    (tmp_path / "llama-2-7").mkdir()
    (tmp_path / "llama-2-7" / "consolidated.00.pt").touch()
    line = ["llama2", "--cache-dir", tmp_path / "llama-2-7", "--out", tmp_path / "out"]
    to_megatron(*line).refused("warning: --cache-dir", "consolidated.00.pth", "hub's cache")
