"""Says what a path is: which kind of checkpoint, and where it begins. Every command asks here, and nowhere else.

A path that is off by a step (an iteration's own folder, a rank's, the folder around, a hub cache's) is followed where
it can mean one checkpoint only. Else one sentence says what it is, and what to give instead.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.formats.iterations import (
    TRACKER,
    holds_iteration,
    is_rank_folder,
    iterations,
    named,
    nemo_rl_step,
    nemo_weights,
    number_of,
    verl_step,
)
from weights_conversion.sources import near_misses

_DEPTH = 3  # levels below a folder in which a checkpoint is looked for: a hub cache's is snapshots/COMMIT
_MOST_FOLDERS = 300


logger = logging.getLogger(__name__)


class Kind(Enum):
    """What a folder holds."""

    HUGGINGFACE = "Hugging Face"
    META = "Meta"
    MEGATRON = "Megatron"


@dataclass(frozen=True)
class Found:
    """A checkpoint: its folder (a Megatron checkpoint's root), and the iteration that is meant, where a path names one.

    `note` says where it was found, if not at the path itself.
    """

    kind: Kind
    root: Path
    iteration: int | str | None = None
    note: str | None = None

    @property
    def notes(self) -> list[str]:
        return [self.note] if self.note else []


def detect(path: Path, load_iters: int | str | None = None) -> Found:
    """What `path` is; `load_iters` is the iteration that the user names. Raises ConversionError where it is nothing."""
    if not fileio.is_folder(path):
        raise ConversionError(_no_folder(path))
    found = _at(path, load_iters) or _above(path, load_iters)
    if found is not None:
        return found
    if sentence := near_misses.sentence(path):
        raise ConversionError(sentence)
    return _below(path, load_iters)


def say_found(found: Found | None) -> None:
    """Logs where a checkpoint was found, if not at the path that was given, before any work."""
    if found is not None and found.note:
        logger.info("%s", found.note.removeprefix("source").strip())


def _at(path: Path, load_iters: int | str | None) -> Found | None:
    """The checkpoint that `path` itself is.

    A Megatron root may hold a config.json (several trainers leave one there), a tracker is Megatron's alone.
    """
    if fileio.is_there(path / TRACKER):
        if (step := verl_step(path, load_iters)) is not None and not iterations(path):
            return Found(Kind.MEGATRON, step, None, f"source     {step}, the step of verl's that is read")
        return Found(Kind.MEGATRON, path, load_iters)
    has_config = fileio.is_file(path / "config.json")
    try:
        if (found := _of_nemo(path, load_iters)) is not None:
            return found
    except PermissionError:  # a closed folder in one of Hugging Face's form
        if not has_config:
            raise
    weights = has_config and near_misses.has_weights(path)
    if iterations(path) and not (weights and load_iters is None):
        return Found(Kind.MEGATRON, path, load_iters)
    if holds_iteration(path) and not weights:
        return _iteration(path, load_iters)
    if not (has_config or fileio.is_file(path / "consolidated.00.pth")) or near_misses.sentence(path):
        return None
    return Found(Kind.HUGGINGFACE if has_config else Kind.META, path)


def _of_nemo(path: Path, load_iters: int | str | None) -> Found | None:
    if (folder := nemo_rl_step(path, load_iters)) is not None:
        return Found(Kind.MEGATRON, folder, None, f"source     {folder}, the policy that NeMo-RL trained")
    if (folder := nemo_weights(path)) is not None and load_iters is None:
        return Found(Kind.MEGATRON, folder, None, f"source     {folder}, whose context/ is NeMo 2's")
    return None


def _iteration(folder: Path, load_iters: int | str | None) -> Found:
    """`folder` is an iteration's: by its name in the root above, or one that somebody has renamed."""
    whole = Path(os.path.realpath(folder, strict=True))
    number = number_of(whole.name)
    if number is None:
        if load_iters is not None:
            raise ConversionError(
                f"{folder} is an iteration's own folder, so --load_iters {load_iters} names nothing in it; leave it out"
            )
        # A link to a folder of another name: what states its model lies beside the folder, if not beside the link.
        return Found(Kind.MEGATRON, whole if fileio.is_link(folder) and not _stated_beside(folder) else folder)
    if load_iters is not None and load_iters != number:
        raise ConversionError(
            f"{folder} is the folder of one iteration, but --load_iters {load_iters} was given; give {whole.parent} or "
            "leave --load_iters out"
        )
    root = folder.parent if folder.name == whole.name else whole.parent
    return Found(Kind.MEGATRON, root, number, f"source     {folder}, the iteration that is read")


def _stated_beside(folder: Path) -> bool:
    """Whether verl's or NeMo 2's statement of the model lies beside `folder`."""
    return any(fileio.is_folder(folder.parent / name) for name in ("huggingface", "context"))


def _above(path: Path, load_iters: int | str | None) -> Found | None:
    """A rank's folder stands for the iteration that it belongs to."""
    if not is_rank_folder(Path(os.path.abspath(path))):
        return None
    folder = Path(os.path.abspath(path)).parent
    return replace(_iteration(folder, load_iters), note=f"source     {folder}, all of its ranks, not {path.name} alone")


def _below(path: Path, load_iters: int | str | None) -> Found:
    """The one checkpoint below `path`. Raises ConversionError for none and for several."""
    level = [path]
    for _ in range(_DEPTH):
        level = _folders(level)
        there = [found for folder in level if (found := _if_open(partial(_at, load_iters=load_iters), folder))]
        full = [found for found in there if found.kind is not Kind.HUGGINGFACE or near_misses.has_weights(found.root)]
        if found := full or there:
            if len(found) > 1:
                raise ConversionError(_several(path, [one.root for one in found]))
            return replace(found[0], note=f"source     {found[0].root}, the only checkpoint in {path}")
        if sentence := next((said for folder in level if (said := _if_open(near_misses.sentence, folder))), None):
            raise ConversionError(sentence)
    raise ConversionError(
        f"{path} is no checkpoint: it holds neither config.json (Hugging Face), consolidated.00.pth (Meta) nor "
        f"{TRACKER} (Megatron){_contents(path)}"
    )


def _if_open(look: Callable[[Path], Any], folder: Path) -> Any:
    """What `look` finds in a folder; None in one that is closed to this user."""
    try:
        return look(folder)
    except PermissionError:
        return None


def _several(path: Path, roots: list[Path]) -> str:
    names = named([str(root.relative_to(path)) for root in roots])
    what = "checkpoints"
    if path.name.startswith("models--") and fileio.is_folder(path / "snapshots"):
        what = "snapshots of a repository (it is a folder of the hub's cache)"
        main = path / "refs" / "main"
        if fileio.is_file(main) and (commit := main.read_bytes()[:40].decode("ascii", "replace")):
            names += f"; main is snapshots/{commit}"
    return f"{path} holds {len(roots)} {what}: {names}; give one of them"


def _folders(parents: Iterable[Path]) -> list[Path]:
    """The folders in `parents`; hidden ones, those of no access and unfinished outputs are left out."""
    found: list[Path] = []
    for parent in parents:
        try:
            inner = sorted(path for path in parent.iterdir() if _may_hold(path))
        except (*fileio.ABSENT, PermissionError):
            continue
        found += inner[: _MOST_FOLDERS - len(found)]
    return found


def _may_hold(path: Path) -> bool:
    unfinished = path.name.endswith(".partial") or path.name.startswith("tmp_step_")  # ours, and NeMo-RL's
    return not path.name.startswith(".") and not unfinished and fileio.is_folder(path)


def _no_folder(path: Path) -> str:
    if fileio.is_file(path) or (fileio.is_link(path) and not fileio.exists(path)):
        if not fileio.exists(path):
            return f"{path} is a link to {os.readlink(path)}, which is not there"
        if sentence := near_misses.file_sentence(path):
            return sentence
        folder = path.parent
        folder = folder.parent if is_rank_folder(folder) else folder
        return f"{path} is not a folder but a file; give the folder of its checkpoint, {folder}"
    near = next((parent for parent in path.parents if fileio.is_folder(parent)), None)
    there = f"; {near} is there" if near is not None and str(near) != "." else ""
    return f"{path} is not a folder; name the folder of a checkpoint{there}"


def _contents(path: Path) -> str:
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError:
        return ""
    return f"; it holds {named(names)}" if names else "; it is empty"
