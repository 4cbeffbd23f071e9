"""Whole tensors of torch_dist checkpoints by the names that a Megatron-Core model has, whichever key holds them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weights_conversion.config import ModelConfig
from weights_conversion.errors import ConversionError
from weights_conversion.verification.dist_storage import DistTensor, FlatTensor, read_index
from weights_conversion.verification.forward import Weights
from weights_conversion.verification.parts import part_of

_MASTER = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?:fp32_param|param)\.(.+)")

_OF_ATTENTION = ("self_attention.", "input_layernorm.")


def dist_weights(
    folder: Path, num_layers: int, weights: str = "model", config: ModelConfig | None = None, ranks: int = 1
) -> Weights:  # fmt: skip
    """Weights of a torch_dist checkpoint, its layers stacked along a leading axis or each by itself.

    `config` is needed where tensors may join several parts, or layers be one sub-block. `weights` "master": the
    optimizer's, where they are stored by the names of the model's. `ranks`: tensor ranks of the run that wrote it.
    """
    tensors = read_index(folder)
    if weights == "master":
        tensors = tensors | {match[1]: tensor for name, tensor in tensors.items() if (match := _MASTER.fullmatch(name))}
    tensors = _unwrapped(tensors)
    # A HybridModel of what a GPTModel holds: attention and MLP are layers of their own.
    hybrid = "decoder.final_norm.weight" in tensors and (config is None or config.hybrid_layer_pattern is None)

    def find(name: str) -> list[tuple[DistTensor | FlatTensor, tuple[int, ...]]]:
        if name.startswith("mtp.") and not any(
            stored.startswith("mtp.layers.0.mtp_model_layer.") for stored in tensors
        ):
            name = name.replace(".mtp_model_layer.", ".transformer_layer.")
        match = re.fullmatch(r"(.*\blayers\.)(\d+)\.(.*)", name)
        if name in tensors:
            return [(tensors[name], ())]
        if f"{name}_w" in tensors:  # the gate and up of a GLU
            return [(tensors[name + end], ()) for end in ("_w", "_v")]
        stacked = tensors.get(match[1] + match[3]) if match else None
        if of_experts := _of_experts(name, tensors):
            return of_experts
        if match is None or stacked is None or stacked.size[0] != num_layers:
            raise ConversionError(f"{folder} has no tensor {name}, nor one of all {num_layers} layers")
        return [(stacked, (int(match[2]),))]

    def read(name: str, rows: slice | None) -> Tensor:
        name = _in_hybrid(name) if hybrid else name
        part = None if name in tensors or config is None else part_of(name, config)
        if part is not None:  # Megatron-FSDP joins them as a model that runs
            return _of_ranks(find(part[0]), part[1], part[2], rows, ranks)
        return _rows(find(name), rows)

    return read


def _of_ranks(
    found: list[tuple[DistTensor | FlatTensor, tuple[int, ...]]], first: int, last: int, rows: slice | None, ranks: int
) -> Tensor:  # fmt: skip
    """Rows of a part, which would be rows first..last of one rank's tensor: each rank has its share of all parts."""
    height = sum(tensor.size[len(lead)] for tensor, lead in found) // ranks
    share, start = (last - first) // ranks, first // ranks
    wanted = range(last - first) if rows is None else range(rows.start, rows.stop)
    pieces = []
    for rank in range(ranks):
        low, high = max(wanted.start - rank * share, 0), min(wanted.stop - rank * share, share)
        if low < high:
            begin = rank * height + start
            pieces.append(_rows(found, slice(begin + low, begin + high)))
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _in_hybrid(name: str) -> str:
    """A GPTModel's name as a HybridModel has it."""
    if match := re.fullmatch(r"(.*\blayers\.)(\d+)\.(.*)", name):
        return f"{match[1]}{2 * int(match[2]) + (not match[3].startswith(_OF_ATTENTION))}.{match[3]}"
    return name.replace("final_layernorm", "final_norm")


def _rows(found: list[tuple[DistTensor | FlatTensor, tuple[int, ...]]], rows: slice | None) -> Tensor:
    """Rows of tensors that stand one above the other, each at its index along leading axes."""
    pieces, above = [], 0
    for tensor, lead in found:
        height = tensor.size[len(lead)]
        first, last = (0, height) if rows is None else (rows.start - above, rows.stop - above)
        first, last = max(first, 0), min(last, height)
        if first < last:
            pieces.append(tensor.read(lead, first, last))
        above += height
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _unwrapped(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Wrappers put their own name in front: Megatron-FSDP both, torch FSDP2 the first, NeMo 2 the second."""
    wrappers = ("model.module.", "model.", "module.", "language_model.", "module.language_model.")
    lasts = ("decoder.final_layernorm.weight", "decoder.final_norm.weight")
    wrapper = next((name for name in wrappers if any(name + last in tensors for last in lasts)), "")
    return {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}


def _of_experts(name: str, tensors: Mapping[str, Any]) -> list[tuple[Any, tuple[int, ...]]]:
    """One expert of a tensor that holds all of a layer, or of all layers; and the norm in front of them."""
    if match := re.fullmatch(
        r"(.*\blayers\.)(\d+)\.((?:\w+_layer\.)?mlp\.experts\.)(linear_fc[12]\.(?:weight|bias))(\d+)", name
    ):
        around, layer, module, end, expert = match.groups()
        own, stacked = f"{around}{layer}.{module}experts.{end}", f"{around}{module}experts.{end}"
        if own in tensors:
            return [(tensors[own], (int(expert),))]
        if stacked in tensors:
            return [(tensors[stacked], (int(layer), int(expert)))]
        for spelled in (f"{around}{layer}.{module}{inner}.{expert}.{end}" for inner in ("experts", "local_experts")):
            if spelled in tensors:
                return [(tensors[spelled], ())]
            if f"{spelled}_w" in tensors:
                return [(tensors[spelled + half], ()) for half in ("_w", "_v")]
    if match := re.fullmatch(r"(.*\blayers\.)(\d+)\.pre_mlp_layernorm\.weight", name):  # the local layer spec's name
        spelled = "mlp.linear_fc1.layer_norm_weight"
        if f"{match[1]}pre_mlp_layernorm.weight" not in tensors and f"{match[1]}{spelled}" in tensors:
            return [(tensors[match[1] + spelled], (int(match[2]),))]
        if f"{match[1]}{match[2]}.{spelled}" in tensors:
            return [(tensors[f"{match[1]}{match[2]}.{spelled}"], ())]
    return []
