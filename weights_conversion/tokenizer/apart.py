"""sentencepiece and tokenizers, each asked in a process of its own.

They are written in C++ and Rust, and a file that is broken, or made to break them, may abort the process that gives it
to them: that must not be the one that converts.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from weights_conversion.errors import ConversionError

_SECONDS = 120.0
_PROBE = "a \u00e9\uff21\u3000 b"  # a broken table of characters aborts only where it is used
# Reads a line of JSON and the file's bytes from stdin; answers in JSON, apart from what the libraries print. Nothing is
# imported before the path is this process's own: with -c it begins in the current folder, where others may have files.
_ASK = """
import sys
sys.path[:] = sys.argv[1:]
import json, os
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except (ImportError, OSError, ValueError):
    pass
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
asked = json.loads(sys.stdin.buffer.readline())
content = sys.stdin.buffer.read()
said = {}
try:
    if asked["what"] == "sentencepiece":
        from sentencepiece import SentencePieceProcessor
        model = SentencePieceProcessor()
        model.LoadFromSerializedProto(content)
        special = {name: getattr(model, name + "_id")() for name in ("bos", "eos", "pad", "unk")}
        said["pieces"] = [model.id_to_piece(i) for i in range(len(model))]
        said["special"] = {name: model.id_to_piece(i) if i >= 0 else None for name, i in special.items()}
        said["ids"] = None if asked["text"] is None else model.encode(asked["text"])
    else:
        from tokenizers import Tokenizer
        model = Tokenizer.from_str(content.decode())
        if asked["probe"]:
            model.encode(asked["probe"])
        said["ids"] = None if asked["text"] is None else model.encode(asked["text"], add_special_tokens=False).ids
        said["vocab"] = model.get_vocab(with_added_tokens=True)
except BaseException as error:
    said = {"error": f"{type(error).__name__}: {error}"}
json.dump(said, answer)
answer.close()
os._exit(0)
"""


@functools.lru_cache(maxsize=2)
def sentencepiece(content: bytes, text: str | None = None) -> dict[str, Any]:
    """Of a tokenizer.model's bytes: `pieces`, `special` (bos, eos, pad, unk: a piece or None), and the `ids` of `text`.

    Raises ConversionError with what the library says, or how it ended.
    """
    return _ask({"what": "sentencepiece", "text": text}, content)


def tokenizers(content: str, text: str | None = None) -> dict[str, Any]:
    """Of a tokenizer.json: its `vocab` (token to id, added ones too), and the `ids` of `text`, as `sentencepiece`."""
    probe = _PROBE if '"precompiled_charsmap"' in content else None
    return _ask({"what": "tokenizers", "text": text, "probe": probe}, content.encode())


def _ask(asked: dict[str, Any], content: bytes) -> dict[str, Any]:
    given = json.dumps(asked).encode() + b"\n" + content
    try:
        done = _started(given)
    except subprocess.TimeoutExpired as error:
        raise ConversionError(f"{asked['what']} takes more than {_SECONDS:g} s") from error
    except OSError as error:
        raise ConversionError(f"no process can be started for {asked['what']} ({error.strerror})") from error
    try:
        said = json.loads(done.stdout)
    except ValueError as error:
        raise ConversionError(f"{asked['what']} {_end(done)}") from error
    if "error" in said:
        raise ConversionError(said["error"])
    return said


def _started(given: bytes) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            [sys.executable, "-c", _ASK, *sys.path], input=given, capture_output=True, timeout=_SECONDS, check=False,
            start_new_session=True,
        )  # fmt: skip
    except (PermissionError, FileNotFoundError):  # an interpreter that this user may not start, or that is embedded
        return _forked(given)


def _forked(given: bytes) -> subprocess.CompletedProcess[bytes]:
    """The same in a copy of this process, which needs no interpreter's file."""
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as told:
        asked.write(given)
        asked.seek(0)
        child = os.fork()
        if not child:
            try:
                for number, file in enumerate((asked, answer, told)):
                    os.dup2(file.fileno(), number)
                sys.stdin = os.fdopen(0, closefd=False)
                sys.argv = ["-c", *sys.path]
                faulthandler.disable()  # it may write elsewhere
                exec(_ASK, {})
            finally:
                os._exit(1)
        deadline = time.monotonic() + _SECONDS
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise subprocess.TimeoutExpired(_ASK, _SECONDS)
            time.sleep(0.01)
        answer.seek(0)
        told.seek(0)
        return subprocess.CompletedProcess([], os.waitstatus_to_exitcode(status), answer.read(), told.read())


def _end(done: subprocess.CompletedProcess[bytes]) -> str:
    """How the process ended that has not answered, and the last that it said."""
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    how = f"ended with code {done.returncode}"
    if done.returncode < 0:
        try:
            how = f"was ended by {signal.Signals(-done.returncode).name}"
        except ValueError:
            how = f"was ended by signal {-done.returncode}"
    return f"{how}: {lines[-1]}" if lines else how
