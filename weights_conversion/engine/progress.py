"""What a user sees of a run: a bar in bytes, or a line now and then in a job log, and the closing report."""

from __future__ import annotations

import logging
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weights_conversion.text import one_line

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0


@contextmanager
def bar(total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yields a function that counts written bytes: a tqdm bar on a terminal, else a log line every LOG_SECONDS."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        shown = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc="converting")

        def show(count: int) -> None:
            with suppress(OSError, ValueError):  # the terminal may be gone; the work goes on
                shown.update(count)

        try:
            yield show
        finally:
            with suppress(OSError, ValueError):
                shown.close()
        return
    lock, state = threading.Lock(), {"bytes": done, "said": time.monotonic()}
    started = time.monotonic()

    def advance(count: int) -> None:
        with lock:
            state["bytes"] += count
            now = time.monotonic()
            if now - state["said"] < LOG_SECONDS:
                return
            state["said"] = now
            rate = max(state["bytes"] - done, 1) / (now - started)
            left = (total - state["bytes"]) / rate
            logger.info("%.1f of %.1f GB, %.2f GB/s, %.0f s left", state["bytes"] / 1e9, total / 1e9, rate / 1e9, left)

    yield advance


def peak_memory() -> int:
    """The most memory that this process has had resident, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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

    def planned(self, out: Path, nbytes: int, free: int, files: list[str], memory: int) -> None:
        """What a dry run shows; `free` is the disk's space and `memory` the estimated peak, in bytes."""
        self.out, self.nbytes, self.files = out, nbytes, files
        shown = files if len(files) <= 8 else [*files[:4], f"... {len(files) - 5} more ...", files[-1]]
        self._plan = [
            f"output      {out}: {nbytes / 1e9:.3f} GB in {len(files)} file{'s' * (len(files) > 1)}",
            *(f"            {name}" for name in shown),
            f"disk        {nbytes / 1e9:.3f} GB needed, {free / 1e9:.3f} GB free",
            f"memory      about {memory / 1e9:.1f} GB at the peak",
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
            f"peak memory {peak_memory() / 1e9:.2f} GB"
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
