"""--json FILE: the report of a conversion for job scripts, whether it succeeds or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weights_conversion import __version__
from weights_conversion.errors import ConversionError

if TYPE_CHECKING:
    from weights_conversion.engine.progress import Report


def reported(work: Callable[[], Report], file: Path | None) -> Callable[[], str]:
    """`work` as cli.run takes it; its report, or its problems, are written to `file` too, by rank 0 alone."""

    def run() -> str:
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
    text = json.dumps({"converter_version": __version__, **content}, indent=2) + "\n"
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConversionError(f"--json {file} cannot be written ({error.strerror})") from error
