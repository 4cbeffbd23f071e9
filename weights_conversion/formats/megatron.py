"""Megatron checkpoint folders: the tracker, the iteration it names, and rank files (`torch` format) of any layout."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weights_conversion.config import Parallelism
from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.files.collector import without_collector
from weights_conversion.formats import hybrid, rank_masters, torch_files
from weights_conversion.formats.experts import experts_apart
from weights_conversion.formats.iterations import MODEL_FILES, number_of
from weights_conversion.formats.stages import layers_of
from weights_conversion.formats.stored_args import disagreements, left_out, parallelism, plain_args, plain_value, strays
from weights_conversion.formats.wrappers import unwrapped
from weights_conversion.layouts.placement import TensorRef
from weights_conversion.layouts.rank_files import Rank, chunk_key
from weights_conversion.mapping.dialects import MEGATRON_CORE, MEGATRON_LLM, Dialect

_Numbers = tuple[int, ...]  # in the name of a rank's folder
# Parts of a model that hold no parameter: buffers, and Transformer-Engine's state.
_IGNORED = re.compile(r"(\._extra_state|\.inv_freq|\.rotary_emb\..*)$")


@dataclass(frozen=True)
class RankFiles:
    """A checkpoint of one file per rank. `ranks` maps each rank to its tensors, in the training spelling.

    `args` are the first rank's, `left_out` what was left out of them (stored_args.left_out).
    """

    folder: Path
    iteration: int | str
    dialect: Dialect
    args: Mapping[str, Any]
    left_out: Mapping[str, str]
    parallel: Parallelism
    ranks: Mapping[Rank, Mapping[str, TensorRef]] = field(repr=False)

    format = "torch"
    holds_model = True
    trained_dtype = None  # what is stored is what was trained
    said_by = None  # every rank file states the args

    @property
    def layout(self) -> str:
        return str(self.parallel)

    @property
    def names(self) -> set[str]:
        """Of all tensors, whichever rank holds them."""
        return {name for tensors in self.ranks.values() for name in tensors}

    @property
    def last(self) -> Rank:
        """The first tensor rank of the last stage."""
        return Rank(0, self.parallel.pipeline - 1)

    @property
    def vocabulary(self) -> int:
        """Rows of the stored embedding, padding included."""
        name = self.dialect.rank_name("embedding.word_embeddings.weight")
        ref = self.ranks[Rank(0, 0)].get(f"{chunk_key(0, self.parallel)}.{name}")
        if ref is None or not ref.shape:
            raise ConversionError(f"{self.folder} has no {name} on its first stage")
        return ref.shape[0] * self.parallel.tensor

    def has_head(self) -> bool:
        """Whether the last stage has an output layer of its own."""
        names = self.ranks[self.last]
        return any(name.endswith((".lm_head", ".output_layer.weight")) for name in names)

    def check_unread(self) -> None:
        """Each file is read whole: its directory stands at its end."""


@without_collector()
def open_rank_files(folder: Path, iteration: int | str, weights: str = "model") -> RankFiles:
    """Opens every rank file of an iteration without reading its tensors, and checks that they belong together.

    `weights` "master": the optimizer's float32 weights in the places of the model's.
    """
    files = _rank_files(folder)
    problems: list[str] = []
    opened: dict[_Numbers, torch_files.TorchFile] = {}
    args: dict[_Numbers, dict[str, Any]] = {}
    for rank, path in sorted(files.items()):
        opened[rank] = torch_files.read_torch_file(path, training=True)
        content = opened[rank].content
        if not isinstance(content, dict) or not any(str(key).startswith("model") for key in content):
            raise ConversionError(f"{path} is not a Megatron checkpoint: it holds no model")
        args[rank] = plain_args(content.get("args"), path)
        version = plain_value(content.get("checkpoint_version", 0))
        if not isinstance(version, (int, float)) or not version >= 2.0:
            problems.append(f"{path} has checkpoint_version {version}, whose QKV order differs; 3.0 was expected")
        expected = plain_value(content.get("iteration", iteration))
        named = number_of(folder.name) is not None  # else somebody has renamed it, and only the file knows
        if named and expected != iteration and not (iteration == "release" and expected == 0):
            problems.append(f"{path} is of iteration {expected}, but stands in {folder.name}")
    first = min(files)
    problems += disagreements(args, first, files)
    where = _coordinates(files, args[first])
    parallel = parallelism(args[first], {rank: files[numbers] for rank, numbers in where.items()}, folder, problems)
    if not problems:
        of_ranks = {rank: args[numbers] for rank, numbers in where.items()}
        problems += strays(of_ranks, {rank: files[numbers] for rank, numbers in where.items()}, parallel)
    if problems:
        raise ConversionError(*problems)
    lost = left_out(opened[first].content["args"], args[first])
    ranks = {}
    for rank, numbers in where.items():  # each content goes when it is read: those of 512 ranks take half a gigabyte
        ranks[rank] = _model_tensors(opened.pop(numbers), parallel, weights, args[first])
    core = any(".decoder." in f".{name}" for tensors in ranks.values() for name in tensors)
    if core:
        stages = {rank.pipeline: names for rank, names in ranks.items() if rank == Rank(0, rank.pipeline)}
        parallel = dataclasses.replace(parallel, layers=layers_of(stages, args[first], lost, parallel, folder))
    if core and hybrid.pattern_of(args[first]) is not None:
        args[first] = hybrid.read_args(args[first], str(folder))
        lost = {name: kind for name, kind in lost.items() if name not in ("spec", hybrid.PATTERN)}
        parallel = dataclasses.replace(parallel, hybrid=hybrid.IS_HYBRID in args[first])
    return RankFiles(folder, iteration, MEGATRON_CORE if core else MEGATRON_LLM, args[first], lost, parallel, ranks)


def _coordinates(files: Mapping[_Numbers, Path], args: Mapping[str, Any]) -> dict[Rank, _Numbers]:
    """Which rank each folder is of. A single number behind the tensor rank's is a stage, or an expert rank: args say.

    Raises ConversionError for two folders of one rank.
    """
    found: dict[Rank, _Numbers] = {}
    experts = args.get("expert_model_parallel_size") or 1
    for numbers in sorted(files):
        tensor, *further = numbers
        if len(further) == 1 and experts != 1 and (args.get("pipeline_model_parallel_size") or 1) == 1:
            further = [0, *further]
        rank = Rank(tensor, *(*further, 0, 0)[:2])
        if rank in found:
            one, other = files[found[rank]].parent, files[numbers].parent
            raise ConversionError(f"{one} and {other} both are rank {tuple(rank)}; remove the stale one")
        found[rank] = numbers
    return found


def _rank_files(folder: Path) -> dict[_Numbers, Path]:
    """The numbers in a rank folder's name -> its file. Folders without one (a distributed optimizer's) do not count."""
    found: dict[_Numbers, Path] = {}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(r"mp_rank_([0-9]{2,6})(?:_([0-9]{3,6}))?(?:_([0-9]{3,6}))?", path.name)
        present = [path / name for name in MODEL_FILES if fileio.is_file(path / name)]
        if match and len(present) > 1:
            raise ConversionError(f"{path} holds {' and '.join(MODEL_FILES)}; remove the one that is out of date")
        if match and present:
            (file,) = present
            numbers = tuple(int(number) for number in match.groups() if number is not None)
            if numbers in found:
                raise ConversionError(
                    f"{found[numbers].parent} and {path} both are rank {numbers}; remove the stale one"
                )
            found[numbers] = file
    if not found:
        if any(folder.glob("*.distcp")):
            raise ConversionError(f"{folder} holds *.distcp files but not their index, .metadata; copy it there")
        raise ConversionError(f"{folder} holds no rank folder mp_rank_* with {' or '.join(MODEL_FILES)}")
    return found


def _model_tensors(
    file: torch_files.TorchFile, parallel: Parallelism, weights: str, args: Mapping[str, Any]
) -> dict[str, TensorRef]:
    """Tensors of the model (every chunk of it) by name, respelled as training writes them, experts one by one."""
    found: dict[str, TensorRef] = {}
    order: list[str] = []
    for chunk in range(parallel.virtual):
        key = chunk_key(chunk, parallel)
        if key not in file.content:
            raise ConversionError(f"{file.path} has no {key}, though its args say {parallel}")
        tensors = torch_files.tensors(file, file.content[key])
        plain = unwrapped(tensors)
        for name, ref in tensors.items():
            if _IGNORED.search(name):
                continue
            spelled = sys.intern(f"{key}.{_training_spelling(plain[name])}")  # the same on many ranks
            if spelled in found:
                raise ConversionError(f"{file.path} holds {name} in two spellings")
            found[spelled] = ref
        if weights == "master":
            kept = [name for name in rank_masters.live_order(file.content[key]) if not _IGNORED.search(name)]
            order += [f"{key}.{_training_spelling(plain[name])}" for name in kept]
    if weights == "master":
        found = rank_masters.masters(file, found, order)
    experts = args.get("num_experts")
    return found if not experts else experts_apart(found, experts // parallel.expert, str(file.path))


def _training_spelling(name: str) -> str:
    """The original converter says transformer and attention where training says encoder and self_attention."""
    if name.startswith("language_model.transformer."):
        name = name.replace("transformer.", "encoder.", 1)
    if name.startswith("language_model.encoder.layers."):
        name = name.replace(".attention.", ".self_attention.", 1)
    return name


def rank_content(
    refs: Sequence[TensorRef], args: Mapping[str, Any], iteration: int | str, *, flat: bool
) -> dict[str, Any]:
    """The content of a rank file in the spelling of training. `flat`: Megatron-Core's state dict, not nested."""
    content: dict[str, Any] = {"args": argparse.Namespace(**args), "checkpoint_version": 3.0, "iteration": iteration}
    for ref in refs:
        chunk, name = ref.name.split(".", 1)
        model = content.setdefault(chunk, {})
        if flat:
            model[name] = ref
            continue
        for prefix in ("language_model", "embedding", "word_embeddings", "encoder", "word_embeddings_for_head"):
            if name.startswith(prefix + "."):
                model, name = model.setdefault(prefix, {}), name.removeprefix(prefix + ".")
        model[name] = ref
    return content
