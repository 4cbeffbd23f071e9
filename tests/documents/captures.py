"""What the commands print, as docs/captures keeps it: on terminals of 80 and 120 columns, and in a job's log.

`python tests/documents/captures.py` writes docs/captures anew, from tiny models.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "captures"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import tiny_models as tm  # noqa: E402

MODELS = {"models/Llama-2-7b-hf": "captured", "models/another": "another"}
LAYOUT = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
IMPORT = "python hf_to_megatron.py llama2 --model-path models/Llama-2-7b-hf"
COMMANDS = {
    "dry run": f"{IMPORT} --out checkpoints/llama2-7b {LAYOUT} --true-vocab-size 327 --dry-run",
    "import": f"{IMPORT} --out checkpoints/llama2-7b {LAYOUT} --true-vocab-size 327",
    "the same again": f"{IMPORT} --out checkpoints/llama2-7b {LAYOUT} --true-vocab-size 327",
    "export": "python megatron_to_hf.py --input_dir checkpoints/llama2-7b --output_dir models/exported --verify",
    "verify": "python verify.py models/Llama-2-7b-hf checkpoints/llama2-7b",
    "verify, different": "python verify.py models/Llama-2-7b-hf models/another",
    "an error": f"{IMPORT} --out checkpoints/tp3 --tensor-model-parallel-size 3",
    "a mistyped option": f"{IMPORT} --tp 2",
    "an interruption (Ctrl-C)": f"{IMPORT} --out checkpoints/interrupted",
    "the same command continues": f"{IMPORT} --out checkpoints/interrupted",
}
FILES = {"terminal-80.txt": 80, "terminal-120.txt": 120, "job-log.txt": None}


def write_models(folder: Path) -> None:
    for place, name in MODELS.items():
        model = tm.Tiny(name, "llama2", layers=4, heads=8, groups=4, head_dim=8)
        tensors = tm.Tiny("captured", "llama2", layers=4, heads=8, groups=4, head_dim=8).tensors()
        if name == "another":
            tensors = tensors | {"model.layers.2.mlp.up_proj.weight": tensors["model.layers.2.mlp.up_proj.weight"] * 2}
        tm.write_huggingface(folder / place, model, tensors=tensors)


def captured(columns: int | None) -> str:
    """All commands, one after the other, in the current folder; `columns` None: a log."""
    shown = [f"# {title}\n$ {command}\n{_run(title, command, columns)}" for title, command in COMMANDS.items()]
    return "\n".join(shown)


def _run(title: str, command: str, columns: int | None) -> str:
    words = command.split()[1:]
    module = {"verify.py": "weights_conversion.verify"}.get(words[0], words[0].removesuffix(".py"))
    screen = io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:], root.level
    root.handlers.clear()
    try:
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen), _as_on(columns), _stopped(title):
            try:
                code: Any = importlib.import_module(module).main(words[1:])
            except SystemExit as stop:
                code = stop.code
    finally:
        root.handlers[:], level = before
        root.setLevel(level)
    lines = [line for line in (_visible(line) for line in screen.getvalue().split("\n")) if line]
    lines = _last_of_progress(lines)
    width = columns or 10**6
    rows = [line[start : start + width] for line in lines for start in range(0, len(line), width)]
    return "\n".join([*(row.rstrip() for row in rows), f"(exit code {code})", ""])


@contextlib.contextmanager
def _as_on(columns: int | None) -> Iterator[None]:
    from weights_conversion.engine import progress

    terminal = SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: columns is not None))
    size = {"COLUMNS": str(columns or 80), "LINES": "24"}
    with (
        mock.patch.object(progress, "sys", terminal), mock.patch.object(progress, "LOG_SECONDS", 0.0),
        mock.patch.dict(os.environ, size),
    ):  # fmt: skip
        yield


@contextlib.contextmanager
def _stopped(title: str) -> Iterator[None]:
    """An interruption in the midst of the work, where the title asks for one."""
    from weights_conversion.output.journal import Journal

    add, calls = Journal.add, []

    def stopping(self: Journal, *arguments: Any) -> None:
        add(self, *arguments)
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    with mock.patch.object(Journal, "add", stopping if "interruption" in title else add):
        yield


def _visible(line: str) -> str:
    """What is left of a line that a bar has written again and again."""
    return [part for part in line.split("\r") if part][-1] if line.strip("\r") else ""


def _last_of_progress(lines: list[str]) -> list[str]:
    kept: list[str] = []
    for line in lines:
        kind = re.match(r"(converting|comparing weights|running both models): ", line)
        if kind and kept and kept[-1].startswith(kind[0]):
            kept.pop()
        kept.append(line)
    return kept


def masked(text: str) -> str:
    """The text without its line breaks and spaces, and with every number, unit and bar masked."""
    text = re.sub(r"\s", "", text)
    text = re.sub(r"(converting|comparingweights|runningbothmodels):[^\]$]*?(\]|sleft)", r"\1:#", text)
    text = re.sub(r"\d[\d.,]*(e[+-]?\d+)?", "#", text)
    return re.sub(r"#(bytes|[kMGT]?B)", "#", text)


def fresh(columns: int | None) -> str:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        os.chdir(folder)
        try:
            return captured(columns)
        finally:
            os.chdir(before)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for name, columns in FILES.items():
        (FOLDER / name).write_text(fresh(columns), encoding="utf-8")
