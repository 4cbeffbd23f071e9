"""An adapter of PEFT's from the hub: two small files, by the same client, cache and sums as a model's."""

from __future__ import annotations

import logging
from pathlib import Path

from weights_conversion.errors import ConversionError
from weights_conversion.hub.cached import Snapshot
from weights_conversion.hub.checking import Cached, check, stated_by
from weights_conversion.hub.choice import MAX_SMALL_BYTES
from weights_conversion.hub.errors import explain, masked
from weights_conversion.hub.fetching import TIMEOUTS, download, patiently
from weights_conversion.hub.listing import COMMIT, sizes_of
from weights_conversion.hub.repositories import check_names

logger = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # as PEFT prefers them


def snapshot(repository: str, *, cache_dir: Path | None = None, recheck: bool = False) -> Snapshot:
    """The newest commit's adapter in the hub's cache; a complete one there serves where the hub says no.

    Raises ConversionError, one sentence that names the repository and what mends it.
    """
    from huggingface_hub import constants

    check_names(repository, "main", "--adapter")
    cache = Path(cache_dir if cache_dir is not None else constants.HF_HUB_CACHE).expanduser().absolute()
    try:
        return _from_hub(repository, cache, recheck)
    except ConversionError:
        raise
    except Exception as error:  # the client's errors share no base
        failure = explain(error, repository, "main", cache)
        cached = None if failure.kind == "final" else _from_cache(repository, cache)
        if cached is None:
            raise ConversionError(masked(f"{failure.found}: {failure.remedy}.")) from error
        if failure.kind != "offline":
            logger.warning("%s; using the copy in the cache, %s.", masked(failure.found), cached.folder)
        return cached


def _from_hub(repository: str, cache: Path, recheck: bool) -> Snapshot:
    from huggingface_hub import constants, model_info

    timeout = constants.HF_HUB_ETAG_TIMEOUT
    info = patiently(
        lambda: model_info(repository, files_metadata=True, timeout=timeout), float(TIMEOUTS * timeout), "the listing"
    )
    commit, sizes = str(info.sha), sizes_of(info)
    if not COMMIT.fullmatch(commit):
        raise ValueError(f"the answer for {repository} has no commit hash")
    names = [CONFIG, *[name for name in WEIGHTS if name in sizes][:1]]
    if CONFIG not in sizes or len(names) != 2:
        raise ConversionError(
            f"Repository {repository} holds no adapter of PEFT's ({CONFIG} and {WEIGHTS[0]}): name another with "
            "--adapter."
        )
    if (sizes[CONFIG] or 0) > MAX_SMALL_BYTES:
        raise ConversionError(f"Repository {repository} has a {CONFIG} of {sizes[CONFIG]} bytes: do not use it.")
    listed = {file.rfilename: file for file in info.siblings or ()}
    for name in names:
        # By branch, so that the client notes which commit it was: the adapter is then found offline too.
        path, lfs = download(repository, name, "main", cache, sizes[name]), listed[name].lfs
        if path.parent.name != commit:
            raise ConversionError(f"Repository {repository} moved while it was being read: run the same command again.")
        check(
            Cached(repository, commit, path, stated_by(path, lfs.sha256 if lfs else None, listed[name].blob_id)),
            recheck,
        )
    return Snapshot(path.parent, repository, commit, tuple(names))


def _from_cache(repository: str, cache: Path) -> Snapshot | None:
    from huggingface_hub import try_to_load_from_cache

    found = {name: try_to_load_from_cache(repository, name, cache) for name in (CONFIG, *WEIGHTS)}
    paths = {name: Path(path) for name, path in found.items() if isinstance(path, str)}
    names = [CONFIG, *[name for name in WEIGHTS if name in paths][:1]]
    if CONFIG not in paths or len(names) != 2:
        return None
    for name in names:
        check(Cached(repository, paths[name].parent.name, paths[name], stated_by(paths[name], None, None)), False)
    return Snapshot(paths[CONFIG].parent, repository, paths[CONFIG].parent.name, tuple(names))
