"""The tokenizer of an exported model: every token at the id that training gave it, checked before a byte is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weights_conversion.tokenizer import checks, special_tokens, tokenizer_config, tokenizer_json
from weights_conversion.tokenizer.content import links
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
    Fetch,
    Source,
    json_alone,
)
from weights_conversion.tokenizer.special_tokens import CONFIG_KEYS, NEW_TOKENS, Extension
from weights_conversion.tokenizer.training import Found, TokenizerOptions, find


@dataclass(frozen=True)
class TokenizerPlan:
    """A tokenizer that has passed every check and is ready to be written.

    `ids` is the number of ids (largest id + 1), `vocabulary` every token's id, `token_ids` the special tokens as
    {"bos": (token, id)}, `config_overrides` the id fields that --override_special_tokens sets in config.json and
    generation_config.json, `report` what was used and where it came from.
    """

    ids: int
    token_ids: dict[str, tuple[str, int]]
    config_overrides: dict[str, int]
    report: list[str]
    vocabulary: dict[str, int]
    warnings: list[str] = field(default_factory=list)
    copied: Mapping[str, Path] = field(default_factory=dict)
    written: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def plan_tokenizer(
    family: str,
    checkpoint: Path,
    args: Mapping[str, Any],
    options: TokenizerOptions,
    *,
    embedding_rows: int,
    rows_known: bool = False,
    core: bool = False,
    iteration: Path | None = None,
    search: Sequence[Path] = (),
    fetch: Fetch | None = None,
    generation: Mapping[str, Any] | None = None,
) -> TokenizerPlan:
    """Finds the tokenizer, extends it as training did, checks every id, and writes nothing yet.

    `checkpoint` is the Megatron checkpoint's root, `iteration` the folder of the one that is read; `args` its
    arguments, which count for nothing here where the original's resharding tool has reset them; `core`: it is
    Megatron-Core's, whose tokenizers add nothing; `embedding_rows` the rows of the exported embedding, `rows_known`:
    without padding; `search` further folders; `fetch(repository, cache_dir)` downloads tokenizer files and returns
    their folder; `generation` the generation_config.json to be exported. Raises ConversionError.
    """
    found = find(family, checkpoint, args, options, core=core, iteration=iteration, search=search, fetch=fetch)
    made = _make(family, found, args, options, (embedding_rows, rows_known))
    doubted = options.new_tokens is None and args.get("new_tokens") is not None and not found.trained
    overridden = {f"{key}_token_id": made.every[token] for key, token in made.overrides.items() if key in CONFIG_KEYS}
    report = _report(
        found.source, found.extension, made.config, made.with_rows, found.base, made.overrides, found.cut,
        generation or {}, doubted, TEKKEN in made.copied,
    )  # fmt: skip
    return TokenizerPlan(
        ids=max(made.with_rows.values()) + 1,
        token_ids={key: (token, made.every[token]) for key, token in made.named.items()},
        config_overrides=overridden,
        report=[*report, *links(found.source.files.values())],
        vocabulary=made.with_rows,
        warnings=[*found.warnings, *made.warnings],
        copied=made.copied,
        written=made.written,
    )


@dataclass(frozen=True)
class _Made:
    """The exported tokenizer: `every` token's id, those `with_rows` of the embedding, and its files."""

    config: dict[str, Any]
    named: dict[str, str]
    overrides: dict[str, str]
    every: dict[str, int]
    with_rows: dict[str, int]
    copied: dict[str, Path]
    written: dict[str, Mapping[str, Any]]
    warnings: list[str]


def _make(
    family: str, found: Found, args: Mapping[str, Any], options: TokenizerOptions, rows: tuple[int, bool]
) -> _Made:
    """`rows` are the exported embedding's, and whether they are without padding."""
    source, base, ids, own_json = found.source, found.base, found.ids, found.own_json
    original = source.json(JSON)
    config = tokenizer_config.starting_config(family, source, found.vocabulary)
    fill = tokenizer_config.fill_token(family, config)
    data, built_from = _starting_json(source, original, config)
    if fill is not None and len(ids) > base:
        config = tokenizer_config.without_fill(config, fill)
        data = {**data, "added_tokens": [entry for entry in data["added_tokens"] if entry["content"] != fill]}
    every = checks.checked_ids(source, data, ids)
    with_rows = {token: index for token, index in every.items() if token != fill or index < base}
    needed = ids
    if own_json:  # tokens that its own files added need no row
        pieces = tokenizer_json.model_vocabulary(data)
        needed = {token: index for token, index in ids.items() if index >= base or token in pieces}
    warnings = checks.check_rows(source, needed, with_rows, base, found.extension.extras, rows, args)

    named = _named(family, found, config)
    allowed = [*found.cut, *named.values(), *tokenizer_config.extra_tokens(config)]
    overrides = special_tokens.parse_overrides(options.override_special_tokens, with_rows, allowed)
    ends = [key for key in ("bos", "eos") if key in named and key in overrides]
    around = {named[key]: (overrides[key], every[overrides[key]]) for key in ends}
    data = tokenizer_json.with_replaced_special(data, around)
    named |= overrides
    checks.check_known(source, named, tokenizer_config.extra_tokens(config), every)

    as_it_is = own_json and not found.cut and not overrides
    if not as_it_is:
        special = dict.fromkeys([*found.cut, *named.values()])
        extras = [token for token in found.extension.extras if token in ids]
        data = tokenizer_json.with_special(data, [(token, every[token]) for token in special])
        config = tokenizer_config.with_tokens(config, named, extras, data, set(special), data != original)
    checks.check_loaded(data, every, built_from)
    behind = {token: i for token, i in with_rows.items() if i >= base}
    copied, written = _files(source, data, config, behind, own_json, as_it_is)
    return _Made(config, named, overrides, every, with_rows, copied, written, warnings)


def _named(family: str, found: Found, config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by their roles, as training had them."""
    whole = {**found.source.json(SPECIAL_MAP), **config} if found.own_json else config
    named = tokenizer_config.named_tokens(whole)
    if found.extension.new_tokens and not json_alone(family):
        named |= {key: token for key, token in NEW_TOKENS.items() if key != "eod"}
        named["pad"] = found.vocabulary.pad or "<PAD>"
    return named


def _starting_json(
    source: Source, original: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Any], Path | None]:
    """tokenizer.json with what the source's files add to it, and the tokenizer.model whose text ids it must give."""
    data, built_from = original, None
    if not data:
        bos = tokenizer_config.text_of(config.get("bos_token")) if config.get("add_bos_token", True) else None
        legacy, prefix = config.get("legacy") is not False, config.get("add_prefix_space") is not False
        data = tokenizer_json.build(source.files[MODEL], bos, legacy, prefix)
        built_from = source.files[MODEL] if legacy and prefix else None
    entries = {entry["content"]: entry for entry in data.get("added_tokens") or []}
    special = {*tokenizer_config.named_tokens(config).values(), *tokenizer_config.extra_tokens(config)}
    for index, entry in (config.get(tokenizer_config.DECODER) or {}).items():
        entries.setdefault(entry["content"], {"id": int(index), **entry})
    for token, index in source.json(ADDED).items():
        entry = tokenizer_json.added_token(index, token, token in special)
        entries.setdefault(token, {**entry, "normalized": token not in special})
    return {**data, "added_tokens": sorted(entries.values(), key=lambda entry: entry["id"])}, built_from


def _files(
    source: Source, data: dict[str, Any], config: dict[str, Any], added: dict[str, int], own_json: bool, as_it_is: bool
) -> tuple[dict[str, Path], dict[str, Mapping[str, Any]]]:
    """Files to copy as they are, and contents to write because they differ from the source's.

    `added` are the ids behind the vocabulary's own. `own_json`: tokenizer.json stands by itself, needing no others.
    `as_it_is`: nothing was added to it, so that all but the config stays byte for byte.
    """
    kept = [
        MODEL,
        CHAT_TEMPLATE,
        *([] if added else [VOCAB, MERGES]),
        *([JSON, SPECIAL_MAP, ADDED, TEKKEN] if as_it_is else []),  # tekken.json cannot say what was added
    ]
    copied = {name: source.files[name] for name in kept if name in source.files}
    wanted = {JSON: data, CONFIG: config, SPECIAL_MAP: tokenizer_config.special_map(source, config), ADDED: added}
    if own_json:
        gone = {*(set(kept) - set(source.built)), ADDED, *({SPECIAL_MAP} - set(source.files))}
        wanted = {name: content for name, content in wanted.items() if name not in gone}
    written: dict[str, Mapping[str, Any]] = {}
    for name, content in wanted.items():
        if name in source.files and source.json(name) == content:
            copied[name] = source.files[name]
        elif content:
            written[name] = content
    return copied, written


def _report(
    source: Source, extension: Extension, config: Mapping[str, Any], every: Mapping[str, int], base: int,
    overrides: Mapping[str, str], cut: Sequence[str], generation: Mapping[str, Any], doubted: bool, kept_tekken: bool,
) -> list[str]:  # fmt: skip
    """What was used and where it came from, a line each, and where text is cut otherwise than in training."""
    behind = sorted((index, token) for token, index in every.items() if index >= base)
    names = ", ".join(f"{token} = {index}" for index, token in behind)
    lines = [
        f"tokenizer from {source.origin}: {base} tokens, {JSON} "
        f"{'kept' if JSON in source.files else f'built from {source.vocabulary_file().name}'}",
        f"{'with' if extension.new_tokens else 'without'} new tokens; behind the vocabulary: {names or 'none'}",
    ]
    if TEKKEN in source.files and not kept_tekken:
        lines.append(f"{TEKKEN} is left out: it knows nothing of the tokens that were added or replaced")
    if doubted:
        lines.append(
            "the resharding tool has reset what the args say of added tokens; if training added some, give the flags"
        )
    lines += [f"{key} is {token} = {every[token]}, by --override_special_tokens" for key, token in overrides.items()]
    if "eos" in overrides and isinstance(generation.get("eos_token_id"), list):
        lines.append(f"the override replaces generation_config.json's list of eos ids, {generation['eos_token_id']}")
    lines += tokenizer_config.loadable(source.json(CONFIG))[1]
    name = str(config.get("tokenizer_class"))
    if name.removesuffix("Fast") in ("LlamaTokenizer", "CodeLlamaTokenizer"):
        lines.append(
            f"tokenizer_class {name} is kept: with it, transformers 5 adds no space before text that begins "
            "with one or (unless legacy is true) stands behind a special token; Megatron-LLM does"
        )
    for i, first in enumerate(cut):
        if longer := [token for token in cut[i + 1 :] if token.startswith(first)]:
            lines.append(
                f"training read {longer[0]} in text as {first} and a rest; the exported tokenizer reads it whole"
            )
    return lines
