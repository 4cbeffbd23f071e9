"""Which id Megatron-LLM gives to every token: its rule, stated once, from the vocabulary file alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from weights_conversion.errors import ConversionError
from weights_conversion.tokenizer.files import json_alone
from weights_conversion.tokenizer.vocabulary import Vocabulary

KEYS = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
CONFIG_KEYS = ("bos", "eos", "pad")  # those that config.json and generation_config.json hold the id of
OTHER_TYPES = ("BertWordPieceCase", "BertWordPieceLowerCase", "FalconTokenizer", "GPT2BPETokenizer")
NEW_TOKENS = {"cls": "<CLS>", "sep": "<SEP>", "eod": "<EOD>", "mask": "<MASK>"}


@dataclass(frozen=True)
class Extension:
    """What training added to the vocabulary file, as Megatron-LLM's arguments of the same names say it."""

    new_tokens: bool = False
    vocab_extra_ids: int = 0
    vocab_extra_ids_list: str | None = None

    @property
    def extras(self) -> tuple[str, ...]:
        """The extra tokens in the order in which they get their ids; they are not stripped, as in training."""
        numbered = [f"<extra_id_{i}>" for i in range(self.vocab_extra_ids)]
        listed = self.vocab_extra_ids_list.split(",") if self.vocab_extra_ids_list else []
        if "" in listed:
            raise ConversionError(
                f"vocab_extra_ids_list {self.vocab_extra_ids_list!r} holds an empty token; "
                "give --vocab_extra_ids_list tokens separated by single commas, without one at the end."
            )
        return tuple(dict.fromkeys([*numbered, *listed]))


def added_tokens(vocabulary: Vocabulary, extension: Extension) -> tuple[str, ...]:
    """Megatron-LLM's special tokens in the order in which its SentencePieceTokenizer registers them.

    Some are pieces already (bos, eos, often pad) and keep their ids. Extra tokens are registered with and without
    `new_tokens`; without them there is no pad token either, and training pads with eos.
    """
    tokens: list[str] = []
    if extension.new_tokens:
        tokens += [
            *NEW_TOKENS.values(),
            vocabulary.pad or "<PAD>",
            vocabulary.bos or "<BOS>",
            vocabulary.eos or "<EOS>",
        ]
    else:
        tokens += [token for token in (vocabulary.bos, vocabulary.eos) if token is not None]
    return tuple(dict.fromkeys([*tokens, *extension.extras]))


def token_ids(vocabulary: Vocabulary, extension: Extension) -> dict[str, int]:
    """Every token and its id: the pieces, then each added token that is not a piece at the next free id."""
    ids = {piece: i for i, piece in enumerate(vocabulary.pieces)}
    for token in added_tokens(vocabulary, extension):
        ids.setdefault(token, len(ids))
    return ids


def falcon_token_ids(base: Mapping[str, int], extension: Extension) -> dict[str, int]:
    """Ids of Megatron-LLM's FalconTokenizer: the listed extras behind the base, and only with `new_tokens`."""
    ids = dict(base)
    for token in Extension(vocab_extra_ids_list=extension.vocab_extra_ids_list).extras if extension.new_tokens else ():
        ids.setdefault(token, len(ids))
    return ids


def trusted_args(family: str, args: Mapping[str, Any], chosen: bool = False) -> dict[str, Any]:
    """What the checkpoint's arguments really say of its tokenizer: nothing, where the resharding tool has reset them.

    `chosen`: the user has named a tokenizer that stands for whatever type Megatron-Core trained with.
    Raises ConversionError for a tokenizer type whose ids cannot be reproduced, or that is another family's.
    """
    from weights_conversion.configs.megatron_args import was_reset

    kind = args.get("tokenizer_type")
    wrong = kind == "SentencePieceTokenizer" if json_alone(family) else kind in OTHER_TYPES
    if wrong and not chosen:
        raise ConversionError(
            f"the checkpoint's args name tokenizer_type {kind}, which is not {family}'s; give the right --model, name "
            "the same tokenizer in Hugging Face's files with --vocab_file (of Megatron-Core's models), or export the "
            "weights alone with --no_tokenizer."
        )
    names = ("new_tokens", "vocab_extra_ids", "vocab_extra_ids_list", "vocab_file", "tokenizer_model")
    return {} if was_reset(args) else {name: args[name] for name in names if args.get(name) is not None}


def stated_extension(args: Mapping[str, Any], kind: str | None, core: bool) -> Extension:
    """What the (trusted) arguments say that training added, with tokenizer type `kind`.

    Of Megatron-Core's types only SentencePieceTokenizer adds tokens, always and by the same rule; but a checkpoint that
    came from Megatron-LLM keeps what was added there.
    """
    if core and "new_tokens" not in args:
        adds = kind == "SentencePieceTokenizer"
        return Extension(adds, int(args.get("vocab_extra_ids") or 0) if adds else 0)
    return Extension(
        bool(args.get("new_tokens")), int(args.get("vocab_extra_ids") or 0), args.get("vocab_extra_ids_list") or None
    )


def resolve_extension(family: str, stated: Extension, new_tokens: bool | None, listed: str | None) -> Extension:
    """The flags where they are given, else what training stated."""
    extension = Extension(
        stated.new_tokens if new_tokens is None else new_tokens,
        stated.vocab_extra_ids,
        stated.vocab_extra_ids_list if listed is None else listed,
    )
    if json_alone(family) and listed and not extension.new_tokens:
        raise ConversionError(
            f"--vocab_extra_ids_list {listed} names extra tokens, but {family}'s tokenizer has them only where "
            "training ran with new tokens, and neither the checkpoint nor a flag says so; add --new_tokens, or drop "
            "the list."
        )
    return extension


def contradictions(
    stated: Extension, used: Extension, ids_stated: Mapping[str, int], ids_used: Mapping[str, int]
) -> list[str]:
    """Sentences on flags that say otherwise than training's args, with the tokens whose ids differ by that."""
    flags = []
    if used.new_tokens != stated.new_tokens:
        flag = "--new_tokens" if used.new_tokens else "--no_new_tokens"
        flags.append(f"{flag} is used over the args' new_tokens {stated.new_tokens}")
    if (used.vocab_extra_ids_list or "") != (stated.vocab_extra_ids_list or ""):
        flags.append(
            f"--vocab_extra_ids_list {used.vocab_extra_ids_list or repr('')} is used over the args' "
            f"{stated.vocab_extra_ids_list or 'none'}"
        )
    moved = [
        f"{token} = {ids_used.get(token, 'no token')} (by the args {ids_stated.get(token, 'no token')})"
        for token in dict.fromkeys([*ids_used, *ids_stated])
        if ids_used.get(token) != ids_stated.get(token)
    ]
    shown = ", ".join(moved[:8]) + (f" and {len(moved) - 8} more" if len(moved) > 8 else "")
    return [f"{sentence}; ids that differ from training's by its args: {shown or 'none'}" for sentence in flags]


def parse_overrides(overrides: Iterable[str], ids: Mapping[str, int], special: Iterable[str]) -> dict[str, str]:
    """`KEY=TOKEN` pairs as {key: token}; only the first "=" separates. Raises one ConversionError with all problems."""
    special = list(dict.fromkeys(special))
    shown = ", ".join(special[:40]) + (f" and {len(special) - 40} more" if len(special) > 40 else "")
    parsed: dict[str, str] = {}
    problems = []
    for override in overrides:
        key, separator, token = override.partition("=")
        if not separator or not token:
            problems.append(f"--override_special_tokens {override!r} is not of the form KEY=TOKEN, as in eos=</s>.")
        elif key not in KEYS:
            problems.append(f"--override_special_tokens {override!r}: {key!r} is none of the keys {', '.join(KEYS)}.")
        elif token not in ids:
            problems.append(
                f"--override_special_tokens {override!r}: the tokenizer has no token {token!r}; it has the special "
                f"tokens {shown}, and its {len(ids)} ordinary and special tokens are all allowed."
            )
        elif parsed.get(key, token) != token:
            problems.append(f"--override_special_tokens gives {key} twice: {parsed[key]!r} and {token!r}; keep one.")
        else:
            parsed[key] = token
    if problems:
        raise ConversionError(*problems)
    return parsed
