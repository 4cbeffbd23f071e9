"""--reference: a Hugging Face model that states what Megatron's args cannot carry (ids, generation config, tokenizer).

Its weights are not read. What it says of the model itself must agree with the checkpoint: sizes that differ are an
error, numbers that no shape betrays are a warning, and the checkpoint's are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from weights_conversion.architectures import FAMILIES
from weights_conversion.config import ModelConfig, Parallelism
from weights_conversion.configs import core_args, hf_config, hf_outer, manifest, parts
from weights_conversion.configs.generation import read as read_generation
from weights_conversion.configs.megatron_args import NAMES, SILENT
from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.files.owners import is_closed, stranger
from weights_conversion.launch import distributed
from weights_conversion.mapping.dialects import MEGATRON_CORE, MEGATRON_LLM

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Reference:
    """An opened reference: `name` as the user gave it, and its config.json and generation_config.json."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None
    commit: str | None = None  # of a repository

    def model(self, family: str) -> ModelConfig:
        """The model that it states, in the dialect that can express most."""
        where = f"config.json of {self.name}"
        target = MEGATRON_LLM if FAMILIES[family].parallel_attention else MEGATRON_CORE
        return hf_config.read_config(family, self.config, target, where)


@dataclass(frozen=True)
class Stated:
    """config.json and generation_config.json that the exported ones begin as; {}: nothing states them.

    `where` names them for errors, `of` in a few words for the report: the source, or the reference. `notes`: where two
    state them otherwise.
    """

    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    where: str
    of: str = "source"
    notes: tuple[str, ...] = ()


def stated(said: Mapping[str, Any] | None, reference: Reference | None, *, chosen: bool) -> Stated:
    """What a manifest (`said`) or the reference states: the latter's first where it was `chosen` by a flag."""
    config = dict((said or {}).get("config") or {})
    generation = dict((said or {}).get("generation_config") or {})
    if reference is None or (config and not chosen):
        if reference is not None and not generation:
            generation = dict(reference.generation_config or {})
        return Stated(config, generation, f"the config in {manifest.NAME}")
    its, its_generation = reference.config, reference.generation_config
    pairs = [(key, its.get(key), config.get(key), "") for key in _IDS] if config else []
    if generation and its_generation is not None:
        keys = dict.fromkeys([*its_generation, *generation])
        pairs += [(key, its_generation.get(key), generation.get(key), " of generation_config.json") for key in keys]
    notes = tuple(
        f"reference  {key}{of} is {one!r} in {reference.name}, which is used, and {two!r} in the manifest"
        for key, one, two, of in pairs
        if one != two and not key.startswith("_") and key != "transformers_version"
    )
    kept = generation if its_generation is None else its_generation
    return Stated(dict(its), dict(kept), f"config.json of {reference.name}", "reference", notes)


def beside(folder: Path) -> Path | None:
    """verl's config of the model that it trains, in Hugging Face's form: huggingface/ beside the weights' folder."""
    config = folder.parent / "huggingface" / "config.json"
    return config.parent if fileio.is_file(config) else None


def args_beside(folder: Path) -> dict[str, Any] | None:
    """Args of Megatron-Core for the model that `beside` states, vocabulary included; None where nothing does."""
    place = beside(folder)
    if place is None:
        return None
    reference = open_reference(str(place), None)
    kind = hf_outer.model_type(reference.config)
    families = [name for name, family in FAMILIES.items() if kind in family.model_types]
    if not families:
        raise ConversionError(f"{place / 'config.json'} says model_type {kind!r}, which none of the families has")
    config = reference.model(families[-1])  # of Llama's, the one whose rope can be any
    args = core_args.write_args(
        config, Parallelism(), dtype=torch.bfloat16, divisible_by=1, ckpt_format="torch_dist", vocabulary=None
    )
    return args | {"vocab_size": config.vocab_size}


def open_reference(name: str, cache: Path | None) -> Reference:
    """Opens a local folder or fetches a repository's small files. Raises ConversionError."""
    local, commit = Path(name).expanduser(), None
    if fileio.is_folder(local):
        folder = local
    else:
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise ConversionError(f"--reference {name} is neither a folder here nor the name of a repository")
        from weights_conversion.hub import repositories

        with distributed.rank_zero_first("reference"):
            found = repositories.snapshot(name, cache_dir=cache, weights=False)
        folder, commit = found.folder, found.revision
    if not fileio.is_file(folder / "config.json"):
        raise ConversionError(f"--reference {name} holds no config.json; name a Hugging Face model")
    return Reference(name, folder, fileio.read_json(folder / "config.json"), read_generation(folder), commit)


def disagreements(reference: Reference, config: ModelConfig) -> list[str]:
    """Warnings on values that differ from the checkpoint's. Raises ConversionError where it is another model."""
    stated = reference.model(config.family)
    warnings, problems = [], []
    for field in fields(ModelConfig):
        name = field.name
        mine, its = getattr(config, name), getattr(stated, name)
        if mine == its or name == "family":
            continue
        shown, silent = NAMES.get(name, name), name in (*SILENT, "mtp_num_layers") or parts.is_silent(mine, its)
        mine, its = parts.shown(name, mine, its), parts.shown(name, its, mine)
        if silent:
            warnings.append(
                f"{shown} is {mine} in the checkpoint, which is used, and {its} in --reference {reference.name}"
            )
        elif name == "vocab_size":
            warnings.append(f"the vocabulary has {mine} rows here, and {its} in --reference {reference.name}")
        else:
            problems.append(f"{shown} is {mine} in the checkpoint and {its} in --reference {reference.name}")
    if problems:
        raise ConversionError(*problems, f"--reference {reference.name} is another model; name the one trained from")
    return warnings


def around(args: Mapping[str, Any], root: Path, config: ModelConfig) -> Reference | None:
    """The Hugging Face model whose tokenizer a run was given, if it is this one with more around it, which no args can
    state. A relative path is looked for where the checkpoint stands. None: it is not there, or it is another.

    Only that of the user or of root: anyone may have made a folder again that is gone.
    """
    name = args.get("tokenizer_model")
    if FAMILIES[config.family].outer is None or not isinstance(name, str) or not name:
        return None
    places = (Path(name).expanduser(), root.parent / name)
    configs = [each / "config.json" for each in places if each.is_absolute()]
    place = next((path.parent for path in configs if not is_closed(path) and fileio.is_file(path)), None)
    if place is None or stranger(place) is not None or stranger(place / "config.json") is not None:
        return None
    try:
        reference = open_reference(str(place), None)
        disagreements(reference, config)
    except ConversionError:  # nobody has named it as a reference
        return None
    return reference
