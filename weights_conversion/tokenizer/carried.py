"""The tokenizer files that an import takes along, so that an export finds them again."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from weights_conversion.configs import secrets
from weights_conversion.files import fileio
from weights_conversion.tokenizer.content import check_files, links
from weights_conversion.tokenizer.files import CONFIG


def carried(paths: Sequence[Path]) -> tuple[dict[str, bytes | Path], list[str]]:
    """What to write by name (a path: a copy of it), and sentences for the report.

    Raises ConversionError for what is no tokenizer's file.
    """
    files: dict[str, bytes | Path] = {path.name: path for path in paths}
    check_files({path.name: path for path in paths})
    notes = [f"tokenizer  {sentence}" for sentence in links(paths)]
    settings = files.get(CONFIG)
    if isinstance(settings, Path):
        clean, dropped = secrets.without_secrets(fileio.read_json(settings, fileio.MAX_TOKENIZER_BYTES))
        if dropped:
            notes.append(secrets.note(dropped, str(settings)))
        code = clean.pop("auto_map", None)
        if code is not None:  # Megatron's tokenizers ask transformers for it, and OUT has none of its files
            notes.append(f"tokenizer  auto_map of {settings} is left out: its code is neither copied nor run")
        if dropped or code is not None:
            files[CONFIG] = (json.dumps(clean, indent=2) + "\n").encode()
    return files, notes


def told(names: Collection[str], folder: Path, *, named: bool) -> tuple[list[str], list[str]]:
    """(notes, warnings) on what is carried from `folder`; `named`: the source's args name a tokenizer elsewhere."""
    if "tekken.json" in names and not {"tokenizer.model", "tokenizer.json"} & set(names):
        return [
            "tokenizer  tekken.json alone, which transformers reads with the package mistral-common; an export builds "
            "tokenizer.json from it"
        ], []
    if {"tokenizer.model", "tokenizer.json"} & set(names) or named:
        return [], []
    return [], [
        f"{folder} holds no tokenizer (tokenizer.model or tokenizer.json), so none is written; training needs one, and "
        "an export asks for it (--vocab_file)"
    ]
