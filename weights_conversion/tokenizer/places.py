"""Where the tokenizer of a checkpoint is looked for, the best places first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weights_conversion.errors import ConversionError
from weights_conversion.owners import stranger
from weights_conversion.tokenizer.files import JSON, MODEL, REPOSITORIES, Fetch, Source, open_source, with_settings

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Places:
    """`stated`: (path, words for the report) of what the checkpoint holds or names; `search`: folders that come next.

    `repository` is a name of the hub that training's args give, `missing` what they name and is not here, `notes`
    what was passed over and why.
    """

    stated: tuple[tuple[Path, str], ...]
    search: tuple[Path, ...] = ()
    repository: str | None = None
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def stated_places(
    family: str, checkpoint: Path, iteration: Path | None, args: Mapping[str, Any], search: Sequence[Path] = ()
) -> Places:
    """Of a checkpoint's root, the folder of its iteration, and what its (trusted) args name.

    Megatron-Core writes no tokenizer into its root, so what its run named comes first.
    """
    own = [(checkpoint, f"the checkpoint, {checkpoint}")]
    named, missing, notes = [], [], []
    repository = None
    for name in ("vocab_file", "tokenizer_model"):
        value = args.get(name)
        if not isinstance(value, str) or not value or (name == "vocab_file" and family == "falcon"):
            continue
        path = _existing(value, checkpoint, iteration)
        if path is not None and (owner := stranger(path)) is not None:
            notes.append(
                f"{path}, training's {name}, belongs to another user ({owner}) and is not read; "
                f"--vocab_file {path} names it all the same"
            )
        elif path is not None:
            named.append((path, f"training's {name}, {value}"))
        elif name == "tokenizer_model" and _REPOSITORY.fullmatch(value):
            repository = value
            continue
        else:
            missing.append(f"training's {name}, {value}")
    if iteration is not None and (folder := iteration / "tokenizer").is_dir():
        named.append((folder, f"the iteration's own folder, {folder}"))
    core = "tokenizer_model" in args or "vocab_file" not in args
    return Places(
        tuple([*named, *own] if core else [*own, *named]), tuple(search), repository, tuple(missing), tuple(notes)
    )


def _existing(value: str, checkpoint: Path, iteration: Path | None) -> Path | None:
    """What args name: a relative path may be meant from the checkpoint, or from where training was started."""
    for base in (*(() if iteration is None else (iteration,)), checkpoint, Path()):
        try:
            if (base / value).exists():
                return base / value
        except (OSError, ValueError):  # no path at all
            return None
    return None


def locate(
    family: str, places: Places, vocab_file: Path | None, fetch: Fetch | None, cache_dir: Path | None
) -> tuple[Source, list[str]]:
    """(the tokenizer to export, warnings): --vocab_file, else the first of `places`, else the family's own repository.

    Raises ConversionError where there is none, or where two places that the checkpoint states contradict each other.
    """
    stated = [source for path, origin in places.stated if (source := open_source(path, origin, family)) is not None]
    searched = [source for folder in places.search if (source := open_source(folder, str(folder), family)) is not None]
    if vocab_file is not None:
        return with_settings(_by_flag(vocab_file, family), [*stated, *searched]), []
    for other in stated[1:]:
        if not stated[0].agrees(other):
            raise ConversionError(
                f"{stated[0].vocabulary_file()} and {other.vocabulary_file()}, which training used, are different; "
                "name the right one with --vocab_file."
            )
    warnings, reasons = list(places.notes), []
    if stated:
        return with_settings(stated[0], [*stated[1:], *searched]), warnings
    if places.repository is not None:
        fetched = _fetched(places.repository, family, fetch, cache_dir, reasons)
        if fetched is not None:
            return replace(fetched, origin=f"{places.repository}, which training's args name, downloaded"), warnings
    gone = [*places.missing, *([places.repository] if places.repository else [])]
    if searched:
        warnings += [f"{what} is not to be had; the tokenizer of {searched[0].origin} is used" for what in gone]
        return with_settings(searched[0], searched[1:]), warnings

    looked = [*(str(path) for path, _ in places.stated), *map(str, places.search), *gone]
    # What training named was its own choice: the family's usual tokenizer would be a guess.
    if fetch is not None and family in REPOSITORIES and not gone and not places.notes:
        looked.append(REPOSITORIES[family])
        fetched = _fetched(REPOSITORIES[family], family, fetch, cache_dir, reasons)
        if fetched is not None:
            origin = f"{REPOSITORIES[family]}, {family}'s usual one, since the checkpoint names none; downloaded"
            return replace(fetched, origin=origin, default=True), warnings
    wanted = JSON if family == "falcon" else f"{MODEL} or {JSON}"
    raise ConversionError(
        f"no tokenizer for {family} found; looked for {wanted} in {', '.join(looked)}. Name the file or its "
        "folder with --vocab_file, or export the weights alone with --no_tokenizer.",
        *reasons,
        *places.notes,
    )


def _by_flag(vocab_file: Path, family: str) -> Source:
    source = open_source(vocab_file, f"--vocab_file {vocab_file}", family)
    if source is None:
        wanted = JSON if family == "falcon" else f"{MODEL} or {JSON}"
        what = "a folder without" if vocab_file.is_dir() else "not there; expected a vocabulary file or a folder with"
        raise ConversionError(f"--vocab_file {vocab_file} is {what} {wanted}; name the tokenizer of training.")
    return source


def _fetched(
    repository: str, family: str, fetch: Fetch | None, cache_dir: Path | None, reasons: list[str]
) -> Source | None:
    """A repository's tokenizer; None, and why, where it cannot be had."""
    if fetch is None:
        return None
    try:
        return open_source(fetch(repository, cache_dir), f"{repository}, downloaded", family)
    except ConversionError as error:
        reasons += error.problems
        return None
