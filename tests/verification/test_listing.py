"""A listing of checksums that cannot be read is trouble: it does not switch the check off."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import run

KINDS = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "link that leads nowhere": lambda path: os.symlink("/nowhere/at/all", path),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_regular_file(kind: str, sources, tmp_path: Path, to_megatron) -> None:
    source, out = sources("llama2-gqa"), tmp_path / "out"
    to_megatron("llama2", "--model-path", source, "--out", out, "--checksums").succeeded()
    (out / "checksums.sha256").unlink()
    KINDS[kind](out / "checksums.sha256")
    result = run("weights_conversion.verify", source, out, "--exact-only")
    assert result.code == 2
    assert "checksums.sha256" in result.err
    assert "IDENTICAL" not in result.out
