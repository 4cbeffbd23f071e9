"""checksums.sha256: the SHA-256 of every file of an output, as sha256sum writes and checks them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from weights_conversion.fileio import sha256

NAME = "checksums.sha256"


def sums(root: Path, names: Sequence[str], further: Mapping[str, bytes], workers: int) -> bytes:
    """The lines for files below `root`, and for `further` contents, on so many threads. Reads the disk."""
    stop = threading.Event()
    with ThreadPoolExecutor(workers, thread_name_prefix="checksums") as pool:
        try:
            found = dict(zip(names, pool.map(lambda name: sha256(root / name, stop), names), strict=True))
        except BaseException:
            stop.set()
            raise
    found |= {name: hashlib.sha256(content).hexdigest() for name, content in further.items()}
    return "".join(f"{found[name]}  {name}\n" for name in sorted(found)).encode()
