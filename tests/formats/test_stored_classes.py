"""Classes of training's code in a checkpoint: kept as names in its args and states, refused where the weights are.

The enumerations are made up: what a release adds next is on no list.
"""

from __future__ import annotations

import argparse
import enum
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
from conftest import Script
from megatron_files import assert_same_tensors

MODEL = tm.Tiny("classes", "llama2", layers=2, heads=4, groups=2)


def member(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A member of an enumeration of training's code, which is not importable for the converter."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        parent = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent) or types.ModuleType(parent))
    made: Any = enum.Enum(name, {"none": 1, "attn": 2})
    made.__module__ = module
    monkeypatch.setattr(sys.modules[module], name, made, raising=False)
    return made(2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, to_megatron: Script) -> dict[str, Path]:
    """A checkpoint of each format, without a manifest."""
    root = tmp_path_factory.mktemp("classes")
    source, made = tm.write_huggingface(root / "hf", MODEL, tokenizer=False), {}
    for name, options in {
        "llm": (),
        "torch": ("--target", "megatron-core", "--ckpt-format", "torch"),
        "torch_dist": ("--target", "megatron-core"),
    }.items():
        made[name] = root / name
        to_megatron("llama2", "--model-path", source, "--out", made[name], *options).succeeded()
        (made[name] / "conversion_manifest.json").unlink()
    return made


class Edited:
    """Lets one file of a checkpoint have other content for a while."""

    def __init__(self, root: Path) -> None:
        (self.path,) = [*root.glob("release/common.pt"), *root.glob("release/mp_rank_00/model_optim_rng.pt")]
        self.plain = self.path.read_bytes()
        with torch.serialization.safe_globals([argparse.Namespace]):
            self.content = torch.load(self.path, weights_only=True)

    def __enter__(self) -> dict[str, Any]:
        return self.content

    def save(self) -> None:
        torch.save(self.content, self.path)

    def __exit__(self, *_: object) -> None:
        self.path.write_bytes(self.plain)


ENUMS = "megatron.core.transformer.enums"


@pytest.mark.parametrize("form", ["llm", "torch", "torch_dist"])
def test_classes_of_training_are_names(form: str, folders, to_hf, monkeypatch, tmp_path: Path) -> None:
    edited = Edited(folders[form])
    with edited as content:
        vars(content["args"]).update(
            inference_cuda_graph_scope=member(ENUMS, "InferenceCudaGraphScope", monkeypatch),
            cuda_graph_modules=[member(ENUMS, "CudaGraphModule", monkeypatch)],
            something_of_a_fork=member("fork.enums", "Something", monkeypatch),
            data_cache_path=Path("/cache"),
            generator=torch.Generator(),
            skipped={1, 2},
            activation_of_the_draft=torch.nn.functional.gelu,
        )
        content["rerun_state_machine"] = {"mode": member("megatron.core.rerun_state_machine", "RerunMode", monkeypatch)}
        edited.save()
        arguments = ("--input_dir", folders[form], "--output_dir", tmp_path / "out", "--model", "llama2")
        to_hf(*arguments, "--no_tokenizer", "--true_vocab_size", MODEL.vocab).succeeded()
    assert_same_tensors(tm.read_huggingface(tmp_path / "out"), MODEL.tensors())


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
@pytest.mark.parametrize("place", ["layernorm_epsilon", "normalization", "window_size"])
def test_a_class_where_the_model_is_decided(form, place, folders, to_hf, monkeypatch, tmp_path: Path) -> None:
    """Nothing says what value it stands for, so it is refused by name."""
    edited = Edited(folders[form])
    with edited as content:
        setattr(content["args"], place, member("fork.enums", "Something", monkeypatch))
        edited.save()
        arguments = ("--input_dir", folders[form], "--output_dir", tmp_path / "out", "--model", "llama2")
        to_hf(*arguments, "--no_tokenizer").refused(place, "fork.enums.Something")


def test_classes_in_an_index(folders, to_hf, monkeypatch, tmp_path: Path) -> None:
    """What a release puts beside the tensors' places (plans, settings) is of no consequence."""
    path = folders["torch_dist"] / "release" / ".metadata"
    plain = path.read_bytes()
    try:
        index = pickle.loads(plain)
        mode = member("fork.planner", "Mode", monkeypatch)
        index.planner_data = {"mode": mode}
        path.write_bytes(pickle.dumps(index))
        arguments = ("--input_dir", folders["torch_dist"], "--output_dir", tmp_path / "out", "--model", "llama2")
        to_hf(*arguments, "--no_tokenizer").succeeded()
        index.planner_data = None
        index.storage_data = dict.fromkeys(index.storage_data, mode)
        path.write_bytes(pickle.dumps(index))
        to_hf(*arguments, "--no_tokenizer", "--overwrite").refused("fork.planner.Mode", ".metadata")
    finally:
        path.write_bytes(plain)


def test_fsdp_leaves_attributes_on_tensors(to_megatron, tmp_path: Path) -> None:
    """torch then writes another rebuilding function, which its own weights_only loader reads."""
    source = tm.write_huggingface(tmp_path / "hf", MODEL, kind="bin", tokenizer=False)
    tensors = {name: tensor.clone() for name, tensor in MODEL.tensors().items()}
    for number, name in enumerate(sorted(tensors)):
        if number % 2:
            tensors[name] = torch.nn.Parameter(tensors[name])
        tensors[name]._fsdp_flattened = True  # type: ignore[attr-defined]
    torch.save(tensors, source / "pytorch_model.bin")
    assert b"_rebuild_from_type_v2" in (source / "pytorch_model.bin").read_bytes()
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out").succeeded()
