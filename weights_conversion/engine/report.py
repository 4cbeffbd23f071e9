"""What a run was to do and has done, for people and for --json."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weights_conversion.engine import memory
from weights_conversion.errors.text import one_line, rate, size

logger = logging.getLogger(__name__)


def _files(files: list[str]) -> str:
    return f"{len(files)} file{'s' * (len(files) > 1)}"


@dataclass
class Report:
    """What was done, for people: collected on the way and printed at the end."""

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    training_flags: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    proof: list[str] = field(default_factory=list)
    out: Path | None = None
    nbytes: int = 0
    files: list[str] = field(default_factory=list)
    seconds: float | None = None  # of the writing; None where nothing was written
    was_complete: bool = False
    source: str = ""
    _said: int = 0  # warnings that have been said already
    _plan: list[str] = field(default_factory=list)
    _done: list[str] = field(default_factory=list)

    def reads(self, path: Path, what: str, dtype: object, where: str = "") -> None:
        """What is read: a folder, what it is (family, kind, layout), its type, and the repository that it is of."""
        self.source = f"{path}: {what}, {str(dtype).removeprefix('torch.')}{where}"

    def begin(self) -> None:
        """Says what is read and written, before the work."""
        logger.info("reading %s", self.source)
        logger.info("writing %s: %s in %s", self.out, size(self.nbytes), _files(self.files))

    def warn(self) -> None:
        """Says the warnings that there are by now, on stderr; the report leaves them out then."""
        for warning in self.warnings[self._said :]:
            logger.warning("%s", warning)
        self._said = len(self.warnings)

    def planned(self, out: Path, nbytes: int, free: int, files: list[str], peak: int) -> None:
        """What a dry run shows; `free` is the disk's space and `peak` the estimated peak, in bytes."""
        self.out, self.nbytes, self.files = out, nbytes, files
        shown = files if len(files) <= 8 else [*files[:4], f"... {len(files) - 5} more ...", files[-1]]
        self._plan = [
            f"output      {out}: {size(nbytes)} in {_files(files)}",
            *(f"            {name}" for name in shown),
            f"disk        {size(nbytes)} needed, {size(free)} free",
            f"memory      about {peak / 1e9:.1f} GB at the peak",
        ]

    def replaced(self, files: list[str]) -> None:
        """What of an earlier output goes."""
        self.notes += [f"--overwrite replaces {name}" for name in files]

    def complete(self, out: Path) -> None:
        """Nothing was to be done."""
        self.was_complete = True
        self._done = [f"done        {out} is already complete: the same command has written it"]

    def finished(self, nbytes: int, seconds: float) -> None:
        """`nbytes` were written by this run, which may have continued another."""
        self.seconds = seconds
        shown = rate(nbytes / max(seconds, 1e-9))
        self._done = [f"done        {size(nbytes)} in {seconds:.1f} s, {shown}, peak memory {size(memory.peak())}"]

    def json(self) -> dict[str, Any]:
        """For --json; these keys stay."""
        return {
            "source": self.source,
            "output": str(self.out),
            "bytes": self.nbytes,
            "files": self.files,
            "already_complete": self.was_complete,
            "seconds": self.seconds,
            "notes": self.notes,
            "warnings": self.warnings,
            "training_flags": self.training_flags,
            "ignored": self.ignored,
            "proof": self.proof,
        }

    def text(self) -> str:
        lines = [*([f"source      {self.source}"] if self.source else []), *self._plan]
        if self.ignored:
            more = f" and {len(self.ignored) - 1} more tensors" if len(self.ignored) > 1 else ""
            lines.append(f"ignored     {self.ignored[0]}{more}, which hold no parameters")
        lines += [f"note        {note}" for note in self.notes]
        lines += [f"warning     {warning}" for warning in self.warnings[self._said :]]
        if self.training_flags:
            lines.append(f"train with  {' '.join(self.training_flags)}")
        return "\n".join(one_line(line) for line in [*lines, *self._done, *self.proof])
