"""How many rows of a Megatron checkpoint's embedding are tokens, and who says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weights_conversion.errors import ConversionError
from weights_conversion.formats.format import MegatronFiles
from weights_conversion.layouts.vocabulary import Vocabulary
from weights_conversion.mapping.dialects import MEGATRON_CORE

_GUESSES = {"the checkpoint (vocab_size)": "its vocab_size", "--reference": "the reference's vocab_size"}


@dataclass(frozen=True)
class Counted:
    """The vocabulary of a checkpoint, and what is to be said of it."""

    vocabulary: Vocabulary
    note: str
    warnings: tuple[str, ...] = ()


def stated_rows(args: Mapping[str, Any]) -> int | None:
    """The vocabulary that training had by its args or run_config.yaml (Megatron-Core's alone record it)."""
    rows = args.get("vocab_size")
    if type(rows) is not int or rows < 1:
        return None
    # this one counts its end-of-document token on top of what it is given
    return rows + 1 if args.get("tokenizer_type") == "NullTokenizer" else rows


def count(
    files: MegatronFiles, flag: int | None, said: Mapping[str, Any] | None, reference: int | None = None,
    *, may_grow: bool = False,
) -> Counted:  # fmt: skip
    """The rows that are tokens: by the flag, else by the manifest or training, whichever knows more, or `reference`.

    A tokenizer may have fewer tokens than its model has rows, which the manifest of an import knows; training may have
    added tokens to what was imported. `may_grow`: the flag is what another layout of the checkpoint is to have, so that
    it says of the stored rows which are tokens only where they are as many, and nothing states more.
    """
    if may_grow and flag is not None:
        recorded = count(files, None, said, reference)
        tokens, stored = recorded.vocabulary.tokens, files.vocabulary
        if flag > stored and not recorded.vocabulary.known:
            note = f"vocabulary {stored} rows, all kept: --true-vocab-size {flag} adds to them"
            return dataclasses.replace(recorded, note=note)
        if flag > stored or (recorded.vocabulary.known and flag <= tokens):
            return recorded
    stored, recorded = files.vocabulary, (said or {}).get("true_vocab_size")
    trained = stated_rows(files.args) if files.dialect is MEGATRON_CORE else None
    warnings: list[str] = []
    if trained is not None and trained > stored:
        if flag is None and recorded is None:
            warnings.append(f"args say vocab_size {trained}, but the embedding has {stored} rows, which are all kept")
        trained = None
    claims = {"--true_vocab_size": flag, "the manifest": recorded, "the checkpoint (vocab_size)": trained}
    given = {origin: rows for origin, rows in claims.items() if rows is not None}
    if not given and reference is not None:
        given["--reference"] = reference
    if not given:
        note = f"vocabulary {stored} rows, all kept: nothing records the true number (--true_vocab_size gives it)"
        return Counted(Vocabulary(stored, stored, known=False), note, tuple(warnings))
    origin = "--true_vocab_size" if flag is not None else max(given, key=lambda name: given[name])
    rows = given.pop(origin)
    if not isinstance(rows, int) or not 0 < rows <= stored:
        hint = "; name the model trained from" if origin == "--reference" else ""
        raise ConversionError(f"{origin} says {rows} vocabulary rows, but the embedding has {stored}{hint}")
    warnings += [
        f"{name} says {other} vocabulary rows, {origin} says {rows}, which are kept"
        for name, other in given.items()
        if other != rows
    ]
    if origin in _GUESSES and stored - rows >= _padding(files.args):
        warnings.append(
            f"of {stored} rows {stored - rows} are left out, since {_GUESSES[origin]} is {rows}: more than padding "
            "needs; --true_vocab_size keeps more"
        )
    cut = f", {stored - rows} padding rows left out" if rows < stored else ""
    return Counted(Vocabulary(rows, stored), f"vocabulary {rows} rows by {origin}{cut}", tuple(warnings))


def _padding(args: Mapping[str, Any]) -> int:
    """Rows to whose multiple training pads."""
    return (args.get("make_vocab_size_divisible_by") or 128) * (args.get("tensor_model_parallel_size") or 1)
