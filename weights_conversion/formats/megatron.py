"""Megatron checkpoint folders: the tracker, the iteration it names, and rank files (`torch` format) of any layout."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Any

import torch

from weights_conversion import core_args
from weights_conversion.config import ConversionError, ModelConfig, Parallelism
from weights_conversion.dialects import CORE_LOCAL_NORMS, MEGATRON_CORE, MEGATRON_LLM, Dialect
from weights_conversion.formats import pickles, torch_files
from weights_conversion.mapping import Architecture
from weights_conversion.placement import Placed, TensorRef, chunk_key, rank_folder
from weights_conversion.plan import source_megatron

TRACKER = "latest_checkpointed_iteration.txt"
MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")  # the latter beside a distributed optimizer's optim.pt
# Parts of a model that hold no parameter: buffers, and Transformer-Engine's state.
_IGNORED = re.compile(r"(\._extra_state|\.inv_freq|\.rotary_emb\..*)$")
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
    "layernorm_epsilon",
    "rope_theta",
    "iteration",
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


def find_iteration(root: Path, load_iters: int | None) -> tuple[Path, int | str]:
    """The folder that the tracker (or --load_iters) names."""
    tracker = root / TRACKER
    if not root.is_dir():
        raise ConversionError(f"{root} is not a folder; --input_dir names the one that holds {TRACKER}")
    if load_iters is not None:
        iteration: int | str = load_iters
    else:
        try:
            with tracker.open("rb") as file:
                text = file.read(100).decode("utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConversionError(
                f"{tracker} cannot be read; --input_dir names the folder that holds it, --load_iters replaces it"
            ) from error
        if text != "release" and not (re.fullmatch(r"[0-9]{1,12}", text) and int(text) > 0):
            raise ConversionError(f"{tracker} says {text[:80]!r}, where 'release' or a positive number was expected")
        iteration = text if text == "release" else int(text)
    folder = root / (iteration if isinstance(iteration, str) else f"iter_{iteration:07d}")
    if not folder.is_dir():
        present = sorted(path.name for path in root.iterdir() if re.fullmatch(r"release|iter_\d+", path.name))
        said = "--load_iters" if load_iters is not None else TRACKER
        raise ConversionError(
            f"{said} names {folder.name}, which {root} does not hold (it has: {', '.join(present) or 'none'}); "
            "--load_iters names another iteration"
        )
    return folder, iteration


@dataclass(frozen=True)
class RankFiles:
    """A checkpoint of one file per rank. `ranks` maps (tp, pp) to its tensors, in the training spelling."""

    folder: Path
    iteration: int | str
    dialect: Dialect
    args: Mapping[str, Any]
    parallel: Parallelism
    ranks: Mapping[tuple[int, int], Mapping[str, TensorRef]] = field(repr=False)

    @property
    def vocabulary(self) -> int:
        """Rows of the stored embedding, padding included."""
        name = "embedding.word_embeddings.weight"
        name = name if self.dialect is MEGATRON_CORE else f"language_model.{name}"
        ref = self.ranks[0, 0].get(f"{chunk_key(0, self.parallel)}.{name}")
        if ref is None or not ref.shape:
            raise ConversionError(f"{self.folder} has no {name} on its first stage")
        return ref.shape[0] * self.parallel.tensor

    def has_head(self) -> bool:
        """Whether the last stage has an output layer of its own."""
        names = self.ranks[0, self.parallel.pipeline - 1]
        return any(name.endswith((".lm_head", ".output_layer.weight")) for name in names)

    def sources(
        self, architecture: Architecture, config: ModelConfig
    ) -> dict[tuple[str, int | None], tuple[Placed, ...]]:
        """Places every parameter; missing, misshapen and unexpected tensors are errors."""
        problems: list[str] = []
        if self.dialect is MEGATRON_CORE:
            names = {name for tensors in self.ranks.values() for name in tensors}
            problems = core_args.foreign_tensors(names, self.folder)
            problems += core_args.foreign_to_family(self.args, config.family, self.folder)
            if problems:
                raise ConversionError(*problems)
        used: set[tuple[int, int, str]] = set()
        count, stages = sum(map(len, self.ranks.values())), self.parallel.pipeline * self.parallel.virtual
        if config.num_layers > count or config.num_layers % stages:
            raise ConversionError(
                f"the args of {self.folder} say {config.num_layers} layers, which {count} tensors in {stages} stages "
                "cannot be"
            )

        def find(tp: int, pp: int, name: str, shape: tuple[int, ...]) -> TensorRef:
            where = self.folder.name + "/" + rank_folder(tp, pp, self.parallel)
            tensors = self.ranks[tp, pp]
            if name not in tensors:
                name = self._other_norm(name)
            used.add((tp, pp, name))
            ref = tensors.get(name)
            if ref is None:
                problems.append(f"{where} has no tensor {name}, which should have shape {list(shape)}")
            elif ref.shape != shape:
                problems.append(f"{name} in {where} has shape {list(ref.shape)}, its args say {list(shape)}")
            else:
                return ref
            anything = next(iter(tensors.values()))
            return TensorRef(anything.file, name, anything.dtype, shape)

        placed = source_megatron(architecture, config, self.parallel, self.vocabulary, self.dialect, find)
        for (tp, pp), tensors in sorted(self.ranks.items()):
            for name in sorted(tensors):
                if (tp, pp, name) not in used:
                    where = self.folder.name + "/" + rank_folder(tp, pp, self.parallel)
                    problems.append(f"{where} has a tensor {name} that a {config.family} model does not have")
        if problems:
            raise ConversionError(*problems)
        return placed

    def _other_norm(self, name: str) -> str:
        """The other spelling of one of Megatron-Core's norms, of which a file needs but one; other names unchanged."""
        if self.dialect is MEGATRON_CORE:
            for fused, local in CORE_LOCAL_NORMS.items():
                for this, other in ((fused, local), (local, fused)):
                    if name.endswith(this.split("{}")[1]):
                        return name.removesuffix(this.split("{}")[1]) + other.split("{}")[1]
        return name


def open_rank_files(folder: Path, iteration: int | str) -> RankFiles:
    """Opens every rank file of an iteration without reading its tensors, and checks that they belong together."""
    files = _rank_files(folder)
    problems: list[str] = []
    opened: dict[tuple[int, int], torch_files.TorchFile] = {}
    args: dict[tuple[int, int], dict[str, Any]] = {}
    for rank, path in sorted(files.items()):
        opened[rank] = torch_files.read_torch_file(path)
        content = opened[rank].content
        if not isinstance(content, dict) or not any(str(key).startswith("model") for key in content):
            raise ConversionError(f"{path} is not a Megatron checkpoint: it holds no model")
        args[rank] = plain_args(content.get("args"), path)
        version = _plain(content.get("checkpoint_version", 0))
        if not isinstance(version, (int, float)) or not version >= 2.0:
            problems.append(f"{path} has checkpoint_version {version}, whose QKV order differs; 3.0 was expected")
        expected = _plain(content.get("iteration", iteration))
        if expected != iteration and not (iteration == "release" and expected == 0):
            problems.append(f"{path} is of iteration {expected}, but stands in {folder.name}")
    first = min(files)
    problems += _disagreements(args, first, files)
    problems += _strays(args, files)
    parallel = _parallelism(args[first], files, folder, problems)
    if problems:
        raise ConversionError(*problems)
    ranks = {rank: _model_tensors(file, parallel) for rank, file in opened.items()}
    core = any(".decoder." in f".{name}" for tensors in ranks.values() for name in tensors)
    if core:
        if problems := core_args.unreadable(vars(opened[first].content["args"]), args[first], folder):
            raise ConversionError(*problems)
        return RankFiles(folder, iteration, MEGATRON_CORE, core_args.normalise(args[first], folder), parallel, ranks)
    return RankFiles(folder, iteration, MEGATRON_LLM, args[first], parallel, ranks)


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """(tp, pp) -> its file. Folders without a model file (a distributed optimizer's) do not count."""
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(r"mp_rank_([0-9]{2,6})(?:_([0-9]{3,6}))?", path.name)
        present = [path / name for name in MODEL_FILES if (path / name).is_file()]
        if match and len(present) > 1:
            raise ConversionError(f"{path} holds {' and '.join(MODEL_FILES)}; remove the one that is out of date")
        if match and present:
            (file,) = present
            rank = (int(match[1]), int(match[2] or 0))
            if rank in found:
                raise ConversionError(f"{found[rank].parent} and {path} both are rank {rank}; remove the stale one")
            found[rank] = file
    if not found:
        if any(folder.glob("*.distcp")):
            raise ConversionError(f"{folder} holds *.distcp files but not their index, .metadata; copy it there")
        raise ConversionError(f"{folder} holds no rank folder mp_rank_* with {' or '.join(MODEL_FILES)}")
    return found


def plain_args(args: Any, path: Path) -> dict[str, Any]:
    """A Namespace read from `path` as a dict of plain values, those that decide a shape checked for their type.

    What is not plain (nested containers, objects of the training code) is left out: nothing here needs it, and to
    compare or print it may take forever, since containers in a pickle can share their parts.
    """
    if args is None or not hasattr(args, "__dict__"):
        raise ConversionError(f"{path} holds no args, so nothing says what model it is")
    plain = {name: _plain(value) for name, value in vars(args).items() if isinstance(name, str)}
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
        self._kind = type(value).__name__

    def __repr__(self) -> str:
        return f"of type {self._kind}"


def _plain(value: Any, inner: bool = False) -> Any:
    """A scalar, enumeration member or short flat list as it is, anything else as _Other."""
    if isinstance(value, pickles.EnumMember):
        return _Other(value) if isinstance(_plain(value.value, True), _Other) else value
    if isinstance(value, (list, tuple)) and not inner and len(value) <= 64:
        parts = [_plain(part, True) for part in value]
        return _Other(value) if any(isinstance(part, _Other) for part in parts) else parts
    huge = (isinstance(value, int) and abs(value) >= 1 << 63) or (isinstance(value, str) and len(value) > 100_000)
    plain = value is None or isinstance(value, (bool, int, float, str, torch.dtype))
    return value if plain and not huge else _Other(value)


def _disagreements(args: Mapping, first: tuple[int, int], files: Mapping) -> list[str]:
    problems = []
    for rank, path in sorted(files.items()):
        for name in _SHARED:
            ours, theirs = args[first].get(name), args[rank].get(name)
            if ours != theirs:
                problems.append(f"{path} says {name} {theirs}, {files[first]} says {ours}: they are not one checkpoint")
    return problems


def _strays(args: Mapping, files: Mapping) -> list[str]:
    """Rank files that stand in each other's folders, by the process that each says it was written by.

    Training numbers its processes tensor ranks first and stages last, whatever lies between, and each leaves its number
    in its args; converters leave the same in all files, or none.
    """
    order = sorted(files, key=lambda rank: (rank[1], rank[0]))
    writers = [args[rank].get("rank") for rank in order]
    if not all(type(writer) is int for writer in writers) or len(set(writers)) == 1:
        return []
    return [
        f"{files[rank]} was written by process {writer}, {files[before]} by process {earlier} (args.rank): they are "
        "swapped, or one is a copy of another; put each rank's own file in its folder"
        for (before, earlier), (rank, writer) in pairwise(zip(order, writers, strict=True))
        if writer <= earlier
    ]


def _parallelism(args: Mapping[str, Any], files: Mapping, folder: Path, problems: list[str]) -> Parallelism:
    """From args where they say it, else from the folders; every rank must be there."""
    found = Parallelism(max(tp for tp, _ in files) + 1, max(pp for _, pp in files) + 1)
    sizes = []
    for name, seen in (
        ("tensor_model_parallel_size", found.tensor),
        ("pipeline_model_parallel_size", found.pipeline),
        ("virtual_pipeline_model_parallel_size", 1),
    ):
        value = args.get(name)
        if value is None:
            value = seen
        if not isinstance(value, int) or not 1 <= value <= 100_000:
            problems.append(f"the args of {folder} say {name} {value!r}, where a positive number was expected")
            value = seen
        sizes.append(value)
    parallel = Parallelism(*sizes)
    if args.get("standalone_embedding_stage"):
        problems.append(f"{folder} was trained with --standalone_embedding_stage, which is not supported")
    wanted = product(range(parallel.tensor), range(parallel.pipeline))
    for rank in islice((rank for rank in wanted if rank not in files), 64):
        problems.append(f"{folder / rank_folder(*rank, parallel)} is missing: its args say {parallel}")
    for tp, pp in sorted(files):
        if tp >= parallel.tensor or pp >= parallel.pipeline:
            problems.append(f"{files[tp, pp].parent} is too many: its args say {parallel}")
    return parallel


def _model_tensors(file: torch_files.TorchFile, parallel: Parallelism) -> dict[str, TensorRef]:
    """Tensors of the model (every chunk of it) by name, respelled as training writes them."""
    found: dict[str, TensorRef] = {}
    for chunk in range(parallel.virtual):
        key = chunk_key(chunk, parallel)
        if key not in file.content:
            raise ConversionError(f"{file.path} has no {key}, though its args say {parallel}")
        for name, ref in torch_files.tensors(file, file.content[key]).items():
            if _IGNORED.search(name):
                continue
            spelled = f"{key}.{_training_spelling(name)}"
            if spelled in found:
                raise ConversionError(f"{file.path} holds {name} in two spellings")
            found[spelled] = ref
    return found


def _training_spelling(name: str) -> str:
    """The original converter says transformer and attention where training says encoder and self_attention."""
    if name.startswith("language_model.transformer."):
        name = name.replace("transformer.", "encoder.", 1)
    if name.startswith("language_model.encoder.layers."):
        name = name.replace(".attention.", ".self_attention.", 1)
    return name
