"""Tries in a process of its own what another library may not survive: a broken table of characters aborts it."""

from __future__ import annotations

import subprocess
import sys

from weights_conversion.errors import ConversionError

_SECONDS = 120.0
_TRY = """
import sys
sys.path[:] = sys.argv[1:]
from tokenizers import Tokenizer
Tokenizer.from_str(sys.stdin.buffer.read().decode()).encode("a \\u00e9\\uff21\\u3000 b")
"""


def check_survives(text: str) -> None:
    """Raises ConversionError where loading a tokenizer.json's `text` ends the process that does it."""
    line = [sys.executable, "-c", _TRY, *sys.path]
    try:
        done = subprocess.run(line, input=text.encode(), capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ConversionError("the tokenizer.json takes too long to load; name another --vocab_file") from error
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        why = said[-1] if said else f"signal {-done.returncode}"
        raise ConversionError(f"the tokenizer.json cannot be loaded ({why}); name another --vocab_file")
