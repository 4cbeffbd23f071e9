"""Adapters as PEFT saves them (adapter_config.json, adapter_model.safetensors), to be merged into the base model.

The merge is PEFT's own: base + scale x (B @ A) in float32, rounded once. What would make another model of it (DoRA,
biases, trained embeddings) is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

from weights_conversion.errors import ConversionError
from weights_conversion.errors.text import short
from weights_conversion.files import fileio
from weights_conversion.formats import huggingface, torch_files
from weights_conversion.layouts.placement import Delta, Placed, TensorRef, whole
from weights_conversion.sources import naming

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
MOST = 1_000_000_000  # of a rank or an alpha: beyond every model
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
# Keys of adapter_config.json that change what is computed, and what they stand for.
_OTHER_MODELS = {
    "use_dora": "DoRA",
    "lora_bias": "biases of its own",
    "modules_to_save": "modules that were trained whole",
    "layer_replication": "layers used twice",
    "target_parameters": "parameters without a module of their own",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "trainable_token_indices": "trained rows of the embedding",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the base's weights too
# Patterns are regular expressions of the file's: none whose search could take for ever.
_PATTERN = re.compile(r"[\w.^\\$|()\[\]\-*+?]{1,300}")
_REPEATED_GROUP = re.compile(r"\)[*+?{]|[*+?}][*+?{]")


@dataclass(frozen=True)
class Adapter:
    """An opened adapter: module -> (A, B, scale), the module by its name in the base model."""

    folder: Path
    base: str | None
    factors: Mapping[str, Delta]


def open_adapter(folder: Path) -> Adapter:
    """Reads the config and the headers of `folder`. Raises ConversionError for what is no plain LoRA."""
    if not fileio.is_file(folder / CONFIG):
        raise ConversionError(
            f"--adapter {folder} holds no {CONFIG}, so it is no adapter of PEFT's; name the folder that holds "
            f"{CONFIG} and {WEIGHTS[0]}"
        )
    config = fileio.read_json(folder / CONFIG)
    where = str(folder / CONFIG)
    _check(config, where)
    refs = _refs(folder)
    pairs: dict[str, dict[str, TensorRef]] = {}
    strange = []
    for name, ref in refs.items():
        match = _FACTOR.fullmatch(name.removeprefix(PREFIX))
        if match is not None and len(ref.shape) > 2:
            strange.append(
                f"{folder} has a factor {name} of shape {list(ref.shape)}: an adapter of a convolution, which is not "
                "merged here; merge it with peft"
            )
        elif match is None or len(ref.shape) != 2:
            strange.append(f"{folder} has a tensor {name} of shape {list(ref.shape)}, which is no factor of LoRA")
        else:
            pairs.setdefault(match["module"], {})[match["factor"]] = ref
    strange += [f"{folder} has only one of {module}'s two factors" for module, p in pairs.items() if len(p) != 2]
    if strange or not pairs:
        raise ConversionError(*(strange or [f"{folder} holds no tensors"]))
    problems: list[tuple[str, str]] = []
    factors = {}
    for module, pair in pairs.items():
        a, b = pair["A"], pair["B"]
        rank, scale = _rank_and_scale(config, module, where)
        if a.shape[0] != rank or b.shape[1] != rank:
            said = f"{module}: A is {list(a.shape)} and B {list(b.shape)}, where {where} says rank {rank}"
            problems.append((module, said))
        factors[module] = Delta(whole(a), whole(b), scale)
    if problems:
        raise ConversionError(*naming.grouped(problems))
    base = config.get("base_model_name_or_path")
    return Adapter(folder, base if isinstance(base, str) and base else None, factors)


def merged(tensors: Mapping[str, Placed], adapter: Adapter) -> dict[str, Placed]:
    """`tensors` of the base by name, with what the adapter adds. Every module must be there, and fit."""
    problems: list[tuple[str, str]] = []
    found = dict(tensors)
    for module, delta in adapter.factors.items():
        name = f"{module}.weight"
        base = tensors.get(name)
        if base is None:
            said = f"the adapter {adapter.folder} is for {module}, which the base model does not have (no {name})"
            problems.append((module, said))
        elif (base.rows, base.columns) != (delta.above.rows, delta.below.columns):
            said = (
                f"the adapter's {module} makes {[delta.above.rows, delta.below.columns]}, the base's {name} is "
                f"{[base.rows, base.columns]}"
            )
            problems.append((module, said))
        else:
            found[name] = replace(base, deltas=(delta,))
    if problems:
        raise ConversionError(*naming.grouped(problems))
    return found


def _refs(folder: Path) -> dict[str, TensorRef]:
    path = next((folder / name for name in WEIGHTS if fileio.is_file(folder / name)), None)
    if path is None:
        raise ConversionError(f"{folder} holds {CONFIG} and neither {' nor '.join(WEIGHTS)}; copy it there")
    if path.suffix == ".safetensors":
        return huggingface.read_safetensors(path)
    opened = torch_files.read_torch_file(path)
    return torch_files.tensors(opened, opened.content)


def _check(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConversionError(f"{where} says peft_type {short(kind)}, where LORA was expected; merge it with peft")
    problems = [
        f"{where} says {name} {short(config[name])}: {what}, which is not merged here; merge it with peft"
        for name, what in _OTHER_MODELS.items()
        if config.get(name)
    ]
    if config.get("bias") not in (None, "none"):
        problems.append(f"{where} says bias {short(config['bias'])}: trained biases are not merged here")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASES):
        problems.append(
            f"{where} says init_lora_weights {short(start)}, which changes the base model's weights too; merge it with "
            "peft"
        )
    if problems:
        raise ConversionError(*problems)


def _rank_and_scale(config: Mapping[str, Any], module: str, where: str) -> tuple[int, float]:
    """Of a module, by the first pattern that fits the end of its name, as peft finds it."""
    rank = _by_pattern(config, "rank_pattern", "r", module, where)
    alpha = _by_pattern(config, "alpha_pattern", "lora_alpha", module, where)
    fits = type(alpha) in (int, float) and abs(alpha) <= MOST  # NaN, which JSON can spell, does not
    if type(rank) is not int or not 1 <= rank <= MOST or not fits:
        raise ConversionError(f"{where} says rank {short(rank)} and alpha {short(alpha)} for {module}")
    return rank, alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(config: Mapping[str, Any], patterns: str, default: str, module: str, where: str) -> Any:
    said = config.get(patterns) or {}
    if not isinstance(said, dict):
        raise ConversionError(f"{where} says {patterns} {short(said)}, where an object was expected")
    for pattern, value in said.items():
        if not _PATTERN.fullmatch(pattern) or _REPEATED_GROUP.search(pattern):
            raise ConversionError(f"{where} has a pattern {short(pattern)} in {patterns} that is not understood")
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        except re.error as error:
            raise ConversionError(f"{where} has a pattern {short(pattern)} in {patterns} ({error})") from error
    return config.get(default)
