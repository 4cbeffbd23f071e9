"""Where tokenizer files lie: which ones import keeps, and where export finds them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weights_conversion.architectures import FAMILIES
from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.tokenizer import tokenizer_json
from weights_conversion.tokenizer.vocabulary import is_tiktoken, read_sentencepiece

MODEL, JSON, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
SPECIAL_MAP, ADDED, CHAT_TEMPLATE = "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"
VOCAB, MERGES = "vocab.json", "merges.txt"  # of byte-level tokenizers, for readers without tokenizer.json
TEKKEN = "tekken.json"  # Mistral's own since Nemo, for its own packages and vLLM
TOKENIZER_FILES = (MODEL, JSON, CONFIG, SPECIAL_MAP, ADDED, CHAT_TEMPLATE, VOCAB, MERGES, TEKKEN)


def json_alone(family: str) -> bool:
    """Whether training reads tokenizer.json, and no tokenizer.model."""
    return FAMILIES[family].tokenizer_type != "SentencePieceTokenizer"


Fetch = Callable[[str, "Path | None"], Path]


@dataclass(frozen=True)
class Source:
    """The tokenizer files found: where, in words for the report, and each file by its usual name.

    `default`: the family's usual tokenizer, taken because nothing is stated. `built`: contents of JSON files that are
    not there, made from one that is.
    """

    origin: str
    files: Mapping[str, Path]
    default: bool = False
    built: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        return name in self.files or name in self.built

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file's content, {} where there is none. Raises ConversionError where it is no JSON object."""
        if name not in self.files:
            return self.built.get(name, {})
        try:
            return fileio.read_json(self.files[name], fileio.MAX_TOKENIZER_BYTES)
        except ConversionError as error:
            raise ConversionError(f"{error}; mend it, or name another tokenizer with --vocab_file") from error

    def own_json(self, family: str) -> bool:
        """Whether tokenizer.json stands by itself: no tokenizer.model that Megatron-LLM could have trained with.

        Llama 3's file of that name is of tiktoken, which holds the same ids again.
        """
        return not json_alone(family) and self.has(JSON) and (MODEL not in self.files or is_tiktoken(self.files[MODEL]))

    def vocabulary_file(self) -> Path:
        return self.files.get(MODEL) or self.files.get(JSON) or self.files[TEKKEN]

    def agrees(self, other: Source) -> bool:
        """Whether no token has two ids and no id two tokens in them."""
        if MODEL in self.files and MODEL in other.files:
            return self.same_model(other)
        mine, theirs = self.ids(), other.ids()
        owner = {index: token for token, index in mine.items()}
        return all(mine.get(token, i) == i and owner.get(i, token) == token for token, i in theirs.items())

    def ids(self) -> dict[str, int]:
        """The ids of all tokens: tokenizer.json's, else tokenizer.model's pieces; with those of added_tokens.json."""
        if self.has(JSON):
            found = tokenizer_json.all_ids(self.json(JSON))
        else:
            found = {piece: i for i, piece in enumerate(read_sentencepiece(self.files[MODEL]).pieces)}
        return {**self.json(ADDED), **found}

    def same_model(self, other: Source) -> bool:
        """Whether both hold a tokenizer.model, equal byte for byte."""
        mine, theirs = self.files.get(MODEL), other.files.get(MODEL)
        return mine is not None and theirs is not None and fileio.sha256(mine) == fileio.sha256(theirs)


def source_tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The tokenizer files of a Hugging Face or Meta folder; Meta's tokenizer.model may lie in its parent."""
    found = tuple(folder / name for name in TOKENIZER_FILES if fileio.is_file(folder / name))
    is_meta = fileio.is_file(folder / "params.json") or any(folder.glob("consolidated.*.pth"))
    if is_meta and not any(path.name in (MODEL, JSON) for path in found) and fileio.is_file(folder.parent / MODEL):
        return (folder.parent / MODEL, *found)
    return found


def open_source(path: Path, origin: str, family: str) -> Source | None:
    """The tokenizer at a file or folder, or None where there is no vocabulary for this family."""
    if fileio.is_file(path) and path.name not in (MODEL, JSON):
        source = Source(origin, {JSON if path.suffix == ".json" else MODEL: path})
    else:
        folder = path.parent if fileio.is_file(path) else path
        source = Source(origin, {file.name: file for file in source_tokenizer_files(folder)})
    if TEKKEN in source.files and not {JSON, MODEL} & set(source.files):
        return _with_built(source)
    return source if JSON in source.files or (MODEL in source.files and not json_alone(family)) else None


def _with_built(source: Source) -> Source:
    """A tekken.json alone, with the tokenizer.json and the settings that say the same. Raises ConversionError."""
    from weights_conversion.tokenizer import tekken

    data = source.json(TEKKEN)
    try:
        if not tekken.is_tekken(data):
            raise ValueError("its parts are not there")
        built = {JSON: tekken.build(data), CONFIG: tekken.settings(data)}
    except ValueError as error:
        raise ConversionError(f"{source.files[TEKKEN]} is no tekken.json of Mistral's ({error})") from error
    return replace(source, built={name: content for name, content in built.items() if name not in source.files})


def with_settings(source: Source, others: Sequence[Source]) -> Source:
    """A lone tokenizer.model takes the settings of the first other place whose tokenizer.model is the same."""
    if {JSON, CONFIG} & set(source.files):
        return source
    for other in others:
        if {JSON, CONFIG} & set(other.files) and source.same_model(other):
            return Source(f"{source.origin}, with the settings in {other.origin}", {**other.files, **source.files})
    return source
