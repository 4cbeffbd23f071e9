"""Megatron-Core's `torch_dist` checkpoints: torch.distributed.checkpoint's files, without a process group.

`.metadata` names every stored tensor, the chunks that it was cut into, and for each chunk a run of bytes in a `.distcp`
file. Such an item is a whole torch.save archive. Layers are stacked along a leading axis, so that neither tensor nor
pipeline parallelism shows; the optimizer's entries stand beside the model's and are never read.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from weights_conversion.config import Parallelism
from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.formats import bridge_gemma, hybrid, torch_files
from weights_conversion.formats.dist_index import METADATA, Stored, StoredChunk, read_metadata
from weights_conversion.formats.dist_masters import masters
from weights_conversion.formats.run_config import RUN_CONFIG, model_yaml, read_run_config
from weights_conversion.formats.stored_args import left_out, plain_args
from weights_conversion.mapping.dialects import MEGATRON_CORE, Dialect

COMMON = "common.pt"
MEGATRON_FSDP = "model.module."
_TEXT = "language_model."  # the text model in a whole one of Megatron-Bridge's, beside vision_model.
_PREFIXES = (  # torch FSDP2's, and NeMo 2's
    *(f"{prefix}{_TEXT}" for prefix in (MEGATRON_FSDP, "model.", "module.", "")),
    *(MEGATRON_FSDP, "model.", "module."),
)
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class DistCheckpoint:
    """A torch_dist checkpoint. `args` are empty where it stores none; `left_out` as stored_args.left_out has it."""

    folder: Path
    iteration: int | str
    args: Mapping[str, Any]
    left_out: Mapping[str, str]
    stored: Mapping[str, Stored] = field(repr=False)
    dialect: Dialect = MEGATRON_CORE
    parallel: Parallelism = field(default_factory=Parallelism)
    trained_dtype: torch.dtype | None = None  # where the stored tensors are of another
    said_by: Path | None = None  # the file that states the args
    adapters: Mapping[str, Stored] = field(default_factory=dict, repr=False)  # beside the base's tensors, or alone
    others: tuple[str, ...] = ()  # tensors beside a text model's, by name
    states: Mapping[str, int] = field(default_factory=dict, repr=False)  # bytes of files for what nobody here reads

    format = "torch_dist"
    layout = "torch_dist"

    @property
    def holds_model(self) -> bool:
        """Whether there is more than adapters, or nothing at all."""
        return bool(self.stored or not self.adapters)

    @property
    def names(self) -> set[str]:
        """Of all stored tensors."""
        return set(self.stored)

    @property
    def vocabulary(self) -> int:
        """Rows of the stored embedding, padding included."""
        stored = self.stored.get(_EMBEDDING)
        if stored is None or len(stored.size) != 2:
            raise ConversionError(
                f"{self.folder} has no {_EMBEDDING} of Megatron-Core's torch_dist format; it has "
                f"{', '.join(sorted(self.stored)[:4]) or 'no parameter'}{' ...' * (len(self.stored) > 4)}"
            )
        return stored.size[0]

    def has_head(self) -> bool:
        """Whether there is an output layer of its own."""
        return "output_layer.weight" in self.stored

    def check_unread(self) -> None:
        """Raises ConversionError where files lack bytes of Transformer Engine's states, which training loads."""
        problems = []
        for name, end in sorted(self.states.items()):
            size = fileio.size_of(self.folder / name)
            if size is None or size < end:
                has = "is not there" if size is None else f"has {size} bytes: it is cut off"
                problems.append(
                    f"{self.folder / name} {has}, but {METADATA} places states of Transformer Engine up to byte {end}; "
                    "copy it again"
                )
        if problems:
            raise ConversionError(*problems)


def open_dist(folder: Path, iteration: int | str, weights: str = "model") -> DistCheckpoint:
    """Opens a torch_dist checkpoint: its index and args, no tensors. `weights` "master": the optimizer's."""
    stored, others, states = read_metadata(folder / METADATA)
    common = _common(folder, others)
    _check_iteration(folder, iteration, common)
    args, said_by = _args(folder, common, others)
    prefix, stored = _without_prefix(stored)
    others = _beside(prefix, stored)
    stored = {key: tensor for key, tensor in stored.items() if key not in others}
    adapters = {key: tensor for key, tensor in stored.items() if ".adapter." in key}
    stored = {key: tensor for key, tensor in stored.items() if key not in adapters}
    if weights == "master":
        stored = masters(folder, stored, prefix)
    plain = {} if args is None else plain_args(args, said_by)
    lost = {} if args is None else left_out(args, plain)
    if hybrid.pattern_of(plain) is not None:
        plain = hybrid.read_args(plain, str(folder))
        lost = {name: kind for name, kind in lost.items() if name not in ("spec", hybrid.PATTERN)}
        if plain.get(hybrid.IS_HYBRID):
            stored, adapters = (hybrid.as_gpt_names(part, str(folder)) for part in (stored, adapters))
    files = {chunk.file for tensor in (*stored.values(), *adapters.values()) for chunk in tensor.chunks}
    missing = sorted(name for name in files if not fileio.is_file(folder / name))
    if missing:
        shown = ", ".join(missing[:8]) + f" and {len(missing) - 8} more" * (len(missing) > 8)
        raise ConversionError(f"{folder} lacks {shown}, which {METADATA} names; copy the missing files")
    # Megatron-FSDP stores the optimizer's float32 parameters, whatever type was trained.
    stated = plain.get("params_dtype") if prefix.startswith(MEGATRON_FSDP) and weights == "model" else None
    trained = stated if isinstance(stated, torch.dtype) else None
    return DistCheckpoint(
        folder,
        iteration,
        plain,
        lost,
        stored,
        trained_dtype=trained,
        said_by=None if args is None else said_by,
        adapters=adapters,
        others=others,
        states=states,
    )


def _check_iteration(folder: Path, iteration: int | str, common: Mapping[str, Any]) -> None:
    """Refuses an iteration that stands under another's number. A folder of any other name is what its user calls it.

    A `release` too: some save at iteration 1 and move it there.
    """
    stated = common.get("iteration")
    if type(stated) is int and type(iteration) is int and stated != iteration:
        raise ConversionError(
            f"{folder} is of iteration {stated} by its common state, but stands in {folder.name}; rename it to "
            f"iter_{stated:07d}, or to a name of another kind to read it as it is"
        )


def _args(folder: Path, common: Mapping[str, Any], others: Mapping[str, StoredChunk]) -> tuple[Any, Path]:
    """(args, None where there are none; the file that states them): what training stored, else its wrapper's YAML."""
    stored = common.get("args")
    if stored is not None:
        held = "args" if "args" in others else next(iter(sorted(others)), None)
        return stored, folder / (COMMON if fileio.is_file(folder / COMMON) or held is None else others[held].file)
    for path in (folder / RUN_CONFIG, model_yaml(folder)):
        if path is not None and fileio.is_file(path):
            return argparse.Namespace(**bridge_gemma.in_core_words(read_run_config(path), f"the args in {path}")), path
    return None, folder / COMMON


def _entry(folder: Path, entry: StoredChunk) -> Any:
    path = folder / entry.file
    if not fileio.is_file(path):
        raise ConversionError(f"{folder} lacks {entry.file}, which holds the args; copy it again")
    content = torch_files.read_torch_file(path, entry.start, entry.length, training=True).content
    return content[0] if isinstance(content, list) and len(content) == 1 else content


def _without_prefix(stored: Mapping[str, Stored]) -> tuple[str, dict[str, Stored]]:
    """The wrappers' names in front of every parameter's, and the tensors without them."""
    alone = bool(stored) and all(".adapter." in key for key in stored)
    prefix = next(
        (p for p in _PREFIXES if p + _EMBEDDING in stored or (alone and all(key.startswith(p) for key in stored))), ""
    )
    return prefix, {key.removeprefix(prefix): tensor for key, tensor in stored.items()}


def _beside(prefix: str, stored: Mapping[str, Stored]) -> tuple[str, ...]:
    """Names of tensors that stand beside the text model in a whole one."""
    if not prefix.endswith(_TEXT):
        return ()
    outer = prefix.removesuffix(_TEXT)
    beside = tuple(f"{outer}{name}." for name in ("vision_model", "visual", "vision_tower", "multi_modal_projector"))
    return tuple(key for key in stored if key.startswith(beside))


def _common(folder: Path, others: Mapping[str, StoredChunk]) -> Mapping[str, Any]:
    """The common state, or what of it is needed: common.pt, or the entry that newer releases put among the tensors."""
    if "args" in others and not fileio.is_file(folder / COMMON):  # torch_dcp, fsdp_dtensor
        return {name: _entry(folder, others[name]) for name in ("args", "iteration") if name in others}
    path, entry = folder / COMMON, next((item for _, item in sorted(others.items())), None)
    if fileio.is_file(path):
        content = torch_files.read_torch_file(path, training=True).content
    elif entry is not None:
        path = folder / entry.file
        if not fileio.is_file(path):
            raise ConversionError(f"{folder} lacks {entry.file}, which holds the common state; copy it again")
        content = torch_files.read_torch_file(path, entry.start, entry.length, training=True).content
        if isinstance(content, list) and len(content) == 1:
            (content,) = content
    elif fileio.is_file(folder / RUN_CONFIG) or model_yaml(folder) is not None:
        return {}
    else:
        raise ConversionError(
            f"{folder} has neither {COMMON} nor {RUN_CONFIG}, so nothing says what model it is; copy them "
            "from where the checkpoint was saved"
        )
    if not isinstance(content, dict):
        raise ConversionError(f"the common state in {path} is a {type(content).__name__}, not a dict")
    return content
