"""The folders that a checkpoint's args name: which of them are believed, and what is said of the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weights_conversion.configs import manifest
from weights_conversion.files import fileio
from weights_conversion.files.owners import is_closed, stranger


def trained_from(args: Mapping[str, Any]) -> list[Path]:
    """Folders that training named, where the import that it started from may have left its manifest.

    Only those of the user or of root: anyone may have made a folder again that is gone. None that is closed to this
    user, as where a container's root has trained.
    """
    return [path for path in _named(args) if _stranger(path) is None and not is_closed(path / manifest.NAME)]


def passed_over(args: Mapping[str, Any], root: Path) -> list[str]:
    """Sentences on folders that training named and that are not believed, or not to be read."""
    said = []
    for path in dict.fromkeys(_named(args)):
        closed, owner = is_closed(path / manifest.NAME), _stranger(path)
        if not closed and (owner is None or not fileio.is_folder(path)):
            continue
        why = "lies where you may not look" if owner is None else f"belongs to another user ({owner})"
        copied = "have its" if closed else "if you trust it, copy its"
        said.append(
            f"{path}, which the args name, {why} and is not read; {copied} {manifest.NAME} "
            f"{'copied ' if closed else ''}to {root}, and name its tokenizer with --vocab_file"
        )
    return said


def _stranger(folder: Path) -> int | None:
    """Who else owns a folder that args name, or the manifest in it."""
    owner = stranger(folder)
    return stranger(folder / manifest.NAME) if owner is None else owner


def _named(args: Mapping[str, Any]) -> list[Path]:
    load, vocab = args.get("load"), args.get("vocab_file")
    named = [Path(load)] if isinstance(load, str) and load else []
    return [*named, *([Path(vocab).parent] if isinstance(vocab, str) and vocab else [])]
