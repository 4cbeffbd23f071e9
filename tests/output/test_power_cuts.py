"""The model of power cuts finds what was not synced, and nothing in what a conversion does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from tests.robustness import faults
from tests.robustness.powercut import Record

NEW = b"new" * 2000


def record(place: Path, *steps: str) -> Record:
    """Of a program that replaces `file` (with "old" in it) by way of `file.new`; `steps` are what it does."""
    (place / "file").write_text("old")
    made = Record(place)
    top = place.stat().st_ino
    operations = {
        "create": ("O", 0, 7, 0o644, 0, "file.new", "", b""),
        "write": ("W", 0, 7, 0, len(NEW), "file.new", "", NEW),
        "sync": ("S", 0, 7, 0, 0, "file.new", "", b""),
        "rename": ("R", 0, 0, 0, 0, "file.new", "file", b""),
        "sync folder": ("S", 0, top, 0, 0, "", "", b""),
    }
    for step in steps:
        op, flags, inode, offset, length, one, two, data = operations[step]
        first, second = (f"{place}/{name}".rstrip("/") if name or op == "S" else "" for name in (one, two))
        made._add(op, flags, inode, offset, length, first, second, data)
    return made


def contents(made: Record) -> set[bytes]:
    """What `file` may hold after a cut, in classes."""
    found = {state.files["file"][0] for _, state in made.states()}
    return {data if data in (b"old", NEW) else b"neither" for data in found}


def test_a_rename_before_the_bytes_are_synced(tmp_path: Path) -> None:
    assert contents(record(tmp_path, "create", "write", "rename", "sync folder")) == {b"old", NEW, b"neither"}


def test_a_rename_after_the_bytes_are_synced(tmp_path: Path) -> None:
    assert contents(record(tmp_path, "create", "write", "sync", "rename")) == {b"old", NEW}


def test_a_rename_is_durable_once_its_folder_is_synced(tmp_path: Path) -> None:
    made = record(tmp_path, "create", "write", "sync", "rename", "sync folder")
    after = {state.files["file"][0] for where, state in made.states() if where.startswith("5 operations")}
    before = {state.files["file"][0] for where, state in made.states() if where.startswith("4 operations")}
    assert (before, after) == ({b"old", NEW}, {NEW})


@pytest.mark.skipif(faults.lacking() is not None, reason=str(faults.lacking()))
@pytest.mark.parametrize("syncs", [True, False])
def test_cuts_of_a_conversion(syncs: bool) -> None:
    """Nothing is found, and something is where nothing is synced."""
    line = [sys.executable, "-m", "tests.robustness", "--power-cuts", "4", "--case", "export torch_dist --overwrite"]
    line += [] if syncs else ["--without-sync"]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, env=os.environ)
    assert done.returncode == (0 if syncs else 1), done.stdout + done.stderr
    assert ("; 0 wrong ends" in done.stdout.splitlines()[-1]) == syncs
    assert syncs or "OUT is neither whole nor what it was" in done.stderr
