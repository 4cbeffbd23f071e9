"""Shared fixtures: the golden cases, and both scripts called in this process as a user would call them."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers or huggingface_hub is imported by anyone
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell's background has it; tests send it to their children
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path.insert(0, str(REPOSITORY))

import tiny_models as tm  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@dataclass(frozen=True)
class Result:
    """What a user sees of one run."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    def succeeded(self) -> Result:
        assert self.code == 0, f"exit {self.code}\n{self.text}"
        return self

    def refused(self, *words: str, code: int = 1) -> Result:
        """Exit 1 (or `code`: verify's trouble is 2) and sentences on stderr, which hold every one of `words`."""
        assert self.code == code, f"exit {self.code}, expected {code}\n{self.text}"
        assert self.err.strip(), "nothing on stderr"
        assert "Traceback" not in self.text, self.text
        for word in words:
            assert word.lower() in self.err.lower(), f"{word!r} is not in: {self.err}"
        return self


Script = Callable[..., Result]


def run(script: str, *arguments: Any) -> Result:
    """One run of a script's `main`, with the logging of a fresh process."""
    main = importlib.import_module(script).main
    root = logging.getLogger()
    before = root.handlers[:], root.level
    root.handlers.clear()
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main([str(argument) for argument in arguments])
            except SystemExit as stop:
                code = stop.code
    finally:
        root.handlers[:], level = before
        root.setLevel(level)
    return Result(0 if code is None else int(code), out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def to_megatron() -> Script:
    """hf_to_megatron.py: call with its arguments."""
    return lambda *arguments: run("hf_to_megatron", *arguments)


@pytest.fixture(scope="session")
def to_hf() -> Script:
    """megatron_to_hf.py: call with its arguments."""
    return lambda *arguments: run("megatron_to_hf", *arguments)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Hugging Face folders of the tiny models by name, written once."""
    root = tmp_path_factory.mktemp("sources")

    def source(name: str) -> Path:
        folder = root / name
        return folder if folder.exists() else tm.write_huggingface(folder, tm.MODELS[name])

    return source


@pytest.fixture(scope="session")
def imported(
    tmp_path_factory: pytest.TempPathFactory, to_megatron: Script, sources: Callable[[str], Path]
) -> Callable[..., Path]:
    """Megatron checkpoints of the tiny models, converted once for each set of options. Not to be changed by a test."""
    root = tmp_path_factory.mktemp("imported")
    done: dict[tuple[str, ...], Path] = {}

    def convert(name: str, *options: Any) -> Path:
        key = (name, *map(str, options))
        if key not in done:
            out = root / f"{name}-{len(done)}"
            to_megatron(tm.MODELS[name].family, "--model-path", sources(name), "--out", out, *options).succeeded()
            done[key] = out
        return done[key]

    return convert


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Token ids below every tiny model's vocabulary, far enough apart in position for rotary angles to matter."""
    return torch.arange(1, 250, 6)


@pytest.fixture
def place(sources: Callable[[str], Path], imported: Callable[..., Path]) -> Iterator[Any]:
    """A folder that two users share (neighbours.Place); needs root."""
    from neighbours import MODEL, Place

    top = Path(tempfile.mkdtemp())
    top.chmod(0o755)
    try:
        yield Place(top, sources(MODEL), imported(MODEL))
    finally:
        shutil.rmtree(top)
