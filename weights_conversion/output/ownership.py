"""Is a folder ours, and of which kind: the one answer for OUT, OUT.partial and OUT.unverified.

Only what a conversion wrote may ever be replaced or removed. An import is known by its tracker and its manifest, an
export by its config and the page on which the data of its safetensors files begin (no other program pads a header so
far). Each holds files of the names below and nothing else: anything more is foreign, and is named. Nothing is changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.layouts.placement import PAGE
from weights_conversion.output import descriptors

TRACKER, MANIFEST, SUMS = "latest_checkpointed_iteration.txt", "conversion_manifest.json", "checksums.sha256"
_TOKENIZER = {
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "tekken.json",
}  # fmt: skip
_MEGATRON = {TRACKER, MANIFEST, SUMS, *_TOKENIZER}
_RELEASE = re.compile(
    r"release/(mp_rank_\d{2,}(_\d{3,}){0,2}/model_optim_rng\.pt|\.metadata|common\.pt|metadata\.json|__\d+_\d+\.distcp)"
)
_PROCESSORS = {"preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"}  # a reference's
_HUGGINGFACE = {
    "config.json", "generation_config.json", "model.safetensors.index.json", SUMS, *_TOKENIZER, *_PROCESSORS,
}  # fmt: skip
_WEIGHTS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")
_FOLDERS = re.compile(r"release(/mp_rank_\d{2,}(_\d{3,}){0,2})?")
_PARTS = {"checkpoint", "journal", "lock", "replaced"}
_NOTES = re.compile(r"(digest|publishing|chunks\.\d+)(\.new)?")
_LEFT_BY_NFS = re.compile(r"\.nfs[0-9a-f]{8,}")  # removed files that some node still has open; they go by themselves
_PROBE = re.compile(r"probe\.[0-9a-f]+")
_SHOWN = 8
_MOST_LINKS = 100  # on one way; the system follows 40
FILE, FOLDER = stat.S_IFREG, stat.S_IFDIR


class Kind(Enum):
    ABSENT = "absent"
    EMPTY = "empty"
    MEGATRON = "an import"
    HUGGINGFACE = "an export"
    PARTIAL = "an unfinished conversion"
    FOREIGN = "no conversion's"


@dataclass(frozen=True)
class Found:
    """What a folder is. `files` are a conversion's, by relative name; `foreign` is everything else that is there."""

    kind: Kind
    files: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()

    def says(self) -> str:
        """The foreign entries in words."""
        more = f" and {len(self.foreign) - _SHOWN} more" if len(self.foreign) > _SHOWN else ""
        return ", ".join(self.foreign[:_SHOWN]) + more


def output_in(folder: Path | int) -> Found:
    """What stands at OUT or OUT.unverified, or in a folder that is open. Raises ConversionError where it is no folder,
    or may not be read."""
    try:
        with _shown(folder), descriptors.folder(folder) as top:
            entries = list(_entries(top))
            kind = _kind(top, {name for name, what in entries if what == FILE})
    except FileNotFoundError:
        return Found(Kind.ABSENT)
    except NotADirectoryError as error:
        raise ConversionError(f"{_path(folder)} exists and is not a folder; name another one") from error
    except PermissionError as error:
        path = _path(folder)
        raise ConversionError(f"{path} cannot be read, so what it holds is not known; name another folder") from error
    if not entries:
        return Found(Kind.EMPTY)
    if kind is Kind.FOREIGN:
        return Found(kind, (), tuple(name for name, _ in entries if "/" not in name))
    foreign = tuple(name for name, what in entries if not _is_named(name, what, kind))
    files = tuple(name for name, what in entries if what == FILE and name not in foreign)
    return Found(Kind.FOREIGN if foreign else kind, files, foreign)


def partial_in(folder: Path | int) -> Found:
    """What stands at OUT.partial: an unfinished conversion, or something foreign, or foreign things in one."""
    try:
        with _shown(folder), descriptors.folder(folder) as top:
            foreign = [name for name in os.listdir(top) if name not in _PARTS and not _passing(name)]
            if not foreign:
                foreign = list(_foreign_parts(top))
    except FileNotFoundError:
        return Found(Kind.ABSENT)
    except NotADirectoryError:
        return Found(Kind.FOREIGN, (), (str(folder),))
    return Found(Kind.FOREIGN if foreign else Kind.PARTIAL, (), tuple(sorted(foreign)))


def _path(folder: Path | int) -> str:
    return str(folder) if isinstance(folder, Path) else descriptors.place_of(folder) or "a folder of the output"


def _shown(folder: Path | int) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if isinstance(folder, int) else descriptors.shown_as("looking into", folder)


def _passing(name: str) -> bool:
    return bool(_LEFT_BY_NFS.fullmatch(name) or _PROBE.fullmatch(name))


def _foreign_parts(top: int) -> Iterator[str]:
    """Foreign entries of an OUT.partial of the right names: in its journal, or among the files of its outputs."""
    for part in ("journal", "checkpoint", "replaced"):
        try:
            with descriptors.folder(part, top) as inner:
                for name, what in _entries(inner):
                    either = any(_is_named(name, what, kind) for kind in (Kind.MEGATRON, Kind.HUGGINGFACE))
                    if not (_NOTES.fullmatch(name) and what == FILE if part == "journal" else either):
                        yield f"{part}/{name}"
        except FileNotFoundError:
            continue
        except NotADirectoryError:  # a link, or a file
            yield part
    try:
        if not stat.S_ISREG(os.stat("lock", dir_fd=top, follow_symlinks=False).st_mode):
            yield "lock"
    except FileNotFoundError:
        return


def _entries(top: int, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(relative name, FILE, FOLDER or another type) of everything; folders that are none of ours are not entered."""
    for name in sorted(os.listdir(top)):
        if _LEFT_BY_NFS.fullmatch(name):
            continue
        what = stat.S_IFMT(os.stat(name, dir_fd=top, follow_symlinks=False).st_mode)
        yield prefix + name, what
        if what == FOLDER and _FOLDERS.fullmatch(prefix + name):
            with descriptors.folder(name, top) as inner:
                yield from _entries(inner, f"{prefix}{name}/")


def _is_named(name: str, what: int, kind: Kind) -> bool:
    """Whether a conversion of that kind writes such an entry."""
    if what == FOLDER:
        return kind is Kind.MEGATRON and bool(_FOLDERS.fullmatch(name))
    names, pattern = (_HUGGINGFACE, _WEIGHTS) if kind is Kind.HUGGINGFACE else (_MEGATRON, _RELEASE)
    return what == FILE and (name in names or bool(pattern.fullmatch(name)))


def _kind(top: int, names: set[str]) -> Kind:
    """Whose output a folder is, by what only a conversion leaves."""
    if {TRACKER, MANIFEST} <= names:
        tracker = descriptors.read_note(top, TRACKER, 100)
        return Kind.MEGATRON if (tracker or b"").strip() == b"release" and _has_manifest(top) else Kind.FOREIGN
    weights = [name for name in names if name.endswith(".safetensors")]
    if "config.json" in names and weights and all(_begins_on_a_page(top, name) for name in weights):
        return Kind.HUGGINGFACE
    return Kind.FOREIGN


def _has_manifest(top: int) -> bool:
    try:
        content = json.loads(descriptors.read_note(top, MANIFEST, 100_000_000) or b"")
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "format" in content and "converter_version" in content


def _begins_on_a_page(top: int, name: str) -> bool:
    start = descriptors.read_note(top, name, 8, whole=False)
    return start is not None and len(start) == 8 and (int.from_bytes(start, "little") + 8) % PAGE == 0


def check_apart(names: Sequence[Path], sources: Sequence[Path]) -> None:
    """Refuses a source that is, or stands anywhere inside, one of `names` (OUT and its like), by whatever links.

    Folders are told by their identity on the disk, so that a bind mount or another spelling hides nothing. Raises
    OSError where that could not be learnt, for the source might be lost.
    """
    held = {}
    for name in names:
        if (found := fileio.status(name)) is not None:
            held[found.st_dev, found.st_ino] = name
    if not held:
        return
    seen: set[str] = set()
    for source in sources:
        for folder in _passed(source):
            if folder in seen:
                continue
            seen.add(folder)
            found = fileio.status(folder)
            if found is not None and (name := held.get((found.st_dev, found.st_ino))):
                raise ConversionError(
                    f"{name} holds the source ({source}), which it would replace or remove; name another folder"
                )


def _passed(source: Path) -> Iterator[str]:
    """Every folder on the way to a file or folder, itself included, through each of its links, as the system goes."""
    here, left = "/", _MOST_LINKS
    names = os.path.join(os.getcwd(), source).split("/")[::-1]
    yield here
    while names:
        name = names.pop()
        if name in ("", "."):
            continue
        if name == "..":  # of the folder that a link has led to, not of the link
            here = os.path.dirname(here)
            continue
        path = os.path.join(here, name)
        yield path
        if not fileio.is_link(path):
            here = path
        elif left:
            left -= 1
            target = os.readlink(path)
            names += target.split("/")[::-1]
            here = "/" if target.startswith("/") else here
