"""The SHA-256 of every file of an output: checksums.sha256, as sha256sum writes and checks them.

A torch_dist folder has Megatron-Core's own list too, integrity.json, which a run with --verify-integrity wants to see.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from weights_conversion.files.fileio import sha256

NAME = "checksums.sha256"
INTEGRITY = "integrity.json"
_INDEX = "/.metadata"


def written(names: Iterable[str]) -> list[str]:
    """The files of sums that an output with files of these `names` has."""
    return [*_listings(names), NAME]


def sums(
    root: Path, names: Sequence[str], further: Mapping[str, bytes], workers: int,
    running: Callable[[str, threading.Event], str | None] = lambda *_: None,
) -> dict[str, bytes]:  # fmt: skip
    """The files of sums (`written`), of files below `root`, and of `further` contents, on so many threads.

    Reads the disk, but for what `running` says (of a file by its name; None: nothing) until it is told to stop.
    """
    stop = threading.Event()

    def of(name: str) -> str:
        return running(name, stop) or sha256(root / name, stop)

    with ThreadPoolExecutor(workers, thread_name_prefix="checksums") as pool:
        try:
            found = dict(zip(names, pool.map(of, names), strict=True))
        except BaseException:
            stop.set()
            raise
    found |= {name: hashlib.sha256(content).hexdigest() for name, content in further.items()}
    result: dict[str, bytes] = {}
    for listing in _listings(names):
        folder = listing.rpartition("/")[0]
        inside = {name.rpartition("/")[2]: found[name] for name in sorted(names) if name.rpartition("/")[0] == folder}
        result[listing] = json.dumps({"algorithm": "sha256", "files": inside}, indent=2).encode()
        found[listing] = hashlib.sha256(result[listing]).hexdigest()
    result[NAME] = "".join(f"{found[name]}  {name}\n" for name in sorted(found)).encode()
    return result


def _listings(names: Iterable[str]) -> list[str]:
    """Megatron-Core's list of each folder of items."""
    folders = sorted(name.removesuffix(_INDEX) for name in names if name.endswith(_INDEX))
    return [f"{folder}/{INTEGRITY}" for folder in folders]
