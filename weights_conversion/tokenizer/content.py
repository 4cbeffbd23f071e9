"""Whether what is called a tokenizer's file is one, told from its bytes, and where it really lies.

A shared model's tokenizer.model may be a link to anything that its user can read, and would be copied along. Nothing
here runs another library: a file made to break it must not end a conversion.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.files.links import told
from weights_conversion.tokenizer import tekken, tokenizer_json
from weights_conversion.tokenizer.files import (
    ADDED,
    CHAT_TEMPLATE,
    CONFIG,
    JSON,
    MERGES,
    MODEL,
    SPECIAL_MAP,
    TEKKEN,
    VOCAB,
)

MAX_TEMPLATE_BYTES = 1_000_000
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*")  # Llama 3's tokenizer.model: a token in base64, and its rank
_SETTINGS = re.compile(
    r".*_tokens?(_ids?)?$|.*(tokenizer|processor|pre_tokenizer)(_class|_type|_file)?$|(model_max|max)_length$|"
    r"(model_)?max_len$|added_tokens_decoder$|chat_template$|(padding|truncation)_side$|clean_up_tokenization_spaces$|"
    r"(sp_model_kwargs|legacy|add_prefix_space|model_input_names|do_lower_case|errors|backend|name_or_path|"
    r"special_tokens_map_file|auto_map)$"
)


def check_files(files: Mapping[str, Path]) -> None:
    """Raises ConversionError for a file (by the name that it will have) that is no tokenizer's."""
    for name, path in files.items():
        if name in _CHECKS:
            _CHECKS[name](path)
    if MERGES in files:
        _check_merges(files)


def _is_no(path: Path, what: str) -> ConversionError:
    return ConversionError(f"{path} is not {what}, so it was not copied; put the right file there, or remove it")


def _check_model(path: Path) -> None:
    data = fileio.read_whole(path, fileio.MAX_TOKENIZER_BYTES)
    lines = data.splitlines()
    if lines and all(_TIKTOKEN.fullmatch(line) for line in lines):
        return
    if not tokenizer_json.read_model(path).pieces:
        raise _is_no(path, "a sentencepiece model: it has no pieces")


def _check_json(path: Path) -> None:
    model = fileio.read_json(path, fileio.MAX_TOKENIZER_BYTES).get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        raise _is_no(path, "a tokenizer.json: it has no model with a vocabulary")


def _check_settings(path: Path) -> None:
    keys = fileio.read_json(path, fileio.MAX_TOKENIZER_BYTES)
    if keys and not any(_SETTINGS.fullmatch(key) for key in keys):
        raise _is_no(path, f"a {path.name}: it has none of a tokenizer's settings")


def _check_special(path: Path) -> None:
    keys = fileio.read_json(path, fileio.MAX_TOKENIZER_BYTES)
    if keys and not any("token" in key for key in keys):
        raise _is_no(path, f"a {path.name}: it names no token")


def _check_added(path: Path) -> None:
    content = fileio.read_json(path, fileio.MAX_TOKENIZER_BYTES)
    if not all(type(index) is int for index in content.values()):
        raise _is_no(path, f"an {path.name} of tokens and their ids")


def _check_template(path: Path) -> None:
    data = fileio.read_whole(path, MAX_TEMPLATE_BYTES)
    try:
        text = data.decode("utf-8")
    except ValueError as error:
        raise _is_no(path, "a chat template: it is not UTF-8 text") from error
    if text.strip() and not re.search(r"\{[{%]", text):
        raise _is_no(path, "a chat template: it has no {{ }} or {% %}")


def _check_vocab(path: Path) -> None:
    content = fileio.read_json(path, fileio.MAX_TOKENIZER_BYTES)
    if not all(type(index) is int for index in content.values()):
        raise _is_no(path, f"a {path.name} of tokens and their ids")


def _check_tekken(path: Path) -> None:
    if not tekken.is_tekken(fileio.read_json(path, fileio.MAX_TOKENIZER_BYTES)):
        raise _is_no(path, "a tekken.json: it has no pattern, number of rows and vocabulary")


def _check_merges(files: Mapping[str, Path]) -> None:
    """Most of its pairs join to a token of the vocabulary beside it; pairs of words alone (.netrc) are no merges."""
    path, pieces = files[MERGES], {}
    if JSON in files:
        pieces = tokenizer_json.model_vocabulary(fileio.read_json(files[JSON], fileio.MAX_TOKENIZER_BYTES))
    elif VOCAB in files:
        pieces = fileio.read_json(files[VOCAB], fileio.MAX_TOKENIZER_BYTES)
    text = fileio.read_whole(path, fileio.MAX_TOKENIZER_BYTES).decode("utf-8", "replace")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#version")]
    joined = sum(line.count(" ") == 1 and line.replace(" ", "") in pieces for line in lines)
    if 2 * joined < len(lines):
        raise _is_no(path, f"a {path.name}: its lines are no pairs that join to tokens of the vocabulary beside it")


_CHECKS: Mapping[str, Callable[[Path], Any]] = {
    MODEL: _check_model,
    JSON: _check_json,
    CONFIG: _check_settings,
    SPECIAL_MAP: _check_special,
    ADDED: _check_added,
    CHAT_TEMPLATE: _check_template,
    VOCAB: _check_vocab,
    TEKKEN: _check_tekken,
}


def links(paths: Iterable[Path]) -> list[str]:
    """A sentence for each file that is a link out of its folder, and not into the blobs of the hub's own cache."""
    return [sentence for path in paths for sentence in told(path.parent, [path])]
