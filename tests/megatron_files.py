"""Reads Megatron-LLM checkpoints for the tests: no Megatron, no converter, and nothing from a pickle but plain data."""

from __future__ import annotations

import _codecs
import argparse
import contextlib
import enum
import re
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")
Chunks = dict[tuple[int, int, int], dict[str, torch.Tensor]]


class PositionEmbeddingType(enum.Enum):
    """Stand-in for the enum that training pickles into args."""

    rotary = 1
    absolute = 2


class ModelType(enum.Enum):
    """Stand-in for the enum that training pickles into args."""

    encoder_or_decoder = 1
    encoder_and_decoder = 2


for _stub in (PositionEmbeddingType, ModelType):
    _stub.__module__ = "megatron.model.enums"

_RECONSTRUCT = np.empty(0).__reduce__()[0]
SAFE: list[Any] = [
    argparse.Namespace,
    PositionEmbeddingType,
    ModelType,
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    type(np.dtype("uint32")),
    _codecs.encode,
]


@dataclass
class Checkpoint:
    """All ranks of one iteration: `tensors[(tp, pp, chunk)]` is a flat dict in the training spelling."""

    folder: Path
    files: dict[tuple[int, int], dict[str, Any]]
    tensors: Chunks

    @property
    def args(self) -> argparse.Namespace:
        return self.files[min(self.files)]["args"]

    @property
    def single(self) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint that is not cut at all."""
        assert list(self.tensors) == [(0, 0, 0)], f"expected one rank, found {sorted(self.tensors)}"
        return self.tensors[0, 0, 0]


def flatten(model: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """A rank's `model` as {name: tensor}, either spelling brought to the training one, `language_model.` dropped."""
    flat: dict[str, torch.Tensor] = {}
    for key, value in model.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, torch.Tensor):
            name = name.removeprefix("language_model.").replace(".attention.", ".self_attention.")
            flat["encoder." + name.removeprefix("transformer.") if name.startswith("transformer.") else name] = value
        else:
            raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor")
    return flat


def load_rank(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals(SAFE):
        return torch.load(path, weights_only=True, map_location="cpu")


def rank_of(folder_name: str) -> tuple[int, int]:
    """`mp_rank_01_002` is tensor rank 1 of stage 2; `mp_rank_01` is tensor rank 1 of the only stage."""
    numbers = [int(part) for part in folder_name.removeprefix("mp_rank_").split("_")]
    return numbers[0], numbers[1] if len(numbers) > 1 else 0


def read_checkpoint(root: Path) -> Checkpoint:
    tracker = (root / "latest_checkpointed_iteration.txt").read_text().strip()
    folder = root / (tracker if tracker == "release" else f"iter_{int(tracker):07d}")
    files, tensors = {}, {}
    for path in sorted(folder.glob("mp_rank_*/*.pt")):
        if path.name not in MODEL_FILES:
            continue
        if not re.fullmatch(r"mp_rank_[0-9_]+", path.parent.name):  # digits of other scripts count for nobody
            continue
        tp, pp = rank_of(path.parent.name)
        files[tp, pp] = content = load_rank(path)
        chunks = ["model"] if "model" in content else sorted(key for key in content if key.startswith("model"))
        for number, key in enumerate(chunks):
            tensors[tp, pp, number] = flatten(content[key])
    assert files, f"no rank files below {folder}"
    return Checkpoint(folder, files, tensors)


def nest(flat: dict[str, torch.Tensor], original: bool = False) -> dict[str, Any]:
    """The `model` dict of one rank file in the spelling of training, or of the original converter."""

    def tree(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v.clone() for k, v in flat.items() if k.startswith(prefix)}

    stack: dict[str, torch.Tensor] = tree("encoder.")
    if original:
        stack = {name.replace(".self_attention.", ".attention."): value for name, value in stack.items()}
    stack = OrderedDict(stack)
    if not original:
        stack._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined] # as Module.state_dict leaves it
    language_model: dict[str, Any] = {"transformer" if original else "encoder": stack}
    if embedding := tree("embedding.word_embeddings."):
        language_model["embedding"] = (
            {"word_embeddings.weight": embedding["weight"]} if original else {"word_embeddings": embedding}
        )
    if "lm_head" in flat:
        language_model["lm_head"] = flat["lm_head"].clone()
    model: dict[str, Any] = {"language_model": language_model}
    if copy := tree("word_embeddings_for_head."):
        model["word_embeddings_for_head"] = copy
    return model


@contextlib.contextmanager
def importable_enums() -> Iterator[None]:
    """Pickling an enum needs its module; Megatron's is there only while a test writes as training does."""
    modules = {name: types.ModuleType(name) for name in ("megatron", "megatron.model", "megatron.model.enums")}
    for stub in (PositionEmbeddingType, ModelType):
        setattr(modules["megatron.model.enums"], stub.__name__, stub)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def save_rank(content: dict[str, Any], path: Path) -> None:
    with importable_enums():
        torch.save(content, path)


def write_checkpoint(
    root: Path,
    tensors: Chunks,
    args: dict[str, Any],
    iteration: int | str = "release",
    distributed_optimizer: bool = False,
    original: bool = False,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Writes what training (or the original converter) would leave behind; returns the iteration's folder."""
    folder = root / (str(iteration) if iteration == "release" else f"iter_{iteration:07d}")
    pipeline = 1 + max(pp for _, pp, _ in tensors)
    virtual = 1 + max(chunk for _, _, chunk in tensors)
    for tp, pp in sorted({(tp, pp) for tp, pp, _ in tensors}):
        content: dict[str, Any] = {
            "args": argparse.Namespace(**args),
            "checkpoint_version": 3.0,
            "iteration": iteration,
            **(extra or {}),
        }
        for chunk in range(virtual):
            content["model" if virtual == 1 else f"model{chunk}"] = nest(tensors[tp, pp, chunk], original)
        name = f"mp_rank_{tp:02d}" if pipeline == 1 else f"mp_rank_{tp:02d}_{pp:03d}"
        place = folder / name
        place.mkdir(parents=True)
        save_rank(content, place / ("model_rng.pt" if distributed_optimizer else "model_optim_rng.pt"))
        if distributed_optimizer:
            shard = folder / f"{name}_000"
            shard.mkdir()
            torch.save({"optimizer": {"state": torch.zeros(3)}}, shard / "optim.pt")
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


def assert_same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], where: str = "") -> None:
    """Same names, dtypes, shapes, and bits."""
    assert sorted(actual) == sorted(expected), f"{where}: names differ: {sorted(set(actual) ^ set(expected))}"
    for name, wanted in expected.items():
        found = actual[name]
        assert found.dtype == wanted.dtype, f"{where}: {name} is {found.dtype}, expected {wanted.dtype}"
        assert found.shape == wanted.shape, f"{where}: {name} is {found.shape}, expected {wanted.shape}"
        same = torch.equal(found.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))
        assert same, f"{where}: {name} has other values"


def assert_same_ranks(actual: Chunks, expected: Chunks) -> None:
    assert sorted(actual) == sorted(expected)
    for key, wanted in expected.items():
        assert_same_tensors(actual[key], wanted, f"(tp, pp, chunk) {key}")
