"""The demo: a line for each stage and a table, a folder to keep, and a reader that goes away."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY, run


def test_lines_and_what_is_kept(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    found = run("weights_conversion.demo", "--keep", kept).succeeded()
    stages, table = found.out.split("\n\n")
    assert len(stages.splitlines()) == 5
    assert sum(line.startswith("$ python ") for line in stages.splitlines()) == 4
    assert [line.endswith("  yes") for line in table.splitlines()] == [False, *[True] * 5, False, False]
    assert sorted(path.name for path in kept.iterdir()) == [
        "hf-from-megatron-core", "hf-from-megatron-tp2-pp2", "llama2-tiny", "megatron-core", "megatron-tp2-pp2",
    ]  # fmt: skip
    run("weights_conversion.demo", "--keep", kept).refused("--keep", str(kept))


def test_a_reader_that_leaves() -> None:
    line = f"'{sys.executable}' -m weights_conversion.demo | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.stderr == ""
    assert done.stdout.splitlines()[1:] == ["0"]
