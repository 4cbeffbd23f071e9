"""A control group that limits the memory of what runs in it, page cache included (Linux, root)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


def _kind() -> tuple[Path, str]:
    """Where groups are made, and the name of the limit in them."""
    if (_V1 / "memory.limit_in_bytes").is_file():
        return _V1, "memory.limit_in_bytes"
    return _V2, "memory.max"


def problem() -> str | None:
    """Why no group can be made here; None where one can."""
    try:
        with limit(1 << 30):
            return None
    except OSError as error:
        return f"no control group with a limit of memory can be made here ({error.strerror})"


@contextlib.contextmanager
def limit(nbytes: int | None) -> Iterator[Sequence[str]]:
    """What to put in front of a command so that it runs in a group of `nbytes`; nothing of it stays."""
    if nbytes is None:
        yield ()
        return
    base, name = _kind()
    folder = base / f"weights-conversion-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / name).write_text(str(nbytes))
        yield ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(folder / "cgroup.procs"))
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """An ended process may be counted for a moment yet."""
    for _ in range(50):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)
