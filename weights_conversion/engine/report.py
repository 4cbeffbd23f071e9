"""What a run was to do and has done, for people and for --json."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weights_conversion.engine import memory
from weights_conversion.text import one_line


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
    _plan: list[str] = field(default_factory=list)
    _done: list[str] = field(default_factory=list)

    def planned(self, out: Path, nbytes: int, free: int, files: list[str], peak: int) -> None:
        """What a dry run shows; `free` is the disk's space and `peak` the estimated peak, in bytes."""
        self.out, self.nbytes, self.files = out, nbytes, files
        shown = files if len(files) <= 8 else [*files[:4], f"... {len(files) - 5} more ...", files[-1]]
        self._plan = [
            f"output      {out}: {nbytes / 1e9:.3f} GB in {len(files)} file{'s' * (len(files) > 1)}",
            *(f"            {name}" for name in shown),
            f"disk        {nbytes / 1e9:.3f} GB needed, {free / 1e9:.3f} GB free",
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
        self.seconds = seconds
        rate = nbytes / max(seconds, 1e-9) / 1e9
        self._done = [
            f"done        {nbytes / 1e9:.3f} GB in {seconds:.1f} s, {rate:.2f} GB/s, "
            f"peak memory {memory.peak() / 1e9:.2f} GB"
        ]

    def json(self) -> dict[str, Any]:
        """For --json; these keys stay."""
        return {
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
        lines = [*self._plan]
        if self.ignored:
            more = f" and {len(self.ignored) - 1} more tensors" if len(self.ignored) > 1 else ""
            lines.append(f"ignored     {self.ignored[0]}{more}, which hold no parameters")
        lines += [f"note        {note}" for note in self.notes]
        lines += [f"warning     {warning}" for warning in self.warnings]
        if self.training_flags:
            lines.append(f"train with  {' '.join(self.training_flags)}")
        return "\n".join(one_line(line) for line in [*lines, *self._done, *self.proof])
