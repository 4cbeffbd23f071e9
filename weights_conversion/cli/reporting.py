"""--json FILE: the report of a conversion for job scripts, whether it succeeds or not."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weights_conversion import __version__
from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio

if TYPE_CHECKING:
    from weights_conversion.engine.report import Report


def reported(work: Callable[[], Report], file: Path | None) -> Callable[[], str]:
    """`work` as cli.run takes it; its report, or its problems, are written to `file` too, by rank 0 alone."""

    def run() -> str:
        check_json(file)
        try:
            report = work()
        except ConversionError as error:
            _write(file, {"succeeded": False, "problems": list(error.problems)})
            raise
        _write(file, {"succeeded": True, "problems": [], **report.json()})
        return report.text()

    return run


def _write(file: Path | None, content: dict[str, Any]) -> None:
    from weights_conversion.launch import distributed

    if file is None or distributed.current().rank:
        return
    write_json(file, {"converter_version": __version__, **content})


def check_json(file: Path | None) -> None:
    """Raises ConversionError where FILE is there and is no regular file."""
    if file is not None and (fileio.is_link(file) or (fileio.exists(file) and not fileio.is_file(file))):
        raise ConversionError(f"--json {file} is a link or no regular file; name a new file")


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes a new file under another name, and renames it: no link is followed, and no pipe waited for.

    Raises ConversionError where FILE is there and is no regular file, or cannot be written.
    """
    check_json(file)
    new = file.with_name(f".{file.name}.{secrets.token_hex(4)}.new")
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "w") as out:
            out.write(text)
        os.replace(new, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise ConversionError(f"--json {file} cannot be written ({error.strerror})") from error
