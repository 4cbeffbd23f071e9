"""Libraries of other languages that break on a file end themselves, and never the conversion."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Script

from weights_conversion.errors import ConversionError
from weights_conversion.tokenizer import apart

BREAKS = {
    "abort": ("import os; os.abort()", "SIGABRT"),
    "segfault": ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    "memory": ("raise MemoryError('too large')", "too large"),
    "panic": (
        "class PanicException(BaseException): pass\nraise PanicException('range end index 4 out of range')",
        "out of range",
    ),
    "leaves": ("import os; os._exit(0)", "code 0"),
    "hang": ("import time; time.sleep(60)", "takes more than"),
}


def broken(library: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process that imports the library finds one in its place that breaks so."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / f"{library}.py").write_text(BREAKS[how][0])
    monkeypatch.syspath_prepend(str(tmp_path / "broken"))
    monkeypatch.setattr(apart, "_SECONDS", 3.0)
    apart.sentencepiece.cache_clear()


@pytest.mark.parametrize("interpreter", [sys.executable, "/nonexistent/python"], ids=["started", "forked"])
@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("library", ["sentencepiece", "tokenizers"])
def test_an_export_ends_in_a_sentence(
    interpreter: str, library: str, how: str, imported, tmp_path: Path, to_hf: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("--input_dir", imported("llama2-gqa"), "--output_dir", tmp_path / "back")
    broken(library, how, tmp_path, monkeypatch)
    if interpreter != sys.executable:
        monkeypatch.setattr(sys, "executable", interpreter)
        monkeypatch.setitem(sys.modules, library, None)
        monkeypatch.delitem(sys.modules, library)
    to_hf(*line).refused(BREAKS[how][1], "--vocab_file")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["json", "os", "resource", "sentencepiece", "google", "sitecustomize"])
def test_nothing_is_imported_from_the_current_folder(
    name: str, imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be /scratch, where another user has left a module of that name."""
    (tmp_path / f"{name}.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    apart.sentencepiece.cache_clear()
    apart.sentencepiece((imported("llama2-gqa") / "tokenizer.model").read_bytes())
    assert not (tmp_path / "ran").exists()


def test_without_an_interpreter_that_may_be_started(
    imported, tmp_path: Path, to_hf: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in another user's home, say: a copy of the process does the same."""
    line = ("--input_dir", imported("llama2-gqa"), "--output_dir")
    to_hf(*line, tmp_path / "one").succeeded()
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    apart.sentencepiece.cache_clear()
    to_hf(*line, tmp_path / "two").succeeded()
    one, two = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two"))
    assert one == two


def test_what_a_library_prints_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sentencepiece.py").write_text(
        "import os\nos.write(1, b'loading')\nprint('{}')\nraise RuntimeError('no model')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    apart.sentencepiece.cache_clear()
    with pytest.raises(ConversionError, match="no model"):
        apart.sentencepiece(b"")


def test_no_such_library_is_loaded_by_the_process_that_converts(imported, tmp_path: Path) -> None:
    """An export that reads tokenizer.model and builds tokenizer.json from it."""
    program = (
        "import sys; sys.argv = ['megatron_to_hf.py', *sys.argv[1:]]\n"
        "from weights_conversion import cli\n"
        "from weights_conversion.verbs.to_hf import ExportOptions, megatron_to_hf\n"
        "from pathlib import Path\n"
        "megatron_to_hf(ExportOptions(input_dir=Path(sys.argv[1]), output_dir=Path(sys.argv[2])))\n"
        "sys.exit(' '.join({'sentencepiece', 'tokenizers'} & set(sys.modules)) or None)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(imported("llama2-gqa")), str(tmp_path / "out")],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("content", [b"", b"\x0a\xff\xff\xff\xff\x0f", b"not a model", bytes(100)])
def test_what_is_no_model_is_a_sentence(content: bytes) -> None:
    with pytest.raises(ConversionError):
        apart.sentencepiece(content)
