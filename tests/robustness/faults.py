"""The library of `faults.c` from Python: built by the system's compiler, loaded by LD_PRELOAD, armed in a fork."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")
_VARIABLE = "ROBUSTNESS_FAULTS"  # the library's path, in a process that has it loaded

# In the order of `enum kind`. "changing" are all calls that change what is on the disk, "any" are all calls.
KINDS = (
    "open", "create", "read", "write", "sync", "rename", "truncate", "allocate", "mkdir", "unlink", "close", "lock",
    "link", "chmod", "chown", "xattr", "advise", "stat", "list", "map", "dup", "space", "access", "direct", "changing",
    "any",
)  # fmt: skip
FAIL, SHORTEN, DELAY, KILL, TEAR = range(5)
ACTIONS = ("fail", "shorten", "delay", "kill", "tear")
_SAID = ("fails", "is short", "is late", "is the end", "is cut off by the end")


@dataclass(frozen=True)
class Fault:
    """What happens at call `number` (from 1) of a kind, and at all later ones where `sticky`.

    `value`: the error, or milliseconds.
    """

    kind: str
    number: int
    action: int
    value: int = 0
    sticky: bool = False

    def __str__(self) -> str:
        what = f"fails with {errno.errorcode[self.value]}" if self.action == FAIL else _SAID[self.action]
        return f"{self.kind} {self.number} {what}{' for ever' if self.sticky else ''}"


class _Slot(ctypes.Structure):
    _fields_ = (("counts", ctypes.c_long * len(KINDS)), ("hits", ctypes.c_long), ("hit", ctypes.c_char * 1024))


def lacking() -> str | None:
    """Why the library cannot be built here; None where it can."""
    if not sys.platform.startswith("linux"):
        return "LD_PRELOAD and /proc are Linux's"
    return None if _compiler() else "there is no C compiler (cc, gcc or clang)"


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def build(folder: Path) -> Path:
    """Compiles the library into `folder`."""
    library = folder / "faults.so"
    line = [str(_compiler()), "-shared", "-fPIC", "-O2", "-o", str(library), str(SOURCE), "-ldl", "-lpthread"]
    subprocess.run(line, check=True)
    return library


def environment(library: Path) -> dict[str, str]:
    """Of a process that has the library loaded."""
    return os.environ | {"LD_PRELOAD": str(library), _VARIABLE: str(library)}


class Faults:
    """The library that is loaded in this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ[_VARIABLE])
        self._library.faults_slot.restype = ctypes.POINTER(_Slot)
        os.environ.pop("LD_PRELOAD", None)  # programs that are started by a run are none of its business

    def arm(self, folder: Path, fault: Fault | None, slot: int = 0, record: int = -1) -> None:
        """From here on calls in `folder` count; `record` is the descriptor of a file to note what they change."""
        f = fault or Fault("any", 0, FAIL)
        self._library.faults_arm(
            slot, os.fsencode(folder), KINDS.index(f.kind), ctypes.c_long(f.number), f.action, ctypes.c_long(f.value),
            int(f.sticky), record,
        )  # fmt: skip

    def begin(self) -> None:
        """The counts are this process's and its children's from here on, and no others'."""
        self._library.faults_begin()

    def disarm(self) -> None:
        """From here on no call counts."""
        self._library.faults_disarm()

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """What this thread does in the block is somebody else's doing: it neither counts nor fails."""
        self._library.faults_apart(1)
        try:
            yield
        finally:
            self._library.faults_apart(0)

    def clear(self, slot: int = 0) -> None:
        ctypes.memset(self._library.faults_slot(slot), 0, ctypes.sizeof(_Slot))

    def counts(self, slot: int = 0) -> dict[str, int]:
        found = self._library.faults_slot(slot).contents
        return dict(zip(KINDS, found.counts, strict=True))

    def hit(self, slot: int = 0) -> str:
        """The call that was hit first, and its path; empty where none was."""
        return os.fsdecode(self._library.faults_slot(slot).contents.hit)


def is_loaded() -> bool:
    return _VARIABLE in os.environ


def remove() -> None:
    """Removes the folder that `build` was given, at the end of a process that has it loaded."""
    shutil.rmtree(Path(os.environ[_VARIABLE]).parent, ignore_errors=True)
