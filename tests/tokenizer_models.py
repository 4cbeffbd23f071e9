"""Tiny tokenizers made on the spot, and Megatron-LLM's tokenizers stated a second time, from sentencepiece alone."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2  # needs protobuf, which the package itself does not

from weights_conversion.tokenizer import TokenizerPlan
from weights_conversion.tokenizer.special_tokens import Extension, token_ids
from weights_conversion.tokenizer.vocabulary import read_sentencepiece

SPACE = "\u2581"
SENTENCES = [
    "the quick brown fox jumps over the lazy dog and then the dog sleeps",
    "def main(argument):  return argument + 1  # a comment, in the code",
    "user: what is the capital of France? assistant: the capital is Paris.",
    "the theory of the thing is that there are others then these or those",
    "    indented lines     with many spaces,   and more of them    here",
    "quickly the bread and the butter were eaten by the other brothers",
    "na\u00efve caf\u00e9 d\u00e9j\u00e0 vu, \u00fcber die Br\u00fccke",
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440",
    "<CLS > [INST] not a token </ s> <extra_id> <|im_start|> a < b > c",
]
TEXTS = [
    "",
    " ",
    "the quick brown fox",
    " a leading space",
    "   three leading spaces",
    "a trailing space ",
    "two  inner   spaces",
    "\n",
    "a line\n\nand\tanother\n  indented",
    "12345 67 8.9",
    "emoji \U0001f98a and \U0001f468\u200d\U0001f469\u200d\U0001f467, \u65e5\u672c\u8a9e, na\u00efve",
    "not quite </ s> or <CLS or [INST]",
    "\u2581 and \u00a0 and \u3000",
]


def train(
    path: Path, pad: bool = False, vocab_size: int = 400, extra_pieces: tuple[str, ...] = (), **settings: object
) -> Path:
    """Writes a sentencepiece model with Llama's settings; `extra_pieces` are appended as ordinary pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        **{
            "model_type": "bpe",
            "vocab_size": vocab_size,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "split_digits": True,
            "allow_whitespace_only_pieces": True,
            "pad_id": 3 if pad else -1,
            "minloglevel": 2,
            **settings,
        },
    )
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    proto.ParseFromString(model.getvalue())
    for i, piece in enumerate(extra_pieces):
        proto.pieces.add(piece=piece, score=-float(1000 + i))
    path.write_bytes(proto.SerializeToString())
    return path


# The order of CodeLlama's 16 pieces behind Llama's 32000: parts first, then the four whole infilling tokens.
INFILLING_PIECES = (
    *(SPACE + part for part in ("<SU", "<SUF", "<PRE", "<M", "<MID", "<E", "<EOT")),
    *(SPACE + token for token in ("<PRE>", "<SUF>", "<MID>", "<EOT>")),
    *(f"unused{i}" for i in range(5)),
)


class MegatronSentencePiece:
    """What training does to text: cut at the leftmost special token, sentencepiece for what lies between.

    Written from the description of the rule, as plainly as can be, to compare with.
    """

    def __init__(self, model: Path, new_tokens: bool = False, extra_ids: int = 0, extras: str | None = None):
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(model))
        names = [self.model.IdToPiece(i) for i in range(self.model.GetPieceSize())]
        pad = self.model.IdToPiece(self.model.pad_id()) if self.model.pad_id() != -1 else "<PAD>"
        ends = [self.model.IdToPiece(self.model.bos_id()), self.model.IdToPiece(self.model.eos_id())]
        wanted = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", pad] if new_tokens else []
        wanted += ends + [f"<extra_id_{i}>" for i in range(extra_ids)] + (extras.split(",") if extras else [])
        for name in wanted:
            if name not in names:
                names.append(name)
        self.ids = {name: i for i, name in enumerate(names)}
        self.special = wanted

    def encode(self, text: str) -> list[int]:
        hits = [(text.index(token), rank) for rank, token in enumerate(self.special) if token in text]
        if not hits:
            return self.model.EncodeAsIds(text)
        at, rank = min(hits)
        token = self.special[rank]
        return [*self.model.EncodeAsIds(text[:at]), self.ids[token], *self.encode(text[at + len(token) :])]


def train_llama3(folder: Path, vocab_size: int = 300, spare: int = 1) -> Path:
    """Writes a folder like Llama 3's: byte-level tokenizer.json alone, bos and eos among the added tokens behind it.

    `spare` tokens lie between the two.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    spares = [f"<|reserved_{i}|>" for i in range(spare)]
    tokenizer.add_special_tokens(["<|begin_of_text|>", *spares, "<|end_of_text|>"])
    folder.mkdir(parents=True)
    data = json.loads(tokenizer.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
    settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "model_max_length": 8192}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "vocab.json").write_text(json.dumps(data["model"]["vocab"]))
    merges = [" ".join(pair) for pair in data["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return folder


def ids_of(folder: Path) -> dict[str, int]:
    """The ids in a folder's tokenizer.json."""
    data = json.loads((folder / "tokenizer.json").read_text())
    return {**data["model"]["vocab"], **{entry["content"]: entry["id"] for entry in data["added_tokens"]}}


FALCON_SPECIAL = [
    *(f">>{name}<<" for name in ("TITLE", "ABSTRACT", "INTRODUCTION", "SUMMARY", "COMMENT", "ANSWER", "QUESTION")),
    *(f">>{name}<<" for name in ("DOMAIN", "PREFIX", "SUFFIX", "MIDDLE")),
    "<|endoftext|>",
]


def train_falcon(folder: Path, vocab_size: int = 320) -> Path:
    """Writes a folder like tiiuae/falcon-40b's: byte-level BPE in tokenizer.json, special tokens at ids 0 to 11."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=FALCON_SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_prefix_space": False,
        "eos_token": "<|endoftext|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 2048,
        "special_tokens_map_file": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    special = {"additional_special_tokens": FALCON_SPECIAL[:-1], "eos_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


def hub_folder(
    folder: Path, model: Path, class_name: str, legacy: bool | None, added: dict[str, int] | None = None
) -> Path:
    """A folder as version 4 of transformers writes it: tokenizer.model, its conversion to tokenizer.json, settings.

    `legacy` False: tokenizer.json with Metaspace, as with `legacy: false`; else with the prepending normalizer, and
    None leaves the flag out. `added` are tokens that the source has behind its pieces.
    """
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_name}))
    converted = getattr(transformers, class_name + "Fast").from_pretrained(folder)
    data = json.loads(converted.backend_tokenizer.to_str())
    data["added_tokens"] = [entry for entry in data["added_tokens"] if entry["content"] != "<FILL_ME>"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"] += [{"id": i, "content": token, **flags} for token, i in (added or {}).items()]
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
    data["normalizer"] = None if legacy is False else prepend
    data["pre_tokenizer"] = metaspace if legacy is False else None
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    single = [start, {"Sequence": {"id": "A", "type_id": 0}}]
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    infilling = [f"{SPACE}<{name}>" for name in ("PRE", "MID", "SUF", "EOT")] if class_name.startswith("Code") else []
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in data["added_tokens"]
        },
        **({"additional_special_tokens": infilling} if infilling else {}),
        "bos_token": "<s>",
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        **({} if legacy is None else {"legacy": legacy}),
        "model_max_length": 4096,
        "pad_token": None,
        "tokenizer_class": class_name,
        "unk_token": "<unk>",
    }
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    special = {key: {"content": config[key], **plain} for key in ("bos_token", "eos_token", "unk_token")}
    special_map = {**special, **({"additional_special_tokens": infilling} if infilling else {})}
    for name, content in (
        ("tokenizer.json", data),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special_map),
    ):
        (folder / name).write_text(json.dumps(content))
    return folder


def hub_encode(model: Path, ids: dict[str, int], special: list[str], text: str, scheme: str) -> list[int]:
    """Ids of a text, from sentencepiece, under one of transformers' rules for the space in front.

    training: in front of each part between special tokens; always: the same, but not in front of a part that begins
    with a space; first: like always, but only at the very start of the text.
    """
    prefixing = sentencepiece.SentencePieceProcessor(model_file=str(model))
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    proto.ParseFromString(model.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = False
    plain = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    result: list[int] = []
    parts = re.split("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")", text)
    for i, part in enumerate(parts):
        if i % 2:
            result.append(ids[part])
            continue
        spaced = part.startswith((" ", SPACE))
        prefix = scheme == "training" or (not spaced and (scheme == "always" or i == 0))
        result += (prefixing if prefix else plain).EncodeAsIds(part)
    return result


def write(plan: TokenizerPlan, folder: Path) -> None:
    """A planned tokenizer's files, as an export writes them."""
    for name, path in plan.copied.items():
        shutil.copyfile(path, folder / name)
    for name, content in plan.written.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def megatron_token_ids(
    model_file: Path, new_tokens: bool = True, vocab_extra_ids: int = 0, vocab_extra_ids_list: str | None = None
) -> dict[str, int]:
    """The id of every token, as the converter has it, where training added tokens to a tokenizer.model."""
    return token_ids(read_sentencepiece(model_file), Extension(new_tokens, vocab_extra_ids, vocab_extra_ids_list))
