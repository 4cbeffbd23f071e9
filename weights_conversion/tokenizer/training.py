"""The tokenizer that training had: its files, wherever they are, and the id of every token, added ones included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights_conversion.errors import ConversionError
from weights_conversion.tokenizer import special_tokens, tokenizer_config, tokenizer_json
from weights_conversion.tokenizer.content import check_files
from weights_conversion.tokenizer.files import (
    ADDED,
    CONFIG,
    JSON,
    MODEL,
    SPECIAL_MAP,
    Fetch,
    Source,
    json_alone,
)
from weights_conversion.tokenizer.places import locate, stated_places
from weights_conversion.tokenizer.special_tokens import Extension
from weights_conversion.tokenizer.vocabulary import Vocabulary, read_sentencepiece


@dataclass(frozen=True)
class TokenizerOptions:
    """The tokenizer's command-line flags, by their names; None: not given."""

    vocab_file: Path | None = None
    vocab_extra_ids_list: str | None = None
    override_special_tokens: tuple[str, ...] = ()
    new_tokens: bool | None = None
    cache_dir: Path | None = None


@dataclass(frozen=True)
class Found:
    """The tokenizer's files, and what training made of them: `ids` of every token, of which `base` are the files' own.

    `cut` are the tokens that training cut out of text.
    """

    source: Source
    trained: Mapping[str, Any]
    extension: Extension
    vocabulary: Vocabulary
    own_json: bool
    base: int
    ids: dict[str, int]
    cut: tuple[str, ...]
    warnings: list[str]


def find(
    family: str, checkpoint: Path, args: Mapping[str, Any], options: TokenizerOptions, *, core: bool,
    iteration: Path | None, search: Sequence[Path], fetch: Fetch | None,
) -> Found:  # fmt: skip
    trained = special_tokens.trusted_args(family, args, chosen=core and options.vocab_file is not None)
    stated = special_tokens.stated_extension(trained, args.get("tokenizer_type"), core)
    extension = special_tokens.resolve_extension(family, stated, options.new_tokens, options.vocab_extra_ids_list)
    places = stated_places(family, checkpoint, iteration, trained, search, options.vocab_file is not None)
    source, warnings = locate(family, places, options.vocab_file, fetch, options.cache_dir)
    try:
        check_files(source.files)
    except ConversionError as error:
        raise ConversionError(f"{error}; --vocab_file names another tokenizer, --no_tokenizer leaves it out") from error
    rule = not core or "new_tokens" in trained
    vocabulary = _vocabulary(family, source, source.json(JSON), extension, rule=rule)
    own_json = source.own_json(family)
    base, ids, cut = _ids(family, vocabulary, extension, own_json)
    if trained and (stated != extension):
        _, before, _ = _ids(family, vocabulary, stated, own_json)
        warnings += special_tokens.contradictions(stated, extension, before, ids)
    return Found(source, trained, extension, vocabulary, own_json, base, ids, cut, warnings)


def _ids(
    family: str, vocabulary: Vocabulary, extension: Extension, own_json: bool
) -> tuple[int, dict[str, int], tuple[str, ...]]:
    """(number of ids of the vocabulary file, id of every token that training had, tokens that it cut out of text)."""
    ids = vocabulary.ids
    base = max(ids.values(), default=-1) + 1
    if json_alone(family):
        ids = special_tokens.falcon_token_ids(ids, extension)
        return base, ids, tuple(token for token in extension.extras if token in ids)
    if own_json:
        for token in extension.extras:
            ids.setdefault(token, max(ids.values()) + 1)
        return base, ids, extension.extras
    return base, special_tokens.token_ids(vocabulary, extension), special_tokens.added_tokens(vocabulary, extension)


def _vocabulary(family: str, source: Source, data: Mapping[str, Any], extension: Extension, rule: bool) -> Vocabulary:
    """What training had before it added tokens: tokenizer.model, else tokenizer.json. `rule`: Megatron-LLM's holds."""
    if MODEL in source.files and not json_alone(family) and not source.own_json(family):
        vocabulary = read_sentencepiece(source.files[MODEL])
        if rule and not extension.new_tokens and None in (vocabulary.bos, vocabulary.eos):
            raise ConversionError(
                f"{source.files[MODEL]} lacks a begin or an end token; without new tokens, versions of "
                "Megatron-LLM disagree "
                "on whether they were added. Give the tokenizer.model of training with --vocab_file, or say "
                "--new_tokens."
            )
        return vocabulary
    if extension.new_tokens and not json_alone(family):
        raise ConversionError(
            f"{source.origin} has no {MODEL}, on whose pad token the ids of the new tokens depend; name the {MODEL} of "
            "training with --vocab_file, or say --no_new_tokens."
        )
    ids = {**source.json(ADDED), **tokenizer_json.all_ids(data)}
    if sorted(ids.values()) != list(range(len(ids))) and (extension.extras or json_alone(family)):
        raise ConversionError(
            f"the ids in {source.vocabulary_file()} have gaps, so those of added tokens are unknown; name another "
            "--vocab_file."
        )
    named = {
        **tokenizer_config.named_tokens(source.json(SPECIAL_MAP)),
        **tokenizer_config.named_tokens(source.json(CONFIG)),
    }
    if json_alone(family) and "<|endoftext|>" in ids:
        named.setdefault("eos", "<|endoftext|>")
    pieces = tuple(sorted(ids, key=lambda token: ids[token]))
    return Vocabulary(pieces, named.get("bos"), named.get("eos"), unk=named.get("unk"), own=ids)
