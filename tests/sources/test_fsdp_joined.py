"""Tensors of several parts in Megatron-FSDP's checkpoints of several tensor ranks: in_proj and conv1d, whole.

Megatron-FSDP joins what each tensor rank holds along partition_dim (get_mcore_tensor_parallel_partition_dim of its
utils.py), so that such a tensor is the first rank's parts, then the second's. The ranks' own tensors are those of a
rank file import, joined here by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import delta_models
import dist_files
import hybrid_models
import pytest
import torch
from conftest import Result
from delta_models import DELTAS
from golden_core import Tensors, read_ranks
from safetensors.torch import load_file

Script = Callable[..., Result]
ROWS = (
    "word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_fc1.weight", "eh_proj.weight",
    "in_proj.weight", "conv1d.weight", "conv1d_weight", "conv1d_bias", "A_log", ".D", "dt_bias", "mixer.norm.weight",
)  # fmt: skip
OTHER_SPEC = (".input_layernorm.weight", ".pre_mlp_layernorm.weight")  # beside the names of Transformer Engine
COLUMNS = ("linear_proj.weight", "out_proj.weight", "linear_fc2.weight")


def joined(ranks: list[Tensors], gated: bool) -> Tensors:
    found: Tensors = {}
    for name, first in ranks[0].items():
        if name.endswith(OTHER_SPEC) or not isinstance(first, torch.Tensor) or not first.numel():
            continue
        parts = [rank[name].float() for rank in ranks]
        place = f"model.module.{name}"
        if name.endswith("linear_fc1.weight") and gated:
            for at, end in enumerate(("_w", "_v")):
                found[place + end] = torch.cat([part.chunk(2)[at] for part in parts])
        elif name.endswith(COLUMNS):
            found[place] = torch.cat(parts, dim=1)
        else:
            found[place] = torch.cat(parts) if name.endswith(ROWS) else parts[0]
    return found


@pytest.mark.parametrize("name", ["3.5", "3.5-tied", "nemotron"])
def test_several_tensor_ranks(name: str, to_megatron: Script, to_hf: Script, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    family = "nemotron-h" if name == "nemotron" else DELTAS[name].family
    hybrid_models.write(hf) if name == "nemotron" else delta_models.write(hf, DELTAS[name])
    options: list[Any] = ["--ckpt-format", "torch", "--tensor-model-parallel-size", 2]
    to_megatron(family, "--model-path", hf, "--out", tmp_path / "mt", *options).succeeded()
    ranks, args = read_ranks(tmp_path / "mt")
    tensors = joined([ranks[rank] for rank in sorted(ranks)], gated=name != "nemotron")
    stated = argparse.Namespace(**{**args, "ckpt_format": "fsdp_dtensor", "params_dtype": torch.bfloat16})
    source = tmp_path / "fsdp" / "iter_0000005"
    dist_files.write(
        source, {key: dist_files.whole(tensor) for key, tensor in tensors.items()},
        {"args": stated, "iteration": 5, "checkpoint_version": 3.0},
    )  # fmt: skip
    (source / "metadata.json").unlink()
    (source.parent / "latest_checkpointed_iteration.txt").write_text("5")
    vocabulary = 96 if name == "nemotron" else 64
    to_hf("--input_dir", source.parent, "--output_dir", tmp_path / "out", "--no_tokenizer", "--model", family,
          "--true_vocab_size", vocabulary, "--verify").succeeded()  # fmt: skip
    found, wanted = load_file(tmp_path / "out" / "model.safetensors"), load_file(hf / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor.to(found[key].dtype)) for key, tensor in wanted.items())
