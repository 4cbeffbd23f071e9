"""Slower disks than there are here: slow.c, built on the spot and loaded into what is measured."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("slow.c")


@dataclass(frozen=True)
class Slow:
    """`sync_seconds` are added to every fsync; all processes together write at most `rate` bytes/s."""

    sync_seconds: float = 0.0
    rate: float | None = None


class Library:
    """The library in `folder`, which is removed by whoever made it."""

    def __init__(self, folder: Path) -> None:
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        if compiler is None:
            raise RuntimeError("slower disks need a C compiler (cc, gcc or clang)")
        self._library, self._bucket = folder / "slow.so", folder / "slow.bucket"
        line = [compiler, "-shared", "-fPIC", "-O2", "-o", str(self._library), str(SOURCE), "-ldl"]
        subprocess.run(line, check=True)

    def environment(self, slow: Slow) -> Mapping[str, str]:
        """For the processes of one run, which begin with nothing spent."""
        self._bucket.write_bytes(bytes(8))
        further = {"LD_PRELOAD": str(self._library), "SLOW_SYNC_MS": str(round(slow.sync_seconds * 1000))}
        if slow.rate is not None:
            further |= {"SLOW_RATE": str(slow.rate), "SLOW_BUCKET": str(self._bucket)}
        return os.environ | further
