"""Rank files of Megatron-Core whose pipeline stages hold unequal numbers of layers: read, or refused by name.

test_megatron_core.py has the same of the real megatron-core.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
from conftest import run
from megatron_files import assert_same_tensors

from weights_conversion.config import Parallelism
from weights_conversion.errors import ConversionError
from weights_conversion.formats.stages import layers_of

NAME = "llama2-gqa"  # 4 layers
FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"
EMBEDDING, LOSS = "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"
EQUAL = (
    "--target",
    "megatron-core",
    "--ckpt-format",
    "torch",
    "--tensor-model-parallel-size",
    2,
    "--pipeline-model-parallel-size",
    2,
)
LAYOUT = "pipeline_model_parallel_layout"


def held(layers: tuple[int, ...], parallel: Parallelism) -> dict[int, list[str]]:
    """Names of tensors by stage, as chunks of so many layers have them."""
    names: dict[int, list[str]] = {stage: [] for stage in range(parallel.pipeline)}
    for turn, count in enumerate(layers):
        chunk, stage = divmod(turn, parallel.pipeline)
        key = f"model{chunk if parallel.virtual > 1 else ''}"
        names[stage] += [f"{key}.decoder.layers.{layer}.mlp.linear_fc2.weight" for layer in range(count)]
    return names


@pytest.mark.parametrize(
    ("args", "pipeline", "virtual", "layers"),
    [
        ({FIRST: 1}, 3, 1, (1, 2, 2)),
        ({LAST: 1}, 2, 1, (4, 1)),
        ({FIRST: 1, LAST: 4}, 2, 1, (1, 4)),
        ({"num_layers": 7, FIRST: 2, LAST: 1}, 4, 1, (2, 2, 2, 1)),
        ({"num_layers": 10, FIRST: 2, LAST: 4}, 3, 2, (1, 2, 2, 1, 2, 2)),
        ({"num_layers_in_first_pipeline_stage": 3}, 2, 1, (3, 2)),
        ({EMBEDDING: True}, 2, 1, (2, 3)),
        ({LOSS: True}, 3, 1, (2, 2, 1)),
        ({"num_layers": 6, EMBEDDING: True, LOSS: True}, 2, 2, (1, 2, 2, 1)),
        ({LAYOUT: "Et|tt|ttL"}, 3, 1, (1, 2, 2)),
        ({LAYOUT: "E|(t|)*5,|L"}, 4, 2, (0, 1, 1, 1, 1, 1, 0, 0)),
        ({LAYOUT: "Et*3|t*2L"}, 2, 1, (3, 2)),
        ({LAYOUT: "E|t*5|L"}, 3, 1, (0, 5, 0)),
        ({}, 5, 1, ()),
        ({FIRST: 1, "num_layers": 5}, 5, 1, ()),
    ],
)
def test_by_args(args: dict[str, Any], pipeline: int, virtual: int, layers: tuple[int, ...]) -> None:
    """get_num_layers_to_build's numbers, chunk after chunk; nothing where the stages are equal."""
    parallel = Parallelism(1, pipeline, virtual)
    names = held(layers or (1,) * pipeline, parallel)
    assert layers_of(names, {"num_layers": 5, **args}, {}, parallel, Path("in")) == layers


@pytest.mark.parametrize(
    ("args", "layers", "words"),
    [
        ({}, (2, 3), ("hold 2, 3 layers", "num_layers 5", "say 2, 2")),
        ({FIRST: 2}, (3, 2), ("hold 3, 2", FIRST, "say 2, 3")),
        ({LAYOUT: "Et|ttttL"}, (3, 2), (LAYOUT, "say 1, 4")),
        ({LAYOUT: "Et|tttt|L"}, (3, 2), ("3 stages", "PP 2")),
        ({LAYOUT: "Etx|ttL"}, (3, 2), ("Etx|ttL",)),
        ({LAYOUT: "Et*99999999999|L"}, (3, 2), ("t*99999",)),
        ({LAYOUT: "E" + "(t*9)*9" * 3 + "|L"}, (3, 2), (LAYOUT,)),
        ({FIRST: "x"}, (3, 2), (FIRST, "number of layers")),
        ({FIRST: True}, (3, 2), (FIRST, "number of layers")),
    ],
)
def test_disagreements(args: dict[str, Any], layers: tuple[int, ...], words: tuple[str, ...]) -> None:
    parallel = Parallelism(1, 2)
    with pytest.raises(ConversionError) as caught:
        layers_of(held(layers, parallel), {"num_layers": 5, **args}, {}, parallel, Path("in"))
    for word in words:
        assert word in str(caught.value)


def test_a_layout_that_is_no_text() -> None:
    with pytest.raises(ConversionError, match="PipelineParallelLayerLayout"):
        layers_of({}, {"num_layers": 5}, {LAYOUT: "x.PipelineParallelLayerLayout"}, Parallelism(1, 2), Path("in"))


# --- whole checkpoints -----------------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def moved(models: list[dict[str, Any]], layers: tuple[int, ...]) -> list[dict[str, Any]]:
    """The stages' tensors with their layers dealt anew: `layers` to each."""
    every: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for model in models:
        rest.append({name: value for name, value in model.items() if ".layers." not in name})
        numbers = sorted({int(name.split(".")[2]) for name in model if ".layers." in name})
        for number in numbers:
            start = f"decoder.layers.{number}."
            every.append({name[len(start) :]: model[name] for name in model if name.startswith(start)})
    for stage, count in zip(rest, layers, strict=True):
        for number in range(count):
            stage |= {f"decoder.layers.{number}.{name}": value for name, value in every.pop(0).items()}
    return rest


@pytest.fixture
def uneven(imported, tmp_path: Path) -> Callable[..., Path]:
    """4 layers on TP 2 x PP 2 as (1, 3), with args that say so or what else is given."""

    def make(layers: tuple[int, ...] = (1, 3), **args: Any) -> Path:
        source = imported(NAME, *EQUAL)
        root = Path(shutil.copytree(source, tmp_path / "in"))
        for rank in (0, 1):
            paths = [root / "release" / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt" for stage in (0, 1)]
            with torch.serialization.safe_globals([argparse.Namespace]):
                models = [torch.load(path, weights_only=True)["model"] for path in paths]
            for path, model in zip(paths, moved(models, layers), strict=True):
                rewrite(path, lambda content, model=model: content.update(model=model))
                rewrite(path, lambda content: vars(content["args"]).update(args or {FIRST: 1}))
        return root

    return make


def test_exported_and_verified(uneven, sources, to_hf, tmp_path: Path) -> None:
    root = uneven()
    to_hf("--input_dir", root, "--output_dir", tmp_path / "out", "--no_tokenizer", "--verify").succeeded()
    assert_same_tensors(tm.read_huggingface(tmp_path / "out"), tm.MODELS[NAME].tensors())
    assert "IDENTICAL" in run("weights_conversion.verify", sources(NAME), root).succeeded().out


def test_verify_sees_layers_that_were_dealt_wrongly(uneven, sources) -> None:
    """Layers 0 and 1 exchanged between the stages."""
    root = uneven()
    for rank in (0, 1):
        first, second = (root / "release" / f"mp_rank_{rank:02d}_{stage:03d}/model_optim_rng.pt" for stage in (0, 1))
        with torch.serialization.safe_globals([argparse.Namespace]):
            one, two = (torch.load(path, weights_only=True) for path in (first, second))
        for name in [name for name in one["model"] if name.startswith("decoder.layers.0.")]:
            one["model"][name], two["model"][name] = two["model"][name], one["model"][name]
        torch.save(one, first)
        torch.save(two, second)
    found = run("weights_conversion.verify", sources(NAME), root)
    assert found.code == 1
    assert re.search(r"layers? ?0\b.*|layers\.0", found.out)


def test_into_equal_stages(uneven, imported, to_megatron, tmp_path: Path) -> None:
    """A new layout is of equal stages, and its args say nothing of the old ones."""
    to_megatron("llama2", "--model-path", uneven(), "--out", tmp_path / "out", *EQUAL).succeeded()
    for rank in ("00_000", "00_001", "01_000", "01_001"):
        ours, theirs = (
            torch.load(path / f"release/mp_rank_{rank}/model_optim_rng.pt", weights_only=False)
            for path in (tmp_path / "out", imported(NAME, *EQUAL))
        )
        assert_same_tensors(ours["model"], theirs["model"])
        assert not {FIRST, LAST, LAYOUT} & {name for name, value in vars(ours["args"]).items() if value is not None}


def test_args_that_say_otherwise(uneven, to_hf, tmp_path: Path) -> None:
    said = to_hf("--input_dir", uneven(**{FIRST: 2}), "--output_dir", tmp_path / "out", "--no_tokenizer")
    said.refused("hold 1, 3 layers", f"{FIRST} 2", "say 2, 2")
    assert len(said.err.strip().splitlines()) == 1


def test_ranks_that_disagree(uneven, to_hf, tmp_path: Path) -> None:
    root = uneven()
    path = root / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    rewrite(path, lambda content: vars(content["args"]).update({FIRST: 3}))
    said = to_hf("--input_dir", root, "--output_dir", tmp_path / "out", "--no_tokenizer")
    said.refused(f"{FIRST} 3", "not one checkpoint")


def test_a_layout_does_not_matter_to_torch_dist(imported, to_hf, tmp_path: Path) -> None:
    root = Path(shutil.copytree(imported(NAME, "--target", "megatron-core"), tmp_path / "in"))
    rewrite(next(root.glob("*/common.pt")), lambda content: vars(content["args"]).update({LAYOUT: [["a"], [["b"]]]}))
    to_hf("--input_dir", root, "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
