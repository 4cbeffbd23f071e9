"""What stands for the args of a checkpoint that stores none."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from weights_conversion.config import ModelConfig, Parallelism
from weights_conversion.configs import core_args, manifest
from weights_conversion.errors import ConversionError
from weights_conversion.formats.iterations import number_of
from weights_conversion.formats.run_config import MODEL_YAML, RUN_CONFIG
from weights_conversion.formats.stored_args import plain_args
from weights_conversion.sources.reference import args_beside


def args_of_others(folder: Path) -> dict[str, Any]:
    """What stands for the args of a checkpoint that stores none: verl's own config, or an import's manifest."""
    stated = args_beside(folder)
    return _args_of_manifest(folder) if stated is None else plain_args(argparse.Namespace(**stated), folder)


def _args_of_manifest(folder: Path) -> dict[str, Any]:
    """What stands for the args of a checkpoint that stores none: what an import said in its manifest."""
    found = manifest.find([folder if number_of(folder.name) is None else folder.parent])
    if found is None:
        raise ConversionError(
            f"{folder} holds no args, no {RUN_CONFIG}, no NeMo 2's context/{MODEL_YAML} and no {manifest.NAME} beside "
            f"it, so nothing says what model it is; copy {RUN_CONFIG} there, or context/ (verl's "
            "huggingface/) beside it"
        )
    path, said = found
    try:
        config = ModelConfig(family=said["family"], vocab_size=1, **manifest.model_fields(said))
        args = core_args.write_args(
            config, Parallelism(), dtype=torch.bfloat16, divisible_by=1, ckpt_format="torch_dist", vocabulary=None
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConversionError(f"{path} does not describe a model ({error})") from error
    return plain_args(argparse.Namespace(**args), path)
