"""The line that an import prints for training: whole, as a shell takes it, with the sizes that a load must be told."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import pytest
import tiny_models as tm
import torch

SIZES = "--use-mp-args-from-checkpoint-args"


def line(to_megatron, source: Path, out: Path, *options: object) -> list[str]:
    said = to_megatron("llama2", "--model-path", source, "--out", out, *options).succeeded()
    (text,) = [text for text in said.out.splitlines() if text.startswith("train with")]
    return shlex.split(text.removeprefix("train with"))


@pytest.mark.parametrize("target", ["megatron-llm", "megatron-core"])
def test_line_is_complete_and_quoted(target: str, sources, to_megatron, tmp_path: Path) -> None:
    out = tmp_path / "a b$(x);'c"
    words = line(to_megatron, sources("llama2-gqa"), out, "--target", target)
    assert words[:2] == ["--load", str(out)]
    assert "--use_checkpoint_args" in words or "--use-checkpoint-args" in words


@pytest.mark.parametrize(
    ("sizes", "needed"),
    [
        ((), False),
        (("--tensor-model-parallel-size", 2), True),
        (("--pipeline-model-parallel-size", 2), True),
        (("--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1), True),
    ],
)
def test_rank_files_of_several_ranks_name_their_sizes(sizes, needed, sources, to_megatron, tmp_path: Path) -> None:
    """Megatron-LM restores TP and PP by this flag alone. With PP 2 and without it, it trains from nothing, exit 0."""
    options = ("--target", "megatron-core", "--ckpt-format", "torch", *sizes)
    words = line(to_megatron, sources("llama2-gqa"), tmp_path / "out", *options)
    assert (SIZES in words) is needed


def test_torch_dist_needs_no_sizes(sources, to_megatron, tmp_path: Path) -> None:
    assert SIZES not in line(to_megatron, sources("llama2-gqa"), tmp_path / "out", "--target", "megatron-core")


@pytest.mark.parametrize(("scaled", "rotary"), [("qwen3-yarn", False), ("qwen3", True)])
def test_yarn_is_not_made_plain_by_another_arg(scaled: str, rotary: bool, to_megatron, tmp_path: Path) -> None:
    """Megatron-LM restores use_rotary_position_embeddings, and where it is true turns yarn into rope without a word."""
    source = tm.write_huggingface(tmp_path / "hf", tm.DENSE[scaled])
    said = to_megatron("qwen3", "--model-path", source, "--out", tmp_path / "out").succeeded()
    with torch.serialization.safe_globals([argparse.Namespace]):
        args = torch.load(tmp_path / "out" / "release" / "common.pt", weights_only=True)["args"]
    assert (args.position_embedding_type == "yarn") is not rotary
    assert args.use_rotary_position_embeddings is rotary
    assert ("0.19" in said.err) is not rotary
