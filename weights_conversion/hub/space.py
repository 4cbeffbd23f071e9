"""Whether the cache's disk has room for what is to be fetched."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from weights_conversion.errors import ConversionError
from weights_conversion.errors.text import size
from weights_conversion.files import fileio

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo


def free(cache: Path) -> str:
    return size(shutil.disk_usage(cache).free)


def to_fetch(info: ModelInfo, files: list[str], folder: Path) -> int:
    """Bytes of `files` that are not in the cache yet."""
    blobs = folder.parents[1] / "blobs"
    needed = 0
    for file in info.siblings or ():
        if file.rfilename in files and not fileio.is_file(folder / file.rfilename):
            blob = file.lfs.sha256 if file.lfs else file.blob_id
            if blob and fileio.is_file(blobs / blob):
                continue
            partial = blobs / f"{blob}.incomplete"
            needed += max((file.size or 0) - (partial.stat().st_size if fileio.is_file(partial) else 0), 0)
    return needed


def check_space(info: ModelInfo, files: list[str], folder: Path, repository: str) -> None:
    """Refuse before the first byte what will not fit into the cache."""
    needed = to_fetch(info, files, folder)
    left = shutil.disk_usage(folder).free
    if needed > left:
        raise ConversionError(
            f"Repository {repository} needs {needed / 1e9:.2f} GB more in the cache {folder.parents[2]}, which has "
            f"{left / 1e9:.2f} GB free: free some, or name another place with --cache-dir or HF_HOME."
        )
