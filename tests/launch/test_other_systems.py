"""Without what macOS lacks, and under the other Pythons that there are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

# Names of os and signal that CPython has on Linux and not on macOS.
LACKING = (
    "O_DIRECT", "O_TMPFILE", "O_NOATIME", "O_PATH", "sched_getaffinity", "sched_setaffinity", "posix_fadvise",
    "posix_fallocate", "fdatasync", "copy_file_range", "splice", "getxattr", "setxattr", "listxattr", "removexattr",
    "memfd_create", "pidfd_open", "eventfd", "getrandom", "POSIX_FADV_DONTNEED", "POSIX_FADV_SEQUENTIAL",
    "POSIX_FADV_WILLNEED", "POSIX_FADV_NOREUSE",
)  # fmt: skip
CHANGED = f"""
import os, posix, signal, sys
for name in {LACKING!r}:
    for module in (os, posix):
        if hasattr(module, name):
            delattr(module, name)
sys.path.insert(0, {str(REPOSITORY)!r})
import importlib
for line in {{lines!r}}:
    try:
        code = importlib.import_module(line[0]).main(line[1:])
    except SystemExit as stop:
        code = stop.code
    if code:
        sys.exit(f"{{{{line[0]}}}} ended with {{{{code}}}}")
"""


def test_what_macos_lacks(sources, tmp_path: Path) -> None:
    source, out, back = sources("llama2"), tmp_path / "out", tmp_path / "back"
    lines = [
        ["hf_to_megatron", "llama2", "--model-path", source, "--out", out, "--tensor-model-parallel-size", 2],
        ["megatron_to_hf", "--input_dir", out, "--output_dir", back, "--checksums"],
        ["megatron_to_hf", "--input_dir", out, "--output_dir", back, "--overwrite"],
        ["weights_conversion.verify", source, back],
    ]
    code = CHANGED.format(lines=[[str(word) for word in line] for line in lines])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "IDENTICAL" in done.stdout
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_every_file_is_read_by_other_pythons(version: str) -> None:
    """What needs no package: every file's syntax, and --help."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin"))
    python = shutil.which(f"python{version}", path=os.pathsep.join([*map(str, pyenv), os.environ["PATH"]]))
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"there is no Python {version} here")
    code = (
        "import ast, pathlib, sys; [ast.parse(p.read_bytes(), str(p)) for p in pathlib.Path(sys.argv[1]).rglob('*.py')]"
    )
    for folder in (REPOSITORY / "weights_conversion", REPOSITORY / "tests"):
        done = subprocess.run([python, "-c", code, folder], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for script in ("hf_to_megatron.py", "megatron_to_hf.py", "verify.py"):
        done = subprocess.run([python, REPOSITORY / script, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "exit codes:" in done.stdout


@pytest.mark.parametrize("version", ["3.6", "3.7", "3.8", "3.9"])
def test_old_pythons_are_told(version: str) -> None:
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin"))
    python = shutil.which(f"python{version}", path=os.pathsep.join([*map(str, pyenv), os.environ["PATH"]]))
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"there is no Python {version} here")
    for script in ("hf_to_megatron.py", "megatron_to_hf.py", "verify.py"):
        done = subprocess.run([python, REPOSITORY / script, "--help"], capture_output=True, text=True)
        assert done.returncode == 1
        (sentence,) = done.stderr.splitlines()
        assert sentence.startswith(f"error: {python} is Python {version}, 3.10 or newer is needed")
