"""tokenizer.json of a tekken.json, Mistral's own file since Nemo, where a repository holds no other.

A tekken.json lists byte strings by rank, which is also the order of their merges (tiktoken's rule), and the special
tokens that stand before them. Its meaning is that of mistral_common/tokens/tokenizers/tekken.py.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from weights_conversion.tokenizer.tokenizer_json import added_token, template

# What files before version 7 leave out: ids 0 to 19.
SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
NAMED = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}


def is_tekken(data: Mapping[str, Any]) -> bool:
    """Whether a JSON file's content has the parts of a tekken.json, with the types that they must have."""
    config, vocab, special = data.get("config"), data.get("vocab"), data.get("special_tokens")
    if not isinstance(config, dict) or not isinstance(config.get("pattern"), str):
        return False
    rows, first = config.get("default_vocab_size"), config.get("default_num_special_tokens")
    if type(rows) is not int or type(first) is not int or not isinstance(vocab, list):
        return False
    if not 0 <= first < rows <= len(vocab) + first or not all(isinstance(item, dict) for item in vocab):
        return False
    if special is None:
        return first >= len(SPECIAL)
    named = isinstance(special, list) and all(isinstance(item, dict) for item in special)
    return named and len(special) <= first and all(isinstance(item.get("token_str"), str) for item in special)


def special_tokens(data: Mapping[str, Any]) -> dict[str, int]:
    """The special tokens by id: the file's own, and fillers up to the number that it states."""
    listed = data.get("special_tokens")
    names: Sequence[str] = SPECIAL if listed is None else [item["token_str"] for item in listed]
    ranks = {name: i if listed is None else int(listed[i].get("rank", i)) for i, name in enumerate(names)}
    taken = set(ranks.values())
    fillers = (i for i in range(data["config"]["default_num_special_tokens"]) if i not in taken)
    return ranks | {f"<SPECIAL_{i}>": i for i in fillers}


def build(data: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json with the ids of a tekken.json. Raises ValueError where its byte strings are none."""
    first, rows = data["config"]["default_num_special_tokens"], data["config"]["default_vocab_size"]
    try:
        pieces = [base64.b64decode(item["token_bytes"], validate=True) for item in data["vocab"][: rows - first]]
    except (binascii.Error, KeyError, TypeError) as error:
        raise ValueError(f"a token's bytes are not base64 ({error})") from error
    special, letters = special_tokens(data), _letters()
    ranks = {piece: i for i, piece in enumerate(pieces)}

    def text(piece: bytes) -> str:
        return "".join(letters[byte] for byte in piece)

    merges = []
    for piece in pieces:
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [[text(left), text(right)] for left, right in pairs]
    split = {
        "type": "Split", "pattern": {"Regex": data["config"]["pattern"]}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(i, name) for name, i in sorted(special.items(), key=lambda item: item[1])],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, by_bytes]},
        "post_processor": template(("<s>", special["<s>"]) if "<s>" in special else None),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": special | {text(piece): first + i for i, piece in enumerate(pieces)},
            "merges": merges,
        },
    }


def settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json for it."""
    special = special_tokens(data)
    return {
        **{f"{key}_token": token for key, token in NAMED.items() if token in special},
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 10**30,
    }


def _letters() -> dict[int, str]:
    """The letter for each byte in byte-level vocabularies: GPT-2's bytes_to_unicode, stated again."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
