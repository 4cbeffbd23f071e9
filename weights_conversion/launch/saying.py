"""What a process says, and where: reports on stdout, sentences and logs on stderr, and nothing where neither is."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import TextIO

from weights_conversion.errors.text import escaped, masked, one_line


def open_standard_streams() -> None:
    """Opens on /dev/null whatever of stdin, stdout and stderr this process was started without.

    Else files of ours would get their numbers, and what a library prints would go into an output.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - for the life of the process


def log_to_stderr() -> None:
    """Logs of this process go to stderr, a line each; the client libraries' own are left out unless they warn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.raiseExceptions = False  # a log that nobody can read is no reason to say so there
    for name in ("httpx", "httpx2", "huggingface_hub", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)


def say(text: str) -> None:
    """Prints to stderr; where that cannot be, the exit code has to do."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(text, sys.stderr), file=sys.stderr)


def report(text: str) -> None:
    """Prints to stdout. Whoever was to read it may be gone, or its disk full: what it tells of is done all the same."""
    try:
        print(printable(text, sys.stdout), flush=True)
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def flush() -> None:
    """Flushes stdout and stderr as far as they can be written."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def printable(text: str, stream: TextIO) -> str:
    """Lines in which names from a file cannot steer a terminal, nor fail to be encoded, and no password is shown."""
    encoding = stream.encoding or "utf-8"
    shown = masked("\n".join(escaped(line) for line in text.split("\n")))
    return shown.encode(encoding, "backslashreplace").decode(encoding)


class _OneLine(logging.Formatter):
    """A record on a line of its own, whatever is in it; a warning says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        kind = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return printable(one_line(kind + super().format(record)), sys.stderr)
