"""Which files of a repository to take, from the names that it lists and the index that it holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path

from weights_conversion.errors import ConversionError

# In the order in which they are fetched: where the vocabulary is complete, so is everything before it.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json")
# Bytes of a config, a tokenizer file or an index; those of the default repositories are below 5 MB.
MAX_SMALL_BYTES = 64 << 20
FORMATS = (("model", ".safetensors"), ("pytorch_model", ".bin"))  # transformers' stems, the preferred one first


def choices(names: Collection[str]) -> list[list[str]]:
    """The sets of weight files that `names` offers, the best first; a lone index stands for its set.

    As in transformers, a whole file goes before an index. A set without an index is all that its files' own names
    count, in `names` or not.
    """
    found = []
    for stem, suffix in FORMATS:
        whole, index = f"{stem}{suffix}", f"{stem}{suffix}.index.json"
        shard = re.compile(rf"{stem}-\d{{5}}-of-(\d{{5}}){re.escape(suffix)}")
        counts = {match[1] for name in names if (match := shard.fullmatch(name))}
        if whole in names:
            found.append([whole])
        if index in names:
            found.append([index])
        elif len(counts) == 1:
            found += ([f"{stem}-{i:05}-of-{count}{suffix}" for i in range(1, int(count) + 1)] for count in counts)
    return found


def with_shards(files: list[str], folder: Path, repository: str) -> list[str]:
    """A choice with the shards that its index, if it is one, names: plain file names of the same format."""
    index = folder / files[0]
    if index.suffix != ".json":
        return files
    try:
        if index.stat().st_size > MAX_SMALL_BYTES:
            raise ValueError(f"{index.stat().st_size} bytes")
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not shards or not all(isinstance(name, str) for name in shards):
            raise ValueError("no file names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(
            f"{index.name} of repository {repository} is not an index of weight files: choose another --revision or "
            "--model-path."
        ) from error
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    if hostile := [name for name in shards if not re.fullmatch(rf"\w[\w.+-]*{re.escape(suffix)}", name, re.ASCII)]:
        raise ConversionError(
            f"{index.name} of repository {repository} names {few([repr(name) for name in hostile])}, which is no "
            f"{suffix} file beside it: do not use this repository, name another with --model-path."
        )
    return [*files, *shards]


def with_tensors(files: list[str], folder: Path, wants: Callable[[str], bool]) -> list[str]:
    """Those of a choice with its shards that hold a tensor which `wants` names; all, where no index says it."""
    index = folder / files[0]
    if index.suffix != ".json":
        return files
    held = {file for name, file in json.loads(index.read_bytes())["weight_map"].items() if wants(name)}
    return [name for name in files if name in held]


def few(names: list[str]) -> str:
    """Names for a sentence, the first three of them."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
