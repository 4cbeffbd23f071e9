"""integrity.json: the SHA-256 of every file of an iteration, as Megatron-Core 0.17.1 and newer write it when asked."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio

INTEGRITY = "integrity.json"
_SHOWN = 8


def check(folder: Path, workers: int) -> str | None:
    """A note on what was checked, None where the iteration in `folder` has no such file. Reads every byte of it.

    Raises ConversionError for files that are missing or are not what was saved.
    """
    wrong = problems(folder, workers)
    if wrong:
        more = [f"{len(wrong) - _SHOWN} further files are so"] if len(wrong) > _SHOWN else []
        raise ConversionError(*wrong[:_SHOWN], *more)
    return None if wrong is None else f"integrity  the files of {folder} are what its {INTEGRITY} says"


def problems(folder: Path, workers: int) -> list[str] | None:
    """A sentence for each file that is not what was saved; None where nothing states the sums."""
    path = folder / INTEGRITY
    if not fileio.is_there(path):
        return None
    said = fileio.read_json(path, fileio.MAX_INDEX_BYTES)
    algorithm, files = said.get("algorithm", "sha256"), said.get("files")
    if algorithm != "sha256":
        raise ConversionError(f"{path} is by algorithm {str(algorithm)[:40]!r}, where sha256 was expected")
    if not isinstance(files, dict) or not all(
        Path(name).name == name and isinstance(digest, str) for name, digest in files.items()
    ):
        raise ConversionError(f"{path} is not a list of the folder's own files with the SHA-256 of each")
    there = [name for name in files if fileio.is_file(folder / name)]
    found = [f"{folder / name} is missing, {INTEGRITY} names it" for name in files if name not in there]
    with ThreadPoolExecutor(workers) as pool:
        digests = pool.map(lambda name: fileio.sha256(folder / name), there)
        found += [
            f"{folder / name} is not what {INTEGRITY} says: it was changed after it was saved"
            for name, digest in zip(there, digests, strict=True)
            if digest != files[name].lower()
        ]
    return found
