"""A snapshot of a repository in the hub's cache, and what it must hold to serve without a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from weights_conversion.files import fileio
from weights_conversion.hub.choice import SMALL_FILES, VOCABULARIES, choices, few, with_shards


@dataclass(frozen=True)
class Snapshot:
    """A folder of the hub cache that holds every file asked for.

    `revision` is the commit hash. `files` are the names that belong to this snapshot: other programs may have left
    further files in the same folder.
    """

    folder: Path
    repository: str
    revision: str
    files: tuple[str, ...] = ()
    note: str = ""  # what a dry run has not fetched


def from_cache(repository: str, revision: str, cache: Path, weights: bool) -> Snapshot | str:
    """A snapshot in the cache that holds everything, or what it lacks, in words that follow "the cache holds"."""
    from huggingface_hub import try_to_load_from_cache

    found = {name: try_to_load_from_cache(repository, name, cache, revision) for name in SMALL_FILES}
    paths = {name: Path(path) for name, path in found.items() if isinstance(path, str)}
    if not paths:
        return f"no copy of {repository} at revision {revision}"
    folder = next(iter(paths.values())).parent
    at = f"only a part of {repository} at revision {revision}, without"
    if weights and "config.json" not in paths:
        return f"{at} config.json"
    # Not None where the client has noted that the repository has no such file.
    if all(found[name] is None for name in VOCABULARIES):
        return f"{at} {' or '.join(VOCABULARIES)}"
    files = []
    if weights:
        present = {path.name for path in folder.iterdir() if fileio.is_file(path)}
        sets = [with_shards(choice, folder, repository) for choice in choices(present)]
        files = next((files for files in sets if present.issuperset(files)), None)
        if files is None:
            return f"{at} {few([name for name in sets[0] if name not in present]) if sets else 'its weight files'}"
    return Snapshot(folder, repository, folder.name, (*(name for name in SMALL_FILES if name in paths), *files))
