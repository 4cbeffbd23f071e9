"""What must hold before a tokenizer is exported: its ids are training's, each has a row, and it loads as such."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.tokenizer import apart, tokenizer_json
from weights_conversion.tokenizer.files import Source

_TEXT = "  two leading spaces,\n\n\ttabs\u3000and 1234567890 \U0001f98a na\u00efve \u00e9 </ \u2581 ends  "


def checked_ids(source: Source, data: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    """All ids: training's, and what else the tokenizer's own files hold. Raises where the two contradict each other."""
    found = tokenizer_json.all_ids(data)
    owner = {index: token for token, index in ids.items()}
    wrong = []
    for token, index in found.items():
        if ids.get(token, index) != index:
            wrong.append(f"{token} is {index}, in training {ids[token]}")
        elif owner.get(index, token) != token:
            wrong.append(f"{token} is {index}, in training that was {owner[index]}")
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ConversionError(
            f"ids of the tokenizer from {source.origin} differ from Megatron-LLM's: "
            f"{'; '.join(wrong[:8])}{more}. Name the "
            "tokenizer of training with --vocab_file, or say what it added with --no_new_tokens or "
            "--vocab_extra_ids_list."
        )
    return {**found, **ids}


def check_known(source: Source, named: Mapping[str, str], extras: list[str], ids: Mapping[str, int]) -> None:
    """Raises where the settings name tokens without an id, since a loader would invent one that has no row."""
    unknown = {f"{key}_token": token for key, token in named.items() if token not in ids}
    unknown |= {f"an additional special token ({i})": token for i, token in enumerate(extras) if token not in ids}
    if unknown:
        shown = ", ".join(f"{token} as {key}" for key, token in unknown.items())
        raise ConversionError(
            f"the settings of the tokenizer from {source.origin} name tokens that it does not have: {shown}; "
            "replace them with --override_special_tokens KEY=TOKEN, or name another tokenizer with --vocab_file."
        )


def check_loaded(data: Mapping[str, Any], expected: Mapping[str, int], built_from: Path | None) -> None:
    """Loads the tokenizer.json with the library that transformers uses, and compares every id.

    Where it was built here from a tokenizer.model, text with leading spaces, newlines, digits and bytes must also give
    sentencepiece's ids.
    """
    text = None if built_from is None else _TEXT
    try:
        loaded = apart.tokenizers(json.dumps(data), text)
    except ConversionError as error:
        raise ConversionError(f"the tokenizer.json cannot be loaded ({error}); name another --vocab_file.") from error
    actual = loaded["vocab"]
    if actual != expected:
        wrong = sorted(token for token in {**actual, **expected} if actual.get(token) != expected.get(token))
        shown = ", ".join(f"{token} at {actual.get(token)}, not {expected.get(token)}" for token in wrong[:8])
        raise ConversionError(f"{len(wrong)} tokens would load with another id than training's: {shown}.")
    if built_from is not None:
        model = fileio.read_whole(built_from, fileio.MAX_TOKENIZER_BYTES)
        if loaded["ids"] != apart.sentencepiece(model, text)["ids"]:
            raise ConversionError(
                f"the tokenizer.json built from {built_from} cuts text differently than sentencepiece does; "
                "give a folder that also holds the model's own tokenizer.json with --vocab_file."
            )


def row_problems(ids: Mapping[str, int], rows: int, base: int, extras: Iterable[str]) -> list[str]:
    """A sentence for each kind of token that training needs and whose id has no embedding row, with the flag for it.

    `ids` are the tokens of the vocabulary file and those that training added; `base` is the number of ids of the file
    itself, `extras` the extra tokens.
    """
    extras = set(extras)
    kinds: dict[str, list[str]] = {"pieces": [], "extras": [], "new": []}
    for token, i in sorted(ids.items(), key=lambda item: item[1]):
        if i >= rows:
            kinds["pieces" if i < base else "extras" if token in extras else "new"].append(f"{token} = {i}")
    remedies = {
        "pieces": "the tokenizer is not this model's (give the right one with --vocab_file)",
        "new": "training ran without them (--no_new_tokens)",
        "extras": "they are not the ones of training (--vocab_extra_ids_list)",
    }
    problems = []
    for kind, tokens in kinds.items():
        if tokens:
            names = ", ".join(tokens[:8]) + (f" and {len(tokens) - 8} more" if len(tokens) > 8 else "")
            problems.append(
                f"{len(tokens)} token{'s have' if len(tokens) > 1 else ' has'} no row in the exported embedding "
                f"of {rows} "
                f"rows: {names}; either {remedies[kind]}, or the exported rows are too few (--true_vocab_size)."
            )
    return problems


def rowless(ids: Mapping[str, int], rows: int) -> list[str]:
    """A sentence on tokens of the tokenizer's own files behind the model's rows, as fine-tunes have them; none is lost.

    Training never gave them to the model.
    """
    behind = [f"{token} = {i}" for token, i in sorted(ids.items(), key=lambda item: item[1]) if i >= rows]
    if not behind:
        return []
    shown = ", ".join(behind[:8]) + (f" and {len(behind) - 8} more" if len(behind) > 8 else "")
    return [
        f"{len(behind)} token{'s' if len(behind) > 1 else ''} of the tokenizer's own files stand behind the model's "
        f"{rows} rows, here as there: {shown}; text that holds one cannot be given to the model"
    ]


def check_default(source: Source, tokens: int, rows: int, known: bool, args: Mapping[str, Any]) -> None:
    """Raises where the family's usual tokenizer, which nothing names, has not the model's number of ids.

    `tokens` is their number. `known`: `rows` are without padding; else the padding that `args` ask for may be there.
    """
    if tokens == rows:
        return
    divisor, tp = (args.get(name) for name in ("make_vocab_size_divisible_by", "tensor_model_parallel_size"))
    if isinstance(divisor, int) and isinstance(tp, int) and divisor * tp > 0:
        fits = not known and rows == -(-tokens // (divisor * tp)) * divisor * tp
    else:
        fits = not known and 0 <= rows - tokens < 1024
    if not fits:
        raise ConversionError(
            f"the tokenizer of {source.origin.split(',')[0]} has {tokens} tokens and the model {rows} rows, so it is "
            "not this model's; name the tokenizer of training with --vocab_file, or leave it out with --no_tokenizer."
        )


def check_rows(
    source: Source, needed: Mapping[str, int], ids: Mapping[str, int], base: int, extras: Iterable[str],
    rows: tuple[int, bool], args: Mapping[str, Any],
) -> list[str]:  # fmt: skip
    """Warnings on tokens without a row; raises where one of `needed` has none, or a default has not the model's number.

    `rows` are those of the embedding, and whether they are without padding.
    """
    if problems := row_problems(needed, rows[0], base, extras):
        raise ConversionError(*problems)
    if source.default:
        check_default(source, max(ids.values()) + 1, *rows, args)
    return rowless({token: index for token, index in ids.items() if token not in needed}, rows[0])


def nameless(ids: int, source_rows: Any, rows: int) -> list[str]:
    """A warning where rows were added to the source's embedding and no token is known for them.

    `ids` is the tokenizer's last id plus one; a source may have rows behind its own tokens, which say nothing.
    """
    first = max(ids, source_rows) if type(source_rows) is int else rows
    if first >= rows:
        return []
    which = f"rows {first} to {rows - 1} have" if rows - first > 1 else f"row {first} has"
    return [
        f"{which} no token: the source's embedding had {source_rows} rows, the tokenizer has {ids} tokens; if training "
        "named them, --vocab_extra_ids_list A,B says how (and --new_tokens, that Megatron-LLM's five come first)"
    ]
