"""The tokens of a tokenizer.model, by sentencepiece's own reader."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.tokenizer import apart


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a vocabulary file in id order, and the names of its special ones (None: it has none).

    `own` are the ids where the file states them (tokenizer.json), since they may have gaps; else they count up.
    """

    pieces: tuple[str, ...]
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None
    own: Mapping[str, int] | None = None

    @property
    def ids(self) -> dict[str, int]:
        return dict(self.own) if self.own is not None else {piece: i for i, piece in enumerate(self.pieces)}


def is_tiktoken(path: Path) -> bool:
    """Whether a file begins as tiktoken's do: a token in base64, and its rank."""
    with fileio.open_file(path) as file:
        return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)", file.read(4096)) is not None


def read_sentencepiece(model_file: Path) -> Vocabulary:
    """The pieces of a tokenizer.model. Raises ConversionError where sentencepiece cannot read it."""
    content = fileio.read_whole(model_file, fileio.MAX_TOKENIZER_BYTES)
    if is_tiktoken(model_file):
        raise ConversionError(
            f"{model_file} is of tiktoken, as Llama 3's, not a sentencepiece model; name a folder that also holds the "
            "model's tokenizer.json with --vocab_file."
        )
    try:
        found = apart.sentencepiece(content)
    except ConversionError as error:
        raise ConversionError(
            f"{model_file} is not a sentencepiece model ({error}); give the tokenizer.model of training with "
            "--vocab_file."
        ) from error
    return Vocabulary(tuple(found["pieces"]), *(found["special"][name] for name in ("bos", "eos", "pad", "unk")))
