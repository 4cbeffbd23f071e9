"""The first steps: what is installed, what is listed, and an environment that lacks something."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def call(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=60)


@pytest.mark.parametrize("script", ["hf_to_megatron.py", "megatron_to_hf.py", "verify.py"])
def test_scripts_by_path(script: str, tmp_path: Path) -> None:
    done = call(ROOT / script, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_the_package_lists_what_is_installed() -> None:
    done = call("-m", "weights_conversion", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    section = (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[1].split("\n[")[0]
    scripts = dict(re.findall(r'^([\w-]+) = "weights_conversion\.commands:(\w+)"$', section, re.M))
    assert len(scripts) == 5
    commands = importlib.import_module("weights_conversion.commands")
    for name, function in scripts.items():
        assert callable(getattr(commands, function))
        assert name in done.stdout or name == "weights-conversion"


def test_dependencies_are_those_of_the_requirements() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.findall(r'"([^"]+)"', text.split("dependencies = [")[1].split("]")[0])
    assert listed == (ROOT / "requirements.txt").read_text().split()


@pytest.mark.parametrize("module", ["hf_to_megatron", "megatron_to_hf", "weights_conversion.verify"])
def test_no_torch(module: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    arguments = {
        "hf_to_megatron": ["llama2", "--model-path", "a"],
        "megatron_to_hf": ["--input_dir", "a", "--output_dir", "b"],
        "weights_conversion.verify": ["a", "a"],
    }[module]
    code = f"import importlib, sys; sys.modules['torch'] = None; sys.path.insert(0, {str(ROOT)!r})\n"
    code += f"m = importlib.import_module({module!r})\n"
    done = call("-c", f"{code}sys.exit(m.main({arguments!r}))", cwd=tmp_path)
    assert done.returncode in (1, 2), done.stdout
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("error: ")
    assert sys.executable in sentence
    assert "torch" in sentence
    assert "pip install torch" in sentence


def test_an_old_python(tmp_path: Path) -> None:
    code = f"import sys; sys.version_info = (3, 9, 2, 'final', 0); sys.path.insert(0, {str(ROOT)!r})\n"
    done = call("-c", code + "import hf_to_megatron", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {sys.executable} is Python 3.9")
    assert "Traceback" not in done.stderr
