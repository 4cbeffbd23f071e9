"""Which repository, which of its files, and what to tell the user when the hub says no.

Everything goes through huggingface_hub's own client and cache, so its settings (HF_TOKEN, HF_ENDPOINT, HF_HOME,
HF_HUB_CACHE, HF_HUB_OFFLINE, ...) hold here as everywhere. Nothing in the cache is ever deleted, and no code of a
repository is ever fetched.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weights_conversion.errors import ConversionError
from weights_conversion.errors.text import size
from weights_conversion.hub.checking import Cached, Checker, check, stated_by
from weights_conversion.hub.choice import MAX_SMALL_BYTES, choices, few, with_shards
from weights_conversion.hub.errors import explain, masked
from weights_conversion.hub.fetching import TIMEOUTS, download, patiently
from weights_conversion.hub.headers import check_readable, write_folder

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

logger = logging.getLogger(__name__)

# In the order in which they are fetched: where the vocabulary is complete, so is everything before it.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json")

COMMIT = re.compile(r"[0-9a-f]{40}")
REVISION = re.compile(r"(?!.*\.\.)[^\s/\\:~^?*\[\x00-\x1f-][^\s\\:~^?*\[\x00-\x1f]*(?<!/)")  # git's own rules for names


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


def snapshot(
    repository: str, *, revision: str | None = None, cache_dir: Path | None = None, weights: bool = True,
    recheck: bool = False, accept: Callable[[Path], object] = lambda _: None, headers: Path | None = None,
) -> Snapshot:  # fmt: skip
    """Bring the files that a conversion needs into the hub cache, or find them there.

    With `weights`, one format of weights (safetensors before .bin), the configs and the tokenizer; without, the configs
    and the tokenizer alone. `revision` is a branch, a tag or a commit; None is main. Where the hub cannot be reached or
    refuses, a cache that holds everything serves instead, with a warning unless HF_HUB_OFFLINE asked for it.
    Every file is held against the SHA-256 or git blob id that the hub states: what is fetched, and what lies in the
    cache where nothing records that it was right, or where `recheck` asks for it. `accept` is called with the folder
    once the small files are there; what it raises (ConversionError) comes before any weight file is fetched.
    With `headers`, a folder to be made, no weight file is fetched: it gets the small files and the weights' headers.
    Raises ConversionError, one sentence that names the repository and what mends it.
    """
    from huggingface_hub import constants

    revision = "main" if revision is None else revision
    _check_names(repository, revision)
    cache = Path(cache_dir if cache_dir is not None else constants.HF_HUB_CACHE).expanduser().absolute()
    try:
        return _from_hub(repository, revision, cache, weights, recheck, accept, headers)
    except ConversionError:
        raise
    except Exception as error:  # the client's errors share no base: its HTTP library's, hf_xet's, its own, OSError
        failure = explain(error, repository, revision, cache)
        cached = "" if failure.kind == "final" else _from_cache(repository, revision, cache, weights)
        if isinstance(cached, Snapshot):
            if failure.kind != "offline":
                logger.warning("%s; using the complete copy in the cache, %s.", masked(failure.found), cached.folder)
            _check_cached(cached, recheck)
            return cached
        beside = f", and the cache {cache} holds {cached}" if failure.kind in ("offline", "unreachable") else ""
        raise ConversionError(masked(f"{failure.found}{beside}: {failure.remedy}.")) from error


def _check_names(repository: str, revision: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise ConversionError(
            f"{repository!r} is neither a folder that exists nor a repository name of the hub (such as "
            "'tiiuae/falcon-7b'): check --model-path."
        ) from None
    if not REVISION.fullmatch(revision):
        raise ConversionError(
            f"{revision!r} cannot be a revision of {repository}: give --revision a branch, a tag or a commit hash."
        )


# Fetching


def _from_hub(
    repository: str, revision: str, cache: Path, weights: bool, recheck: bool, accept: Callable[[Path], object],
    headers: Path | None,
) -> Snapshot:  # fmt: skip
    info, first = _resolve(repository, revision, cache, weights)
    commit, listed = str(info.sha), {file.rfilename: file for file in info.siblings or ()}
    sizes = _sizes(info)

    def take(name: str) -> Cached:
        path, expected = download(repository, name, commit, cache, sizes[name]), sizes[name]
        if expected is not None and path.stat().st_size != expected:
            raise ConversionError(
                f"The cached {path} has {path.stat().st_size} bytes, but {expected} in the repository: fetch it anew "
                f"with 'hf download {repository} {name} --revision {commit} --force-download'."
            )
        lfs = listed[name].lfs
        stated = stated_by(path, lfs.sha256 if lfs else None, listed[name].blob_id)
        return Cached(repository, commit, path, stated)

    names = [name for name in SMALL_FILES if name in sizes]
    for name in names:
        check(take(name), recheck)
    if not any(name in sizes for name in VOCABULARIES):
        _remember_absence(repository, commit, cache)
    if not weights:
        return Snapshot(first.parent, repository, commit, tuple(names))

    accept(first.parent)
    files = choices(sizes)[0]
    if files[0].endswith(".json"):
        check(take(files[0]), recheck)
    files = with_shards(files, first.parent, repository)
    if lacking := [name for name in files if name not in sizes]:
        raise ConversionError(
            f"Repository {repository} is incomplete at revision {revision}, without {few(lacking)}: give another "
            "--revision, or another repository with --model-path."
        )
    needed = _to_fetch(info, files, first.parent)
    if headers is not None:
        check_readable(files, repository, size(needed), cache)
        write_folder(headers, first.parent, repository, commit, names, files)
    _check_space(info, files, first.parent, repository)
    if headers is not None:
        note = f"hub        {size(needed)} would be fetched into {cache}, which has {_free(cache)} free"
        return Snapshot(headers, repository, commit, (*names, *files), note)
    if needed:
        logger.info("fetching %s of %s at %s into %s", size(needed), repository, commit, cache)
    with Checker(recheck) as checker:
        for name in files:
            checker.add(take(name))
        checker.finish()
    return Snapshot(first.parent, repository, commit, (*names, *files))


def _check_cached(snapshot: Snapshot, recheck: bool) -> None:
    """Without the hub, its word is the name that the client gave to each blob."""
    with Checker(recheck) as checker:
        for name in snapshot.files:
            path = snapshot.folder / name
            checker.add(Cached(snapshot.repository, snapshot.revision, path, stated_by(path, None, None)))
        checker.finish()


def _resolve(repository: str, revision: str, cache: Path, weights: bool) -> tuple[ModelInfo, Path]:
    """The listing of one commit, and the path of its first small file in the cache.

    That file is asked for by `revision`, not by commit, because then the client notes in its cache which commit the
    revision was, which is what finds the snapshot again offline.
    """
    from huggingface_hub import constants, model_info

    timeout = constants.HF_HUB_ETAG_TIMEOUT

    def list_files() -> ModelInfo:
        return model_info(repository, revision=revision, files_metadata=True, timeout=timeout)

    for _ in range(3):  # a branch may move between the two requests
        info = patiently(list_files, float(TIMEOUTS * timeout), "the listing")
        if not COMMIT.fullmatch(str(info.sha)):
            raise ValueError(f"the answer for {repository} has no commit hash")
        _check_listing(_sizes(info), repository, revision, weights)
        first = next(name for name in SMALL_FILES if name in _sizes(info))
        path = download(repository, first, revision, cache)
        if path.parent.name == info.sha:
            return info, path
    raise ConversionError(
        f"Revision {revision} of repository {repository} moved while it was being read: run the same command again, or "
        "give --revision a commit hash."
    )


def _sizes(info: ModelInfo) -> dict[str, int | None]:
    return {file.rfilename: file.size for file in info.siblings or ()}


def _check_listing(sizes: dict[str, int | None], repository: str, revision: str, weights: bool) -> None:
    """Refuse, before anything is fetched, a repository that cannot be used."""
    at = f"Repository {repository} has, at revision {revision},"
    if weights and not choices(sizes):
        others = sorted({Path(name).suffix for name in sizes} & {".gguf", ".pth", ".h5", ".msgpack", ".onnx", ".pt"})
        others += [name for name in sorted(sizes) if re.fullmatch(r"(consolidated|adapter_model).*\.safetensors", name)]
        raise ConversionError(
            f"{at} no weight file that can be read (model*.safetensors or pytorch_model*.bin)"
            f"{f', only {few(others)}' if others else ''}: name another repository with --model-path."
        )
    if weights and "adapter_config.json" in sizes:
        raise ConversionError(
            f"{at} an adapter (adapter_config.json) beside its weights: merge it (merge_and_unload) and give "
            "the merged folder as --model-path."
        )
    if weights and "config.json" not in sizes:
        raise ConversionError(f"{at} no config.json, which its weights need: name another with --model-path.")
    if not any(name in sizes for name in SMALL_FILES):
        raise ConversionError(f"{at} neither tokenizer files nor a config.json: name another with --model-path.")
    for name, stated in sizes.items():
        if (name in SMALL_FILES or name.endswith(".index.json")) and (stated or 0) > MAX_SMALL_BYTES:
            raise ConversionError(
                f"{at} a {name} of {stated} bytes, which it cannot need: name another with --model-path."
            )


def _remember_absence(repository: str, commit: str, cache: Path) -> None:
    """Ask for the vocabularies that a repository lacks: the client then notes that they are not merely uncached."""
    from huggingface_hub.errors import EntryNotFoundError

    for name in VOCABULARIES:
        with contextlib.suppress(EntryNotFoundError):
            download(repository, name, commit, cache)


def _free(cache: Path) -> str:
    return size(shutil.disk_usage(cache).free)


def _to_fetch(info: ModelInfo, files: list[str], folder: Path) -> int:
    """Bytes of `files` that are not in the cache yet."""
    blobs = folder.parents[1] / "blobs"
    needed = 0
    for file in info.siblings or ():
        if file.rfilename in files and not (folder / file.rfilename).is_file():
            blob = file.lfs.sha256 if file.lfs else file.blob_id
            if blob and (blobs / blob).is_file():
                continue
            partial = blobs / f"{blob}.incomplete"
            needed += max((file.size or 0) - (partial.stat().st_size if partial.is_file() else 0), 0)
    return needed


def _check_space(info: ModelInfo, files: list[str], folder: Path, repository: str) -> None:
    """Refuse before the first byte what will not fit into the cache."""
    needed = _to_fetch(info, files, folder)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConversionError(
            f"Repository {repository} needs {needed / 1e9:.2f} GB more in the cache {folder.parents[2]}, which has "
            f"{free / 1e9:.2f} GB free: free some, or name another place with --cache-dir or HF_HOME."
        )


# Without a network


def _from_cache(repository: str, revision: str, cache: Path, weights: bool) -> Snapshot | str:
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
        present = {path.name for path in folder.iterdir() if path.is_file()}
        sets = [with_shards(choice, folder, repository) for choice in choices(present)]
        files = next((files for files in sets if present.issuperset(files)), None)
        if files is None:
            return f"{at} {few([name for name in sets[0] if name not in present]) if sets else 'its weight files'}"
    return Snapshot(folder, repository, folder.name, (*(name for name in SMALL_FILES if name in paths), *files))
