"""Calls of the hub's client that end: a file that breaks off is asked for again, and one that only drips is given up.

The client's own limits are those of single reads, so a server that sends a byte now and then would hold it for ever.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from weights_conversion.hub.errors import broke_in_mid_file

logger = logging.getLogger(__name__)

ATTEMPTS = 5  # per file, at a connection that breaks in mid-file
TIMEOUTS = 6  # of the client's own for a single read, in which a megabyte must have come, or all of a file
PIECE_BYTES = 1 << 20  # in which the client writes what it receives
XET_SECONDS = 600.0  # hf_xet writes pieces of up to 64 MiB, of files that are large
XET_BYTES = 64 << 20

T = TypeVar("T")


def download(repository: str, name: str, revision: str, cache: Path, size: int | None = None) -> Path:
    """One file, one at a time: an interrupt then ends the client at once, and hf_xet splits big files by itself."""
    from huggingface_hub import constants, file_download, hf_hub_download

    constants.DOWNLOAD_CHUNK_SIZE = min(constants.DOWNLOAD_CHUNK_SIZE, PIECE_BYTES)
    folder = cache / file_download.repo_folder_name(repo_id=repository, repo_type="model") / "blobs"
    limit = float(TIMEOUTS * constants.HF_HUB_DOWNLOAD_TIMEOUT)
    by_xet = importlib.util.find_spec("hf_xet") is not None and not constants.HF_HUB_DISABLE_XET
    if by_xet and (size or 0) > XET_BYTES:
        limit = max(limit, XET_SECONDS)

    def fetch() -> Path:
        return Path(hf_hub_download(repository, name, revision=revision, cache_dir=cache))

    for attempt in range(1, ATTEMPTS + 1):
        try:
            return patiently(fetch, limit, name, lambda: _arrived(folder))
        except Exception as error:
            if attempt == ATTEMPTS or not broke_in_mid_file(error):
                raise
            logger.warning("The connection broke while fetching %s of %s: trying again.", name, repository)
            time.sleep(1)
    raise AssertionError("unreachable")


def patiently(call: Callable[[], T], limit: float, what: str, progress: Callable[[], int] = lambda: 0) -> T:
    """call(), on a thread that is left to itself once `progress` has not grown for `limit` seconds: TimeoutError.

    A thread in a read cannot be ended; it holds nothing of ours, and ends with the process.
    """
    result: list[T] = []
    failure: list[BaseException] = []
    ended = threading.Event()

    def work() -> None:
        try:
            result.append(call())
        except BaseException as error:
            failure.append(error)
        finally:
            ended.set()

    threading.Thread(target=work, daemon=True, name="hub").start()
    seen, since = progress(), time.monotonic()
    while not ended.wait(min(limit, 0.5)):
        now = progress()
        if now > seen:
            since = time.monotonic()
        seen = now
        if time.monotonic() - since > limit:
            raise TimeoutError(f"{what} came too slowly, less than a megabyte in {limit:.0f} s")
    if failure:
        raise failure[0]
    return result[0]


def _arrived(folder: Path) -> int:
    """Bytes of unfinished downloads in a repository's cache, those of another process that has the lock included."""
    try:
        with os.scandir(folder) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.name.endswith(".incomplete"))
    except OSError:
        return 0
