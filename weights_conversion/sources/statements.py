"""Files beside a Megatron-Core checkpoint that state its model too, held against what is used.

Megatron-Bridge's run_config.yaml and NeMo 2's model.yaml beside stored args, ms-swift's args.json, verl's
transformer_config.json: a copy of another model's, or one that was edited, would else go unseen.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weights_conversion.config import ModelConfig, Moe, RopeScaling
from weights_conversion.configs import core_args, features, megatron_args, moe, parts, rope_core
from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.formats.format import MegatronFiles
from weights_conversion.formats.run_config import RUN_CONFIG, model_yaml, read_run_config
from weights_conversion.formats.stored_args import plain_args
from weights_conversion.mapping.dialects import MEGATRON_CORE

SWIFT, VERL = "args.json", "transformer_config.json"
_SIZES = ("num_layers", "hidden_size")  # what is no statement of a transformer lacks them
# Fields that change no number that a short text is given (and that training may have set), or that other checks have.
_OF_NO_CONSEQUENCE = frozenset({"max_position_embeddings"})
_ELSEWHERE = frozenset({"num_layernorms", "mtp_num_layers", "hybrid_layer_pattern", "mamba"})
_OF_YARN = (
    ("truncate", "yarn_correction_range_round_to_int"), ("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")
)  # fmt: skip
_FLAGS = ("rope_theta", "rope_scaling_factor", "layernorm_epsilon", "sliding_window")


def contradictions(
    files: MegatronFiles, resolved: megatron_args.Resolved, stored: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """(problems, warnings): what files beside the checkpoint state otherwise than `resolved`.

    A value that a flag decides is none, nor one that the checkpoint's own args (`stored`, normalised) have too: then
    tensors or a manifest outweigh both. A file that is not understood is a warning.
    """
    problems: list[str] = []
    warnings: list[str] = []
    if files.dialect is not MEGATRON_CORE or resolved.config.hybrid_layer_pattern is not None:
        return problems, warnings
    for path in _beside(files):
        try:
            stated = fileio.read_json(path) if path.suffix == ".json" else read_run_config(path)
            if not all(type(stated.get(name)) is int for name in _SIZES):
                continue
            args = core_args.normalise(plain_args(argparse.Namespace(**stated), path), path)
        except (ConversionError, TypeError, ValueError) as error:
            warnings.append(f"{path} states a model too, which is not compared: {str(error)[:300]}")
            continue
        for name, said, used in _differing(stated, args, resolved.config):
            origin, arg = resolved.origins.get(name, "args"), megatron_args.NAMES[name]
            if origin != "flag" and not (arg in stored and stored[arg] == args.get(arg)):
                (warnings if name in _OF_NO_CONSEQUENCE else problems).append(_sentence(path, name, said, used, origin))
    return problems, warnings


def _beside(files: MegatronFiles) -> Iterator[Path]:
    """The files that may state the model, but for the one that is believed."""
    folder, found = files.folder, set()
    for path in (
        folder / RUN_CONFIG, model_yaml(folder), folder / SWIFT, folder.parent / SWIFT, folder / VERL,
        folder.parent / VERL,
    ):  # fmt: skip
        if path is not None and path != files.said_by and fileio.is_file(path) and path not in found:
            found.add(path)
            yield path


def _differing(
    stated: Mapping[str, Any], args: Mapping[str, Any], config: ModelConfig
) -> Iterator[tuple[str, Any, Any]]:  # fmt: skip
    """(field, what a file says, what is used) of fields that the file states itself; `args`: `stated`, normalised."""
    grouped = stated.get("num_query_groups") is not None or stated.get("group_query_attention") is False
    for field, name in megatron_args.NAMES.items():
        said, used = args.get(name), getattr(config, field)
        if field == "sliding_window" and name in args:
            said = said or 0
            used = used or 0
        if field == "add_qkv_bias" and said is False:  # biases of all linear layers are theirs too
            said = bool(stated.get("add_bias_linear"))
        if said is None or field in _ELSEWHERE or (field == "num_query_groups" and not grouped):
            continue
        if field == "ffn_hidden_size" and config.moe is not None and features.has_one_size(config.family):
            continue
        if isinstance(said, RopeScaling):
            said = rope_core.completed(said, config.rope_scaling, latent=config.mla is not None)
            said = _stated_yarn(said, stated, config.rope_scaling)
        if isinstance(said, Moe) and config.moe is not None:
            said = _stated_experts(said, stated, config.moe)
        if said != used:
            yield field, said, used


def _stated_yarn(
    said: RopeScaling | None, stated: Mapping[str, Any], used: RopeScaling | None
) -> RopeScaling | None:  # fmt: skip
    """`said`, with `used` where the file has no place for a field of yarn: not every wrapper stores each."""
    if said is None or used is None or isinstance(stated.get("rope_scaling"), Mapping):
        return said
    return dataclasses.replace(said, **{field: getattr(used, field) for field, arg in _OF_YARN if arg not in stated})


def _stated_experts(said: Moe, stated: Mapping[str, Any], used: Moe) -> Moe:
    """`used`, with what the file states itself: the rest of `said` are defaults."""
    names = [field for field, name in moe.ARGS.items() if stated.get(name) is not None]
    shown = {field: getattr(used, field) for field in ("expert_bias", "shared_gate", "biased")}  # by tensors
    return dataclasses.replace(used, **{field: getattr(said, field) for field in names} | shown)


def _sentence(path: Path, field: str, said: Any, used: Any, origin: str) -> str:
    name = megatron_args.NAMES[field]
    said, used = (said or None, used or None) if field == "sliding_window" else (said, used)
    one, two = parts.shown(field, said, used), parts.shown(field, used, said)
    where = {"args": "in the checkpoint's args", "manifest": "in the manifest"}.get(origin, "as usual for the family")
    sentence = f"{path} says {name} {one}, which is {two} {where}"
    if field in _OF_NO_CONSEQUENCE:
        return f"{sentence}; {two} is used"
    flag = f"--{name} decides; or " if field in _FLAGS else ""
    return f"{sentence}: {flag}correct the one that is wrong, or remove {path.name} if it is another model's"
