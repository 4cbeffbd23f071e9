"""The args that a checkpoint's files carry: taken as plain values, and checked against each other and their folders."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from math import lcm
from pathlib import Path
from typing import Any

import torch

from weights_conversion.config import Parallelism
from weights_conversion.errors import ConversionError
from weights_conversion.formats.stand_ins import EnumMember, Foreign
from weights_conversion.layouts.rank_files import Rank, rank_folder, stage_ranks

_MOST_RANKS = 100_000  # of one kind; args may claim any number
# args that every rank of one checkpoint shares.
_SHARED = (
    "num_layers",
    "encoder_num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_attention_heads_kv",
    "num_query_groups",
    "padded_vocab_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_layer_freq",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "mtp_num_layers",
    "kv_channels",
    "rotary_base",
    "rotary_percent",
    "norm_epsilon",
    "qk_layernorm",
    "add_qkv_bias",
    "untie_embeddings_and_output_weights",
    "layernorm_epsilon",
    "rope_theta",
    "iteration",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
# What args must be where they are there at all: counts, and positive numbers.
_COUNTS = (
    *("num_layers", "encoder_num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
    *("num_attention_heads_kv", "num_query_groups", "max_position_embeddings", "seq_length", "padded_vocab_size"),
    *("make_vocab_size_divisible_by", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("virtual_pipeline_model_parallel_size", "sliding_window_size"),
)
_NUMBERS = ("layernorm_epsilon", "norm_epsilon", "rope_theta", "rotary_base", "rope_scaling_factor")
_TEXTS = ("model_name", "tokenizer_type", "vocab_file", "load", "vocab_extra_ids_list")


def plain_args(args: Any, path: Path) -> dict[str, Any]:
    """A Namespace read from `path` as a dict of plain values, those that decide a shape checked for their type.

    What is not plain (nested containers, objects of the training code) is left out: nothing here needs it, and to
    compare or print it may take forever, since containers in a pickle can share their parts.
    """
    if args is None or not hasattr(args, "__dict__"):
        raise ConversionError(f"{path} holds no args, so nothing says what model it is")
    plain = {name: plain_value(value) for name, value in vars(args).items() if isinstance(name, str)}
    problems = []
    for names, kind, suits in (
        (_COUNTS, "a positive number", lambda value: type(value) is int and 0 < value < 1 << 31),
        (_NUMBERS, "a positive number", lambda value: type(value) in (int, float) and 0 < value < math.inf),
        (_TEXTS, "text", lambda value: isinstance(value, str)),
    ):
        for name in names:
            value = plain.get(name)
            if value is not None and not suits(value):
                problems.append(f"the args in {path} have {name} {value!r}, where {kind} was expected")
    if problems:
        raise ConversionError(*problems)
    return {name: value for name, value in plain.items() if not isinstance(value, _Other)}


class _Other:
    """Stands for a value that is not plain."""

    def __init__(self, value: object) -> None:
        self._kind = kind_of(value)

    def __repr__(self) -> str:
        return f"of type {self._kind}"


def kind_of(value: object) -> str:
    """The name of a value's type, or of the class that a Foreign stands for, by itself or in a list."""
    if isinstance(value, (list, tuple)):
        inner = next((part.name for part in value if isinstance(part, Foreign)), None)
        return type(value).__name__ + (f" of {inner}" if inner else "")
    return value.name if isinstance(value, Foreign) else type(value).__name__


def plain_value(value: Any, inner: bool = False) -> Any:
    """A scalar, enumeration member or short flat list as it is, anything else as _Other."""
    if isinstance(value, EnumMember):
        return _Other(value) if isinstance(plain_value(value.value, True), _Other) else value
    if isinstance(value, (list, tuple)) and not inner and len(value) <= 64:
        parts = [plain_value(part, True) for part in value]
        return _Other(value) if any(isinstance(part, _Other) for part in parts) else parts
    huge = (isinstance(value, int) and abs(value) >= 1 << 63) or (isinstance(value, str) and len(value) > 100_000)
    plain = value is None or isinstance(value, (bool, int, float, str, torch.dtype))
    return value if plain and not huge else _Other(value)


def left_out(args: Any, plain: Mapping[str, Any]) -> dict[str, str]:
    """What plain_args left out of `plain`: the name of each value's type."""
    stated = vars(args).items()
    return {name: kind_of(value) for name, value in stated if value is not None and name not in plain}


def disagreements(args: Mapping, first: object, files: Mapping) -> list[str]:
    problems = []
    for rank, path in sorted(files.items()):
        for name in _SHARED:
            ours, theirs = args[first].get(name), args[rank].get(name)
            if ours != theirs:
                problems.append(f"{path} says {name} {theirs}, {files[first]} says {ours}: they are not one checkpoint")
    return problems


def strays(args: Mapping, files: Mapping[Rank, Path], parallel: Parallelism) -> list[str]:
    """Rank files that stand in each other's folders, by the process that each says it was written by.

    Training numbers its processes tensor ranks first and stages last, whatever lies between, and each leaves its number
    in its args, as this converter does; others leave the same in all files, or none. Every rank's file must be there.
    """
    order = [Rank(tp, pp, ep) for pp in range(parallel.pipeline) for tp, ep in stage_ranks(parallel)]
    writers = [args[rank].get("rank") for rank in order]
    if not all(type(writer) is int for writer in writers) or len(set(writers)) == 1:
        return []
    return [
        f"{files[rank]} was written by process {writer}, {files[before]} by process {earlier} (args.rank): they are "
        "swapped, or one is a copy of another; put each rank's own file in its folder"
        for (before, earlier), (rank, writer) in pairwise(zip(order, writers, strict=True))
        if writer <= earlier
    ]


def parallelism(args: Mapping[str, Any], files: Mapping[Rank, Path], folder: Path, problems: list[str]) -> Parallelism:
    """From args where they say it, else from the folders; every rank must be there."""
    found = [max(coordinates) + 1 for coordinates in zip(*files, strict=True)]
    tensor, pipeline, virtual, expert = (
        _size(args, name, seen, folder, problems)
        for name, seen in (
            ("tensor_model_parallel_size", found[0]),
            ("pipeline_model_parallel_size", found[1]),
            ("virtual_pipeline_model_parallel_size", 1),
            ("expert_model_parallel_size", found[2]),
        )
    )
    experts = _experts(args, expert, folder, problems)
    expert = expert if experts else 1
    cut = _size(args, "expert_tensor_parallel_size", tensor, folder, problems) if experts else tensor
    if args.get("standalone_embedding_stage"):
        problems.append(f"{folder} was trained with --standalone_embedding_stage, which is not supported")
    if tensor % cut:
        problems.append(
            f"the args of {folder} say expert_tensor_parallel_size {cut} and tensor_model_parallel_size {tensor}: one "
            "rank's file was written over another's in training; save with --ckpt-format torch_dist"
        )
        cut = tensor
    parallel = Parallelism(tensor, pipeline, virtual, expert=expert, expert_tensor=None if cut == tensor else cut)
    wanted, there = _count(parallel), 0
    if wanted > pipeline * _MOST_RANKS:
        problems.append(f"{folder} holds {len(files)} rank folders; its args say {parallel}, which are {wanted}")
        return Parallelism(found[0], found[1], expert=found[2])
    places = set(stage_ranks(parallel))
    for rank, path in sorted(files.items()):
        if rank.pipeline >= pipeline or (rank.tensor, rank.expert) not in places:
            problems.append(f"{path.parent} is too many: its args say {parallel}")
        else:
            there += 1
    if there < wanted:
        problems.append(_missing(files, folder, parallel, wanted, wanted - there))
    return parallel


def _experts(args: Mapping[str, Any], expert: int, folder: Path, problems: list[str]) -> int:
    """How many experts there are, 0 without any."""
    count = args.get("num_experts") or 0
    if type(count) is not int or count < 0:
        problems.append(f"the args of {folder} say num_experts {count!r}, where a number was expected")
        return 0
    if count % expert:
        problems.append(
            f"the args of {folder} say num_experts {count} and expert_model_parallel_size {expert}, which does not "
            "divide it; are all files of one run?"
        )
    return count


def _size(args: Mapping[str, Any], name: str, seen: int, folder: Path, problems: list[str]) -> int:
    value = args.get(name)
    if value is None:
        return seen
    if not isinstance(value, int) or not 1 <= value <= _MOST_RANKS:
        problems.append(f"the args of {folder} say {name} {value!r}, where a positive number was expected")
        return seen
    return value


def _count(parallel: Parallelism) -> int:
    """How many rank folders there are. Args may say that they are billions."""
    experts = parallel.expert * parallel.experts_tensor
    return lcm(parallel.tensor, experts) * parallel.pipeline


def _missing(files: Mapping[Rank, Path], folder: Path, parallel: Parallelism, total: int, count: int) -> str:
    """One sentence, however many ranks' folders are missing (`count` of `total`, which args may say are billions)."""

    def first(ranks: Iterable[Rank]) -> str:
        return rank_folder(next(rank for rank in ranks if rank not in files), parallel)

    tensor, pipeline = range(parallel.tensor), range(parallel.pipeline)
    experts = _experts_of(parallel)
    least = first(Rank(tp, pp, ep) for tp in tensor for pp in pipeline for ep in experts(tp))
    most = first(Rank(tp, pp, ep) for tp in reversed(tensor) for pp in reversed(pipeline) for ep in experts(tp)[::-1])
    what = f"{folder / least} is missing" if count == 1 else f"{count} of {total} rank folders are missing"
    where = "" if count == 1 else f" in {folder} ({least} .. {most})"
    return f"{what}{where}: its args say {parallel}; was the copy complete?"


def _experts_of(parallel: Parallelism) -> Callable[[int], list[int]]:
    """The expert coordinates of the files of a tensor rank."""
    if parallel.expert == 1:
        return lambda tp: [0]
    ranks = stage_ranks(parallel)
    return lambda tp: sorted(ep for tensor, ep in ranks if tensor == tp)
