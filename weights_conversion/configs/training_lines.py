"""What training is told of an import: the args in its rank files, and the line that it is started with."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from weights_conversion.config import ModelConfig, Parallelism
from weights_conversion.configs import core_args, megatron_args, moe_layers
from weights_conversion.errors import ConversionError
from weights_conversion.mapping.dialects import MEGATRON_CORE, Dialect


@dataclass(frozen=True)
class Shape:
    """How an import is laid out: `vocabulary` rows, a multiple of `divisible_by` x TP where padding was asked for.

    Of a model with experts: `layer_freq` is moe_layer_freq, and `grouped` says that experts are for TEGroupedMLP.
    `router` is the type in which scores of experts are computed, None: the model's.
    Of latent attention: `fused` says that its down projections are one module (--mla-down-proj-fusion).
    """

    parallel: Parallelism
    dialect: Dialect
    ckpt_format: str
    vocabulary: int
    divisible_by: int
    layer_freq: int | list[int] = 1
    grouped: bool = False
    fused: bool = False
    router: str | None = "fp32"


def layer_freq(config: ModelConfig, dialect: Dialect, expression: str | None, grouped: bool) -> int | list[int]:
    """moe_layer_freq as it is written, by --moe-layer-freq and --moe-grouped-gemm. Raises ConversionError."""
    flags = {"--moe-grouped-gemm": grouped, "--moe-layer-freq": expression is not None}
    asked = " and ".join(flag for flag, given in flags.items() if given)
    if asked and (config.moe is None or dialect is not MEGATRON_CORE):
        raise ConversionError(f"{asked} is for Megatron-Core's models with experts, which this is not")
    return moe_layers.core_layer_freq(config, None if expression is None else moe_layers.parse_freq(expression))


def warnings(config: ModelConfig, shape: Shape) -> list[str]:
    """What a run that is started otherwise than the line says, or is of another release, does without a word."""
    if shape.ckpt_format != "torch" or shape.dialect is not MEGATRON_CORE:
        return []
    older = [
        "the rank files call the inner layer of a prediction layer mtp_model_layer, as Megatron-Core 0.18 does; 0.16 "
        "and older call it transformer_layer, and do not find it (--ckpt-format torch_dist is the same for all)"
    ]
    return (older if config.mtp_num_layers else []) + (_OF_FUSION if shape.fused else [])


_OF_FUSION = [
    "a run without --mla-down-proj-fusion, which no checkpoint restores, loads these rank files in silence, and "
    "leaves every input_layernorm, linear_q_down_proj and linear_kv_down_proj as they are before training; "
    "Megatron-LM has the flag since 0.18"
]


def notes(config: ModelConfig, shape: Shape) -> list[str]:
    if config.moe is not None and config.moe.biased and shape.ckpt_format == "torch_dist":
        return ["experts    have biases: a run of several tensor ranks needs --expert-tensor-parallel-size 1"]
    if config.moe is None or shape.ckpt_format != "torch" or shape.grouped:
        return []
    return [
        "experts    each is a module of its own (SequentialMLP), and so they are to a run that takes up these args; "
        "--moe-grouped-gemm writes them for the grouped kernels, which are faster"
    ]


def rank_args(config: ModelConfig, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """The args of every rank file, or of a torch_dist checkpoint, in the names of the one that reads them."""
    sizes: dict[str, Any] = {"dtype": dtype, "divisible_by": shape.divisible_by}
    if shape.dialect is not MEGATRON_CORE:
        return megatron_args.write_args(config, shape.parallel, vocabulary=shape.vocabulary, **sizes)
    sizes["layer_freq"] = shape.layer_freq if config.moe is not None else None
    fusion = {"mla_down_proj_fusion": True} if shape.fused else {}
    if shape.ckpt_format == "torch_dist":
        return core_args.write_args(config, shape.parallel, ckpt_format="torch_dist", vocabulary=None, **sizes) | fusion
    args = core_args.write_args(config, shape.parallel, ckpt_format="torch", vocabulary=shape.vocabulary, **sizes)
    if config.moe is not None:
        args["expert_model_parallel_size"] = shape.parallel.expert
        args["expert_tensor_parallel_size"] = shape.parallel.experts_tensor
        args["moe_grouped_gemm"] = shape.grouped
    return args | fusion


def training_flags(config: ModelConfig, shape: Shape, out: Path, dtype: torch.dtype) -> list[str]:
    """What training is to be started with, as a shell takes it."""
    load = f"--load {shlex.quote(str(out))}"
    if shape.dialect is not MEGATRON_CORE:
        flags = megatron_args.training_flags(config, shape.vocabulary, shape.divisible_by, shape.parallel.tensor)
        return [f"{load} --use_checkpoint_args", *flags]
    form = f"{load} --ckpt-format {shape.ckpt_format} --use-checkpoint-args --no-load-optim --no-load-rng"
    # Without it a run of other sizes cannot find its rank files, says so in one line, and trains from nothing.
    sizes = ["--use-mp-args-from-checkpoint-args"] if replace(shape.parallel, hybrid=False) != Parallelism() else []
    if shape.parallel.experts_tensor != shape.parallel.tensor:  # which it does not restore
        sizes.append(f"--expert-tensor-parallel-size {shape.parallel.experts_tensor}")
    sizes += ["--mla-down-proj-fusion"] if shape.fused else []
    return [form, *sizes, *core_args.training_flags(config, dtype, shape.router)]


def tokenizer_flags(names: Collection[str], dialect: Dialect, out: Path) -> list[str]:
    """Which tokenizer Megatron-LM is to be given; Megatron-LLM has a flag for a file that the user chooses."""
    if dialect is not MEGATRON_CORE:
        return []
    if "tokenizer.model" in names:
        return [f"--tokenizer-model {shlex.quote(str(out / 'tokenizer.model'))}"]
    if {"tokenizer.json", "tekken.json"} & set(names):
        return [f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {shlex.quote(str(out))}"]
    return []
