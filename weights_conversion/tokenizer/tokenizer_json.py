"""tokenizer.json as plain data: built from a sentencepiece model, and extended by tokens at given ids.

transformers' own conversion needs protobuf and, in version 5, changes with the tokenizer's class. A tokenizer.model is
five fields of two protocol-buffer messages (sentencepiece_model.proto), read here without that library.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # ModelProto.SentencePiece.Type
BPE = 2  # TrainerSpec.ModelType
SPACE = "\u2581"


@dataclass(frozen=True)
class SentencePieceModel:
    """What decides the ids of a text: pieces with score and type in id order, and how text is prepared."""

    pieces: tuple[tuple[str, float, int], ...]
    is_bpe: bool
    byte_fallback: bool
    identity: bool  # no character map, no collapsing of spaces, no whitespace rules other than Llama's
    add_dummy_prefix: bool


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one protocol-buffer message: int for varints, bytes for all other wire types."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(data):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) or (varint() if wire == 2 else None)
        if size is None or position + size > len(data):
            raise ValueError(f"wire type {wire} at byte {position}")
        yield key >> 3, data[position : position + size]
        position += size


def read_model(model_file: Path) -> SentencePieceModel:
    """The model's settings. Raises ConversionError where the file is no sentencepiece model."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(fileio.read_whole(model_file, fileio.MAX_TOKENIZER_BYTES)):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                pieces.append((piece.get(1, b"").decode(), score, piece.get(3, NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
    except (IndexError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise ConversionError(
            f"{model_file} is not a sentencepiece model ({error}); give the right file with --vocab_file."
        ) from error
    # Defaults of the proto: unigram, no byte fallback, dummy prefix, spaces collapsed, spaces escaped.
    identity = not normalizer.get(2) and not normalizer.get(4, 1) and bool(normalizer.get(5, 1)) and not trainer.get(24)
    return SentencePieceModel(
        tuple(pieces), trainer.get(3, 1) == BPE, bool(trainer.get(35, 0)), identity, bool(normalizer.get(3, 1))
    )


def _merges(model: SentencePieceModel) -> list[list[str]]:
    """All pairs of pieces that join to a piece, best score first: the order in which sentencepiece joins them."""
    ids = {piece: i for i, (piece, _, kind) in enumerate(model.pieces) if kind in (NORMAL, UNUSED)}
    ranked = []
    for piece, i in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                ranked.append((-model.pieces[i][1], i, ids[left], ids[right], [left, right]))
    ranked.sort(key=lambda entry: entry[:4])
    return [entry[4] for entry in ranked]


def added_token(index: int, content: str, special: bool = True) -> dict[str, Any]:
    """An entry of tokenizer.json's `added_tokens`: cut out of raw text, exactly as it stands."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": index, "content": content, **flags}


def template(bos: tuple[str, int] | None) -> dict[str, Any]:
    """The post-processor that sets `bos` (token, id) in front of every sequence."""
    first = [{"SpecialToken": {"id": bos[0], "type_id": 0}}] if bos else []
    second = [{"SpecialToken": {"id": bos[0], "type_id": 1}}] if bos else []
    single = [*first, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *second, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos[0]: {"id": bos[0], "ids": [bos[1]], "tokens": [bos[0]]}} if bos else {},
    }


def build(model_file: Path, bos: str | None, legacy: bool = True, add_prefix_space: bool = True) -> dict[str, Any]:
    """tokenizer.json of a Llama-like tokenizer.model.

    `legacy` puts the dummy prefix before the text and behind every special token, as sentencepiece and Megatron-LLM do;
    otherwise it stands before the text only. Raises ConversionError for settings that are not Llama's.
    """
    model = read_model(model_file)
    if not (model.is_bpe and model.identity and model.add_dummy_prefix):
        raise ConversionError(
            f"{model_file} is not a BPE model with Llama's settings (identity normalisation, spaces kept, dummy "
            "prefix), "
            "so no tokenizer.json can be built from it; give a folder that also holds tokenizer.json with --vocab_file."
        )
    ids = {piece: i for i, (piece, _, _) in enumerate(model.pieces)}
    prefix = [{"type": "Prepend", "prepend": SPACE}] if add_prefix_space else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    scheme = "first" if add_prefix_space else "never"
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if add_prefix_space else []
    added = [added_token(i, piece, False) for i, (piece, _, kind) in enumerate(model.pieces) if kind == USER_DEFINED]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, replace]} if legacy else None,
        "pre_tokenizer": None if legacy else metaspace,
        "post_processor": template((bos, ids[bos]) if bos is not None else None),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": _bpe(model, ids),
    }


def _bpe(model: SentencePieceModel, ids: Mapping[str, int]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next((piece for piece, _, kind in model.pieces if kind == UNKNOWN), None),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": ids,
        "merges": _merges(model),
    }


def model_vocabulary(data: Mapping[str, Any]) -> dict[str, int]:
    """Token ids of the model inside a tokenizer.json, without its added tokens."""
    vocabulary = data["model"]["vocab"]
    if isinstance(vocabulary, Mapping):
        return dict(vocabulary)
    return {entry[0]: i for i, entry in enumerate(vocabulary)}  # Unigram: [token, score]


def all_ids(data: Mapping[str, Any]) -> dict[str, int]:
    """Token ids of a tokenizer.json, added tokens included."""
    return {**model_vocabulary(data), **{entry["content"]: entry["id"] for entry in data.get("added_tokens") or []}}


def with_special(data: dict[str, Any], tokens: Iterable[tuple[str, int]]) -> dict[str, Any]:
    """The tokenizer.json with these (token, id) among its added tokens, marked special; entries that are there stay."""
    entries = {entry["content"]: entry for entry in data.get("added_tokens") or []}
    for token, index in tokens:
        entries[token] = {**entries.get(token, added_token(index, token)), "special": True}
    return {**data, "added_tokens": sorted(entries.values(), key=lambda entry: entry["id"])}


def with_replaced_special(data: dict[str, Any], replaced: Mapping[str, tuple[str, int]]) -> dict[str, Any]:
    """The tokenizer.json whose post-processor sets a new (token, id) wherever it set the old token, all at once."""

    def swap_item(item: dict[str, Any]) -> dict[str, Any]:
        old = item.get("SpecialToken", {}).get("id")
        return {"SpecialToken": {**item["SpecialToken"], "id": replaced[old][0]}} if old in replaced else item

    def swap(node: Any) -> Any:
        if isinstance(node, list):
            return [swap(item) for item in node]
        if not isinstance(node, dict):
            return node
        if node.get("type") != "TemplateProcessing":
            return {key: swap(value) for key, value in node.items()}
        special = {token: entry for token, entry in node["special_tokens"].items() if token not in replaced}
        for token, index in (replaced[old] for old in node["special_tokens"] if old in replaced):
            special[token] = {"id": token, "ids": [index], "tokens": [token]}
        sides = {side: [swap_item(item) for item in node[side]] for side in ("single", "pair")}
        return {**node, **sides, "special_tokens": special}

    return {**data, "post_processor": swap(data.get("post_processor"))} if replaced else data
