"""tokenizer_config.json and its companions: the source's settings kept, training's special tokens set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from weights_conversion.architectures import FAMILIES
from weights_conversion.tokenizer.files import CONFIG, SPECIAL_MAP, Source, json_alone
from weights_conversion.tokenizer.special_tokens import KEYS
from weights_conversion.tokenizer.vocabulary import Vocabulary

EXTRAS, DECODER = "additional_special_tokens", "added_tokens_decoder"
PLAIN = "PreTrainedTokenizerFast"
FILL = "<FILL_ME>"  # where CodeLlama's tokenizer cuts a prompt in two; never an input of the model, so without a row
INFILLING = {"prefix": "\u2581<PRE>", "middle": "\u2581<MID>", "suffix": "\u2581<SUF>", "eot": "\u2581<EOT>"}

# Classes that both transformers 4.57 and 5 have and that read what is exported. Any other name (version 5's
# TokenizersBackend, LLaMATokenizer of the first weeks, a class of the repository's own code) loads in one of the two
# at most: tokenizer.json, which is always written, is then read by the general class.
CLASSES = {
    "CodeLlamaTokenizer",
    "GPT2Tokenizer",
    "GemmaTokenizer",
    "LlamaTokenizer",
    "PreTrainedTokenizer",
    "Qwen2Tokenizer",
}


def text_of(token: Any) -> Any:
    """The token of an entry, which is a string, or a dict with flags."""
    return token.get("content") if isinstance(token, Mapping) else token


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json names, by key (bos, eos, ...)."""
    named = {key: text_of(config.get(f"{key}_token")) for key in KEYS}
    return {key: token for key, token in named.items() if token is not None}


def extra_tokens(config: Mapping[str, Any]) -> list[str]:
    """The additional special tokens that a tokenizer_config.json lists."""
    return [text_of(token) for token in config.get(EXTRAS) or []]


def fill_token(family: str, config: Mapping[str, Any]) -> str | None:
    """CodeLlama's fill token: its class gives it an id behind all others, and no text ever becomes that id."""
    return text_of(config.get("fill_token", FILL)) if FAMILIES[family].infills else None


def without_fill(config: dict[str, Any], fill: str) -> dict[str, Any]:
    """The config without the fill token's id, which training gave to another token; the key `fill_token` stays."""
    decoder = {index: entry for index, entry in (config.get(DECODER) or {}).items() if entry["content"] != fill}
    extras = [token for token in config.get(EXTRAS) or [] if text_of(token) != fill]
    return {**config, **{key: value for key, value in ((DECODER, decoder), (EXTRAS, extras)) if key in config}}


def loadable(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(a tokenizer_config.json that transformers 4 and 5 both read, without code of its own; what was left out).

    A class that either lacks, or that the repository brought as code, is left out: tokenizer.json, which is always
    written, holds everything that decides an id.
    """
    config, notes = dict(config), []
    code = config.pop("auto_map", None)
    if code is not None:
        notes.append(f"{CONFIG}: auto_map is left out, since its code is neither copied nor run ({code!r:.120})")
    for key in [key for key in config if key.endswith("_file")]:  # of another folder, which transformers would open
        if (path := config.pop(key)) is not None:
            notes.append(f"{CONFIG}: {key} is left out, since it names a file of another folder ({path!r:.120})")
    name = config.get("tokenizer_class")
    if name is not None and (not isinstance(name, str) or name.removesuffix("Fast") not in CLASSES):
        config.pop("tokenizer_class")
        if name != "TokenizersBackend":  # version 5's name of the class that is written
            notes.append(
                f"{CONFIG}: tokenizer_class {name!r:.80} is not in transformers 4.57 and 5; another is written"
            )
    if isinstance(config.get("extra_special_tokens"), list):  # version 5's spelling, refused by version 4
        config[EXTRAS] = config.pop("extra_special_tokens")
    return config, notes


def starting_config(family: str, source: Source, vocabulary: Vocabulary) -> dict[str, Any]:
    """The source's tokenizer_config.json as `loadable` has it; where there is none, Llama's for a tokenizer.model.

    A tokenizer.json that stands without a tokenizer.model needs nothing more than its own settings.
    """
    given = source.json(CONFIG)
    config, _ = loadable(given)
    own_json = source.own_json(family)
    if own_json and source.has(CONFIG) and not str(config.get("tokenizer_class")).startswith("CodeLlama"):
        return config if given.get("tokenizer_class") is None else {"tokenizer_class": PLAIN, **config}
    if DECODER not in config:
        # Once added_tokens_decoder is there, transformers no longer reads special_tokens_map.json.
        for key, token in source.json(SPECIAL_MAP).items():
            if not config.get(key):
                config[key] = [text_of(item) for item in token] if isinstance(token, list) else text_of(token)
    if CONFIG not in source.files:
        llama = {"add_bos_token": True, "add_eos_token": False, "legacy": True, "padding_side": "left"}
        config = {
            **({} if json_alone(family) or own_json else llama),
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 10**30,
            **config,
        }
    for key in ("bos", "eos", "unk"):
        if not config.get(f"{key}_token") and getattr(vocabulary, key) is not None:
            config[f"{key}_token"] = getattr(vocabulary, key)
    infills = FAMILIES[family].infills and set(INFILLING.values()) <= set(vocabulary.pieces)
    # Not LlamaTokenizer where the choice is ours: version 5 ignores tokenizer.json's normalizer for that class, and a
    # leading space is lost. CodeLlamaTokenizer is needed for infilling.
    config.setdefault("tokenizer_class", "CodeLlamaTokenizer" if infills else PLAIN)
    if str(config["tokenizer_class"]).startswith("CodeLlama") and not infills:
        config |= {f"{key}_token": None for key in (*INFILLING, "fill")}  # else the class adds them, without rows
    return config


def with_tokens(
    config: Mapping[str, Any],
    named: Mapping[str, str],
    extras: Iterable[str],
    data: Mapping[str, Any],
    cut: set[str],
    differs: bool,
) -> dict[str, Any]:
    """The config with these tokens by key, these additional special tokens, and the added tokens of tokenizer.json.

    `cut` are the tokens that training cut out of text: theirs are the entries of tokenizer.json, whatever the source
    says of them. `differs`: whether that tokenizer.json is another than the source's.
    """
    changed: dict[str, Any] = {}
    for key, token in named.items():
        if text_of(config.get(f"{key}_token")) != token:
            changed[f"{key}_token"] = token
    missing = [token for token in extras if token not in extra_tokens(config)]
    if missing:
        changed[EXTRAS] = [*(config.get(EXTRAS) or []), *missing]
    decoder = {}
    source_decoder = config.get(DECODER) or {}
    for entry in data.get("added_tokens") or []:
        flags = {key: value for key, value in entry.items() if key != "id"}
        own = source_decoder.get(str(entry["id"]))
        keeps = own is not None and (own.get("special") or entry["content"] not in cut)
        decoder[str(entry["id"])] = own if keeps else flags
    if decoder != source_decoder and (changed or differs):
        changed[DECODER] = decoder
    return {**config, **changed}


def special_map(source: Source, config: Mapping[str, Any]) -> dict[str, Any]:
    """special_tokens_map.json that agrees with the config; entries of the source that still hold are kept."""
    content: dict[str, Any] = source.json(SPECIAL_MAP)
    for key, token in named_tokens(config).items():
        if text_of(content.get(f"{key}_token")) != token:
            content[f"{key}_token"] = token
    extras = extra_tokens(config)
    if extras != extra_tokens(content):
        content[EXTRAS] = extras
    return content
