"""Experts that are missing, there twice, too many, or of another layout: one sentence each, and nothing is written."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moe_models
import pytest
import tiny_models as tm
import torch
from safetensors.torch import load_file, save_file

MODEL = moe_models.MODELS["qwen3-moe"]  # 2 layers of 4 experts
KINDS = ("gate", "up", "down")
EP2 = ("--ckpt-format", "torch", "--expert-model-parallel-size", 2)
TP2_EP2 = (*EP2, "--tensor-model-parallel-size", 2)
LAYOUTS = {
    "ep2": EP2,
    "ep4": ("--ckpt-format", "torch", "--expert-model-parallel-size", 4),
    "tp2ep2": TP2_EP2,
    "tp2ep2-grouped": (*TP2_EP2, "--moe-grouped-gemm"),
    "stacked": (),
    "apart": ("--moe-layer-freq", "([1]*2)"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tm.write_huggingface(tmp_path_factory.mktemp("experts") / "hf", MODEL, tokenizer=False)


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory, to_megatron) -> Callable[[str], Path]:
    """The model in a layout of LAYOUTS, without its manifest. Not to be changed by a test."""
    root = tmp_path_factory.mktemp("experts-in-layouts")

    def convert(layout: str) -> Path:
        out = root / layout
        if not out.exists():
            to_megatron("qwen3-moe", "--model-path", source, "--out", out, *LAYOUTS[layout]).succeeded()
            (out / "conversion_manifest.json").unlink()
        return out

    return convert


# --- Hugging Face ----------------------------------------------------------------------------------------------------

Tensors = dict[str, torch.Tensor]


def name(layer: int, expert: int, kind: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight"


def without_expert(tensors: Tensors) -> None:
    for kind in KINDS:
        del tensors[name(1, 3, kind)]


def one_too_many(tensors: Tensors) -> None:
    tensors |= {name(1, 4, kind): tensors[name(1, 3, kind)].clone() for kind in KINDS}


def packed_too(tensors: Tensors) -> None:
    parts = {kind: [tensors[name(1, expert, kind)] for expert in range(4)] for kind in KINDS}
    halves = zip(parts["gate"], parts["up"], strict=True)
    tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in halves])
    tensors["model.layers.1.mlp.experts.down_proj"] = torch.stack(parts["down"])


def packed_transposed(tensors: Tensors) -> None:
    packed_too(tensors)
    for expert in range(4):
        for kind in KINDS:
            del tensors[name(1, expert, kind)]
    for whole in ("gate_up_proj", "down_proj"):
        key = f"model.layers.1.mlp.experts.{whole}"
        tensors[key] = tensors[key].transpose(1, 2).contiguous()


HF: dict[str, tuple[Callable[[Tensors], None] | None, dict[str, Any], str]] = {
    "missing": (
        without_expert,
        {},
        "the source has no tensor model.layers.1.mlp.experts.3.gate_proj.weight, which its config asks for with shape "
        "[24, 64]",
    ),
    "too many": (
        one_too_many,
        {},
        "the source has a tensor model.layers.1.mlp.experts.4.gate_proj.weight that a qwen3-moe model does not have",
    ),
    "twice": (
        packed_too,
        {},
        "the source holds the experts of layer 1 twice, one by one (model.layers.1.mlp.experts.0.gate_proj.weight) and "
        "packed (model.layers.1.mlp.experts.gate_up_proj); remove one of the two",
    ),
    "transposed": (
        packed_transposed,
        {},
        "model.layers.1.mlp.experts.down_proj has shape [4, 24, 64], but its config says [4, 64, 24]",
    ),
    "config has more": (
        None,
        {"num_experts": 8},
        "the config says 8 experts, where each layer of the source has 4 (model.layers.0.mlp.experts.3.gate_proj.weight"
        " is the last); mend its config.json, or give the model's whole files",
    ),
    "config has fewer": (None, {"num_experts": 3}, "the config says 3 experts, where each layer of the source has 4"),
    "config has two counts": (
        None, {"num_local_experts": 8}, "two values of one field, {'num_experts': 4, 'num_local_experts': 8}"
    ),
    "none": (None, {"mlp_only_layers": [0, 1]}, "no layer with experts, where a mixture of experts has one at least"),
    "top-k": (None, {"num_experts_per_tok": 5}, "5 experts per token, and only 4 experts"),
}  # fmt: skip


@pytest.mark.parametrize("case", HF)
def test_huggingface(case: str, source: Path, tmp_path: Path, to_megatron) -> None:
    edit, changes, sentence = HF[case]
    shutil.copytree(source, tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    if edit is not None:
        edit(tensors)
        save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | changes))
    to_megatron("qwen3-moe", "--model-path", tmp_path / "hf", "--out", tmp_path / "out").refused(sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--expert-model-parallel-size", 3), "4 experts cannot be divided among --expert-model-parallel-size 3"),
        (("--expert-model-parallel-size", 8), "4 experts cannot be divided among --expert-model-parallel-size 8"),
        (
            ("--expert-tensor-parallel-size", 5, "--tensor-model-parallel-size", 5),
            "24 rows of an expert cannot be divided among the 5 ranks that cut it",
        ),
        (
            ("--expert-tensor-parallel-size", 4, "--tensor-model-parallel-size", 2),
            "--expert-tensor-parallel-size 4 does not divide --tensor-model-parallel-size 2, so several ranks would",
        ),
    ],
)
def test_layouts(options: tuple[Any, ...], sentence: str, source: Path, tmp_path: Path, to_megatron) -> None:
    result = to_megatron(
        "qwen3-moe", "--model-path", source, "--out", tmp_path / "out", "--ckpt-format", "torch", *options
    )
    result.refused(sentence)
    assert not (tmp_path / "out").exists()


# --- rank files ------------------------------------------------------------------------------------------------------

EACH = "decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight"
GROUPED = "decoder.layers.1.mlp.experts.linear_fc1.weight1"
Edit = Callable[[Path], None]


def in_files(edit: Callable[[dict[str, Any]], Any], rank: str = "") -> Edit:
    """`edit` of the content of every rank's file, or of one's."""

    def apply(root: Path) -> None:
        for path in sorted(root.glob(f"release/mp_rank_{rank or '*'}/model_optim_rng.pt")):
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, weights_only=True)
            edit(content)
            torch.save(content, path)

    return apply


def says(rank: str = "", **args: Any) -> Edit:
    return in_files(lambda content: vars(content["args"]).update(args), rank)


def of_ep4(root: Path) -> None:
    shutil.rmtree(root / "release" / "mp_rank_00_001")
    shutil.copytree(root.parent / "ep4" / "release" / "mp_rank_00_001", root / "release" / "mp_rank_00_001")


def swapped(one: str, other: str) -> Edit:
    """Two ranks' files, each in the other's folder: names and shapes are the same."""

    def apply(root: Path) -> None:
        first, second = (root / "release" / f"mp_rank_{rank}" / "model_optim_rng.pt" for rank in (one, other))
        first.rename(root / "kept")
        second.rename(first)
        (root / "kept").rename(second)

    return apply


def copied(one: str, other: str) -> Edit:
    def apply(root: Path) -> None:
        first, second = (root / "release" / f"mp_rank_{rank}" / "model_optim_rng.pt" for rank in (one, other))
        shutil.copy(first, second)

    return apply


def then(*edits: Edit) -> Edit:
    def apply(root: Path) -> None:
        for edit in edits:
            edit(root)

    return apply


RANKS: dict[str, tuple[str, Edit, str]] = {
    "missing": (
        "tp2ep2",
        in_files(lambda content: content["model"].pop(EACH), "01_001"),
        "release/mp_rank_01_001 has no tensor model.decoder.layers.1.mlp.experts.linear_fc1.weight1, which should have "
        "shape [24, 64]",
    ),
    "missing, grouped": (
        "tp2ep2-grouped",
        in_files(lambda content: content["model"].pop(GROUPED), "01_001"),
        "release/mp_rank_01_001 has no tensor model.decoder.layers.1.mlp.experts.linear_fc1.weight1",
    ),
    "two spellings": (
        "tp2ep2",
        in_files(lambda content: content["model"].update({GROUPED: content["model"][EACH]}), "00_001"),
        "mp_rank_00_001/model_optim_rng.pt holds model.decoder.layers.1.mlp.experts.linear_fc1.weight1 twice, in two "
        "spellings",
    ),
    "too many": (
        "ep2",
        in_files(lambda c: c["model"].update({EACH.replace(".1.linear", ".2.linear"): c["model"][EACH]}), "00_001"),
        "release/mp_rank_00_001 has a tensor model.decoder.layers.1.mlp.experts.linear_fc1.weight2 that a qwen3-moe",
    ),
    "a folder missing": (
        "tp2ep2",
        lambda root: shutil.rmtree(root / "release" / "mp_rank_00_001"),
        "release/mp_rank_00_001 is missing: its args say TP 2 PP 1 EP 2; was the copy complete?",
    ),
    "an expert rank missing": (
        "tp2ep2",
        lambda root: [shutil.rmtree(path) for path in root.glob("release/mp_rank_*_001")] and None,
        "2 of 4 rank folders are missing in",
    ),
    "a folder too many": (
        "ep2",
        lambda root: shutil.copytree(root / "release/mp_rank_00_001", root / "release/mp_rank_00_002") and None,
        "release/mp_rank_00_002 is too many: its args say TP 1 PP 1 EP 2",
    ),
    "experts of two ranks swapped": ("ep2", swapped("00_000", "00_001"), "was written by process 0, "),
    "experts of two ranks swapped, of one half": ("tp2ep2-grouped", swapped("01_000", "01_001"), "they are swapped"),
    "halves of experts swapped, of the later rank": ("tp2ep2", swapped("00_001", "01_001"), "they are swapped"),
    "a rank's experts twice": ("ep4", copied("00_002", "00_003"), "or one is a copy of another"),
    "another layout mixed in": (
        "ep2",
        of_ep4,
        "mp_rank_00_001/model_optim_rng.pt says expert_model_parallel_size 4",
    ),
    "another layout mixed in, under the same args": (
        "ep2",
        then(of_ep4, says(expert_model_parallel_size=2)),
        "release/mp_rank_00_001 has no tensor model.decoder.layers.0.mlp.experts.linear_fc1.weight1",
    ),
    "args with more ranks": ("ep2", says(expert_model_parallel_size=4), "2 of 4 rank folders are missing in"),
    "args with ranks that do not divide": (
        "ep2",
        says(num_experts=5),
        "num_experts 5 and expert_model_parallel_size 2, which does not divide it; are all files of one run?",
    ),
    "args with more experts": (
        "ep2",
        says(num_experts=8),
        "model.decoder.layers.0.mlp.router.weight in release/mp_rank_00_000 has shape [4, 64], its args say [8, 64]",
    ),
    "args with fewer experts": (
        "ep2",
        says(num_experts=2),
        "release/mp_rank_00_000 has a tensor model.decoder.layers.0.mlp.experts.linear_fc1.weight1 that a qwen3-moe",
    ),
    "args with a word": ("ep2", says(num_experts="x"), "say num_experts 'x', where a number was expected"),
    "args that disagree on how experts are cut": (
        "tp2ep2",
        says("01_001", expert_tensor_parallel_size=1),
        "mp_rank_01_001/model_optim_rng.pt says expert_tensor_parallel_size 1,",
    ),
    "args that cut experts otherwise": (
        "tp2ep2",
        says(expert_tensor_parallel_size=1),
        "release/mp_rank_00_001 is too many: its args say TP 2 PP 1 EP 2 ETP 1",
    ),
    "args that nobody can write": (
        "tp2ep2",
        says(expert_tensor_parallel_size=3),
        "expert_tensor_parallel_size 3 and tensor_model_parallel_size 2: one rank's file was written over another's",
    ),
    "args that disagree on the router": (
        "ep2",
        says("00_001", moe_router_topk=1),
        "mp_rank_00_001/model_optim_rng.pt says moe_router_topk 1,",
    ),
    "args that disagree on the layers": (
        "ep2",
        says("00_001", moe_layer_freq=[1, 0]),
        "mp_rank_00_001/model_optim_rng.pt says moe_layer_freq [1, 0],",
    ),
    "args with another number of layers": (
        "ep2",
        says(moe_layer_freq=[1, 1, 1]),
        "moe_layer_freq of 3 layers, where the model has 2",
    ),
    "routers that disagree": (
        "ep2",
        in_files(lambda content: content["model"]["decoder.layers.0.mlp.router.weight"].add_(1), "00_001"),
        "decoder.layers.0.mlp.router.weight differs between",
    ),
}


def refused(to_hf, root: Path, out: Path, sentence: str) -> None:
    to_hf("--input_dir", root, "--output_dir", out, "--no_tokenizer", "--model", "qwen3-moe").refused(sentence)
    assert not out.exists()


@pytest.mark.parametrize("case", RANKS)
def test_rank_files(case: str, checkpoint, tmp_path: Path, to_hf) -> None:
    layout, edit, sentence = RANKS[case]
    shutil.copytree(checkpoint(layout), tmp_path / "in")
    if "another layout" in case:
        shutil.copytree(checkpoint("ep4"), tmp_path / "ep4")
    edit(tmp_path / "in")
    refused(to_hf, tmp_path / "in", tmp_path / "out", sentence)


# --- torch_dist ------------------------------------------------------------------------------------------------------

STACKED = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
APART = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"


def without_items(key: str, lead: tuple[int, ...]) -> Callable[[Any], None]:
    """The parts of an expert, as the index has them."""

    def edit(metadata: Any) -> None:
        entry = metadata.state_dict_metadata[key]
        entry.chunks = [chunk for chunk in entry.chunks if tuple(chunk.offsets)[: len(lead)] != lead]
        metadata.storage_data = {
            index: place
            for index, place in metadata.storage_data.items()
            if index.fqn != key or tuple(index.offset)[: len(lead)] != lead
        }

    return edit


def router_apart(metadata: Any) -> None:
    old, new = "decoder.layers.mlp.router.weight", "decoder.layers.1.mlp.router.weight"
    metadata.state_dict_metadata[new] = metadata.state_dict_metadata[old]
    for index, place in list(metadata.storage_data.items()):
        if index.fqn == old:
            metadata.storage_data[dataclasses.replace(index, fqn=new)] = place


def by_number(metadata: Any) -> None:
    """One expert a second time, with its number in its name, as Megatron-FSDP has them all."""
    new = "decoder.layers.1.mlp.experts.linear_fc2.weight2"
    old = "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"
    metadata.state_dict_metadata[new] = metadata.state_dict_metadata[old]
    for index, place in list(metadata.storage_data.items()):
        if index.fqn == old:
            metadata.storage_data[dataclasses.replace(index, fqn=new)] = place


DIST: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "missing": (
        "stacked",
        without_items(STACKED, (1, 3)),
        f"the parts of {STACKED} at [1, 3] leave a hole in its shape [2, 4, 48, 64], by .metadata; was the copy",
    ),
    "missing, per layer": (
        "apart",
        without_items(APART, (3,)),
        f"the parts of {APART} at [3] leave a hole in its shape [4, 48, 64], by .metadata",
    ),
    "both forms": (
        "stacked",
        router_apart,
        "(decoder.layers.1.mlp.router.weight), as if two checkpoints had been written into it; remove the tensors of "
        "one",
    ),
    "two spellings": (
        "apart",
        by_number,
        "holds decoder.layers.1.mlp.experts.linear_fc2.weight2 several times: decoder.layers.1.mlp.experts.experts."
        "linear_fc2.weight, decoder.layers.1.mlp.experts.linear_fc2.weight2; remove all but one",
    ),
}


@pytest.mark.parametrize("case", DIST)
def test_torch_dist(case: str, checkpoint, tmp_path: Path, to_hf) -> None:
    layout, edit, sentence = DIST[case]
    shutil.copytree(checkpoint(layout), tmp_path / "in")
    path = tmp_path / "in" / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))
    refused(to_hf, tmp_path / "in", tmp_path / "out", sentence)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"num_experts": 8}, "decoder.layers.mlp.router.weight: shape [2, 4, 64], the args say [2, 8, 64]"),
        ({"num_experts": 3}, "decoder.layers.mlp.router.weight: shape [2, 4, 64], the args say [2, 3, 64]"),
        ({"num_experts": None}, "without a mixture of experts (num_experts is None), which qwen3-moe has"),
        ({"moe_ffn_hidden_size": 23}, "linear_fc1.weight: shape [2, 4, 48, 64], the args say [2, 4, 46, 64]"),
        ({"moe_router_topk": 5}, "5 experts per token, and only 4 experts"),
        ({"moe_router_score_function": "sigmoid"}, "with router scores by sigmoid (moe_router_score_function)"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "moe_router_load_balancing_type is 'sinkhorn'"),
        ({"moe_shared_expert_intermediate_size": 24}, "with shared experts (moe_shared_expert_intermediate_size)"),
        ({"moe_latent_size": 16}, "moe_latent_size is 16"),
        ({"moe_router_topk_scaling_factor": 2.5}, "moe_router_topk_scaling_factor 2.5, which qwen3-moe does not have"),
        (
            {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
            "with experts in groups (moe_router_num_groups is 2",
        ),
    ],
)
def test_args_of_torch_dist(args: dict[str, Any], sentence: str, checkpoint, tmp_path: Path, to_hf) -> None:
    shutil.copytree(checkpoint("stacked"), tmp_path / "in")
    path = tmp_path / "in" / "release" / "common.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        common = torch.load(path, weights_only=True)
    vars(common["args"]).update(args)
    torch.save(common, path)
    refused(to_hf, tmp_path / "in", tmp_path / "out", sentence)
