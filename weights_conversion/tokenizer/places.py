"""Where the tokenizer of a checkpoint is looked for, the best places first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weights_conversion.architectures import FAMILIES
from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.files.owners import stranger
from weights_conversion.tokenizer.files import (
    JSON,
    MODEL,
    Fetch,
    Source,
    json_alone,
    open_source,
    source_tokenizer_files,
    with_settings,
)

# What training decided about the tokenizer, which another layout or dialect of the checkpoint keeps.
_ADDED = ("new_tokens", "vocab_extra_ids", "vocab_extra_ids_list")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Places:
    """`stated`: (path, words for the report) of what the checkpoint holds or names; `search`: folders that come next.

    `repository` is a name of the hub that training's args give, `missing` what they name and is not here, `notes`
    what was passed over and why, `trusted` what lies within the checkpoint that a flag names.
    """

    stated: tuple[tuple[Path, str], ...]
    search: tuple[Path, ...] = ()
    repository: str | None = None
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    trusted: frozenset[Path] = frozenset()


def stated_places(
    family: str,
    checkpoint: Path,
    iteration: Path | None,
    args: Mapping[str, Any],
    search: Sequence[Path] = (),
    chosen: bool = False,
) -> Places:
    """Of a checkpoint's root, the folder of its iteration, and what its (trusted) args name.

    Megatron-Core writes no tokenizer into its root, so what its run named comes first. `chosen`: by --vocab_file, so
    that a place which cannot be looked at (a mount that is gone) is no error.
    """
    own = [(checkpoint, f"the checkpoint, {checkpoint}")]
    named, missing, notes, trusted = [], [], [], frozenset({checkpoint})
    repository = None
    for name in ("vocab_file", "tokenizer_model"):
        value = args.get(name)
        if not isinstance(value, str) or not value or (name == "vocab_file" and json_alone(family)):
            continue
        path, note = _looked_at(name, value, checkpoint, iteration, chosen)
        if note is not None:
            notes.append(note)
        elif path is not None:
            named.append((path, f"training's {name}, {value}"))
        elif name == "tokenizer_model" and _REPOSITORY.fullmatch(value):
            repository = value
            continue
        else:
            missing.append(f"training's {name}, {value}")
    for folder in _folders_of_wrappers(checkpoint, iteration):
        named.append((folder, f"the checkpoint's own folder, {folder}"))
        trusted |= {folder}
    core = "tokenizer_model" in args or "vocab_file" not in args
    return Places(
        tuple([*named, *own] if core else [*own, *named]), tuple(search), repository, tuple(missing), tuple(notes),
        trusted,
    )  # fmt: skip


def _folders_of_wrappers(checkpoint: Path, iteration: Path | None) -> list[Path]:
    """Megatron-Bridge's in the iteration's folder, NeMo 2's in its context, NeMo-RL's beside the policy's weights."""
    folders = [] if iteration is None else [iteration / "tokenizer"]
    if checkpoint.name == "weights":
        folders += [checkpoint.parent / "context" / "nemo_tokenizer", checkpoint.parent / "tokenizer"]
    return [folder for folder in folders if fileio.is_folder(folder)]


def _looked_at(
    name: str, value: str, checkpoint: Path, iteration: Path | None, chosen: bool
) -> tuple[Path | None, str | None]:  # fmt: skip
    """(what args name, why it is not read): the one, the other, or neither where nothing is there."""
    try:
        path = _existing(value, checkpoint, iteration)
    except OSError as error:
        if not chosen and not isinstance(error, PermissionError):
            raise ConversionError(
                f"{value}, training's {name}, cannot be looked at ({error.strerror}), and another tokenizer might be "
                "taken for it; --vocab_file names one"
            ) from error
        return None, (
            f"{value}, training's {name}, cannot be looked at ({error.strerror}), and is not read; have it copied, "
            "and name it with --vocab_file"
        )
    if path is not None and (owner := stranger(path)) is not None:
        return None, (
            f"{path}, training's {name}, belongs to another user ({owner}) and is not read; "
            f"--vocab_file {path} names it all the same"
        )
    return path, None


def _existing(value: str, checkpoint: Path, iteration: Path | None) -> Path | None:
    """What args name: a relative path may be meant from the checkpoint, or from where training was started.

    Raises OSError where it cannot be known whether it is there: another tokenizer would be taken for it.
    """
    for base in (*(() if iteration is None else (iteration,)), checkpoint, Path()):
        if fileio.exists(base / value):
            return base / value
    return None


def locate(
    family: str, places: Places, vocab_file: Path | None, fetch: Fetch | None, cache_dir: Path | None
) -> tuple[Source, list[str]]:
    """(the tokenizer to export, warnings): --vocab_file, else the first of `places`, else the family's own repository.

    Raises ConversionError where there is none, or where two places that the checkpoint states contradict each other.
    """
    warnings, reasons = list(places.notes), []
    stated = [one for path, origin in places.stated if (one := _opened(path, origin, family, places, warnings))]
    searched = [one for folder in places.search if (one := _opened(folder, str(folder), family, places, warnings))]
    if vocab_file is not None:
        return with_settings(_by_flag(vocab_file, family), [*stated, *searched]), []
    for other in stated[1:]:
        if not stated[0].agrees(other):
            raise ConversionError(
                f"{stated[0].vocabulary_file()} and {other.vocabulary_file()}, which training used, are different; "
                "name the right one with --vocab_file."
            )
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
    repository = FAMILIES[family].tokenizer_repository
    if fetch is not None and repository is not None and not gone and not warnings:
        looked.append(repository)
        fetched = _fetched(repository, family, fetch, cache_dir, reasons)
        if fetched is not None:
            origin = f"{repository}, {family}'s usual one, since the checkpoint names none; downloaded"
            return replace(fetched, origin=origin, default=True), warnings
    wanted = JSON if json_alone(family) else f"{MODEL} or {JSON}"
    raise ConversionError(
        f"no tokenizer for {family} found; looked for {wanted} in {', '.join(looked)}. Name the file or its "
        "folder with --vocab_file, or export the weights alone with --no_tokenizer.",
        *reasons,
        *warnings,
    )


def _opened(path: Path, origin: str, family: str, places: Places, notes: list[str]) -> Source | None:
    """The tokenizer there, unless somebody else has put a file of it where the args pointed; `notes` then says so."""
    source = open_source(path, origin, family)
    if source is None or path in places.trusted:
        return source
    for file in source.files.values():
        if (owner := stranger(file)) is not None:
            notes.append(
                f"{file} belongs to another user ({owner}) and is not read; --vocab_file {file} names it all the same"
            )
            return None
    return source


def _by_flag(vocab_file: Path, family: str) -> Source:
    source = open_source(vocab_file, f"--vocab_file {vocab_file}", family)
    if source is None:
        wanted = JSON if json_alone(family) else f"{MODEL} or {JSON}"
        what = (
            "a folder without"
            if fileio.is_folder(vocab_file)
            else "not there; expected a vocabulary file or a folder with"
        )
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


def taken_along(
    family: str, checkpoint: Path, iteration: Path, args: Mapping[str, Any], search: Sequence[Path], core: bool
) -> tuple[tuple[Path, ...], dict[str, Any], list[str]]:
    """(tokenizer files, args, sentences) that another layout or dialect of a checkpoint keeps. `core`: it becomes one.

    A vocabulary file of another name stays where it is, and its path in the args, so that an export finds it.
    """
    places = stated_places(family, checkpoint, iteration, args, search)
    notes = list(places.notes)
    kept = {name: args[name] for name in _ADDED if args.get(name) is not None}
    if args.get("tokenizer_type") == "SentencePieceTokenizer" and "tokenizer_model" in args and not core:
        kept.setdefault("new_tokens", True)  # Megatron-Core's tokenizer of this type always adds them
    if core and "tokenizer_model" in args:
        kept["tokenizer_type"] = args.get("tokenizer_type")
    for path in (*(path for path, _ in places.stated), *places.search):
        source = _opened(path, str(path), family, places, notes)
        if source is not None and all(file.name == name for name, file in source.files.items()):
            return tuple(source.files.values()), kept, notes
        if source is not None:
            break
    # So that an export knows that training had one of its own.
    name = args.get("tokenizer_model") or args.get("vocab_file")
    if name is not None:
        kept["tokenizer_model" if core else "vocab_file"] = name
    return source_tokenizer_files(checkpoint), kept, notes
