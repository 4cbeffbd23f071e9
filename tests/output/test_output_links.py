"""Links around OUT: a parent that is one, and --json at one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run

LAYOUTS = (["--target", "megatron-llm"], ["--target", "megatron-core"])


@pytest.mark.parametrize("options", LAYOUTS, ids=["rank files", "torch_dist"])
def test_parent_that_is_a_link(options: list[str], sources, to_megatron, to_hf, tmp_path: Path) -> None:
    """/scratch is a link on many a cluster: the output is there, whole, and nothing is left beside it."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    to_megatron("llama2", "--model-path", sources("llama2"), "--out", tmp_path / "link/m", *options).succeeded()
    arguments = ("--input_dir", tmp_path / "link/m", "--output_dir", tmp_path / "link/hf", "--no_tokenizer")
    to_hf(*arguments).succeeded()
    assert sorted(os.listdir(tmp_path / "real")) == ["hf", "m"]
    assert "already complete" in to_hf(*arguments).succeeded().text


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("command", ["conversion", "verify"])
def test_json_at_what_another_has_put_there(kind: str, command: str, sources, to_megatron, tmp_path: Path) -> None:
    private, there = tmp_path / "private", tmp_path / "report.json"
    private.write_text("mine")
    if kind == "link":
        there.symlink_to(private)
    else:
        os.mkfifo(there)
    if command == "conversion":
        arguments = ("llama2", "--model-path", sources("llama2"), "--out", tmp_path / "m", "--json", there)
        to_megatron(*arguments).refused("--json")
        assert not (tmp_path / "m").exists()
    else:
        assert run("weights_conversion.verify", sources("llama2"), sources("llama2"), "--json", there).code == 2
    assert private.read_text() == "mine"


@pytest.mark.parametrize("options", LAYOUTS, ids=["rank files", "torch_dist"])
def test_a_digest_is_the_same_in_every_process(options: list[str], sources, tmp_path: Path) -> None:
    """Or no requeued job would know what it has written: sets have another order in each process."""
    line = [sys.executable, "hf_to_megatron.py", "llama2", "--model-path", str(sources("llama2"))]
    for seed in "123":
        done = subprocess.run(
            [*line, "--out", str(tmp_path / "m"), *options], cwd=Path(__file__).parents[2], text=True,
            env=os.environ | {"PYTHONHASHSEED": seed}, check=False, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "already complete" in done.stdout
