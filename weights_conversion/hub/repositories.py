"""A repository's files in the hub's cache: fetched, checked, or found there when the hub says no.

Everything goes through huggingface_hub's own client and cache, so its settings (HF_TOKEN, HF_ENDPOINT, HF_HOME,
HF_HUB_CACHE, HF_HUB_OFFLINE, ...) hold here as everywhere. Nothing in the cache is ever deleted, and no code of a
repository is ever fetched.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weights_conversion.errors import ConversionError
from weights_conversion.errors.text import size
from weights_conversion.hub.cached import Snapshot, from_cache
from weights_conversion.hub.checking import Cached, Checker, check, stated_by
from weights_conversion.hub.choice import SMALL_FILES, VOCABULARIES, choices, few, with_shards, with_tensors
from weights_conversion.hub.errors import explain, masked
from weights_conversion.hub.fetching import download
from weights_conversion.hub.headers import check_readable, write_folder
from weights_conversion.hub.listing import resolve, sizes_of
from weights_conversion.hub.space import check_space, free, to_fetch

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

logger = logging.getLogger(__name__)

REVISION = re.compile(r"(?!.*\.\.)[^\s/\\:~^?*\[\x00-\x1f-][^\s\\:~^?*\[\x00-\x1f]*(?<!/)")  # git's own rules for names


@dataclass(frozen=True)
class Partly:
    """A part of a repository: of its weights the tensors of these names, and `small` files beside the usual ones."""

    wants: Callable[[str], bool]
    small: tuple[str, ...] = ()


def snapshot(
    repository: str, *, revision: str | None = None, cache_dir: Path | None = None, weights: bool = True,
    recheck: bool = False, accept: Callable[[Path], object] = lambda _: None, headers: Path | None = None,
    partly: Partly | None = None,
) -> Snapshot:  # fmt: skip
    """Bring the files that a conversion needs into the hub cache, or find them there.

    With `weights`, one format of weights (safetensors before .bin), the configs and the tokenizer; without, the configs
    and the tokenizer alone. `revision` is a branch, a tag or a commit; None is main. Where the hub cannot be reached or
    refuses, a cache that holds everything serves instead, with a warning unless HF_HUB_OFFLINE asked for it.
    Every file is held against the SHA-256 or git blob id that the hub states: what is fetched, and what lies in the
    cache where nothing records that it was right, or where `recheck` asks for it. `accept` is called with the folder
    once the small files are there; what it raises (ConversionError) comes before any weight file is fetched.
    With `headers`, a folder to be made, no weight file is fetched: it gets the small files and the weights' headers.
    With `partly` too, the files that hold its tensors are fetched, and are in that folder with their data.
    Raises ConversionError, one sentence that names the repository and what mends it.
    """
    from huggingface_hub import constants

    revision = "main" if revision is None else revision
    check_names(repository, revision)
    cache = Path(cache_dir if cache_dir is not None else constants.HF_HUB_CACHE).expanduser().absolute()
    try:
        return _from_hub(repository, revision, cache, weights, recheck, accept, headers, partly)
    except ConversionError:
        raise
    except Exception as error:  # the client's errors share no base: its HTTP library's, hf_xet's, its own, OSError
        failure = explain(error, repository, revision, cache)
        cached = "" if failure.kind == "final" else from_cache(repository, revision, cache, weights)
        if isinstance(cached, Snapshot):
            if failure.kind != "offline":
                logger.warning("%s; using the complete copy in the cache, %s.", masked(failure.found), cached.folder)
            _check_cached(cached, recheck)
            return cached
        beside = f", and the cache {cache} holds {cached}" if failure.kind in ("offline", "unreachable") else ""
        raise ConversionError(masked(f"{failure.found}{beside}: {failure.remedy}.")) from error


def check_names(repository: str, revision: str, flag: str = "--model-path") -> None:
    """Refuses what can be neither a repository, which `flag` has named, nor a revision."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise ConversionError(
            f"{repository!r} is neither a folder that exists nor a repository name of the hub (such as "
            f"'tiiuae/falcon-7b'): check {flag}."
        ) from None
    if not REVISION.fullmatch(revision):
        raise ConversionError(
            f"{revision!r} cannot be a revision of {repository}: give --revision a branch, a tag or a commit hash."
        )


def _from_hub(
    repository: str, revision: str, cache: Path, weights: bool, recheck: bool, accept: Callable[[Path], object],
    headers: Path | None, partly: Partly | None,
) -> Snapshot:  # fmt: skip
    info, first = resolve(repository, revision, cache, weights)
    commit, sizes = str(info.sha), sizes_of(info)
    take = functools.partial(_take, info, repository, cache)
    names = [name for name in (*SMALL_FILES, *(partly.small if partly else ())) if name in sizes]
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
    if headers is not None and partly is not None and not any(name.endswith(".bin") for name in files):
        held = [name for name in with_tensors(files, first.parent, partly.wants) if not name.endswith(".json")]
        check_space(info, held, first.parent, repository)
        for name in held:
            check(take(name), recheck)
        write_folder(headers, first.parent, repository, commit, names, files)
        return Snapshot(headers, repository, commit, (*names, *files))
    needed = to_fetch(info, files, first.parent)
    if headers is not None and partly is None:
        check_readable(files, repository, size(needed), cache)
        write_folder(headers, first.parent, repository, commit, names, files)
    check_space(info, files, first.parent, repository)
    if headers is not None and partly is None:
        note = f"hub        {size(needed)} would be fetched into {cache}, which has {free(cache)} free"
        return Snapshot(headers, repository, commit, (*names, *files), note)
    if needed:
        logger.info("fetching %s of %s at %s into %s", size(needed), repository, commit, cache)
    with Checker(recheck) as checker:
        for name in files:
            checker.add(take(name))
        checker.finish()
    return Snapshot(first.parent, repository, commit, (*names, *files))


def _take(info: ModelInfo, repository: str, cache: Path, name: str) -> Cached:
    """One file, fetched where the cache lacks it, with what the hub states of its content."""
    listed = {file.rfilename: file for file in info.siblings or ()}[name]
    commit, expected = str(info.sha), listed.size
    path = download(repository, name, commit, cache, expected)
    if expected is not None and path.stat().st_size != expected:
        raise ConversionError(
            f"The cached {path} has {path.stat().st_size} bytes, but {expected} in the repository: fetch it anew "
            f"with 'hf download {repository} {name} --revision {commit} --force-download'."
        )
    stated = stated_by(path, listed.lfs.sha256 if listed.lfs else None, listed.blob_id)
    return Cached(repository, commit, path, stated)


def _check_cached(snapshot: Snapshot, recheck: bool) -> None:
    """Without the hub, its word is the name that the client gave to each blob."""
    with Checker(recheck) as checker:
        for name in snapshot.files:
            path = snapshot.folder / name
            checker.add(Cached(snapshot.repository, snapshot.revision, path, stated_by(path, None, None)))
        checker.finish()


def _remember_absence(repository: str, commit: str, cache: Path) -> None:
    """Ask for the vocabularies that a repository lacks: the client then notes that they are not merely uncached."""
    from huggingface_hub.errors import EntryNotFoundError

    for name in VOCABULARIES:
        with contextlib.suppress(EntryNotFoundError):
            download(repository, name, commit, cache)
