"""Finds every parameter of a model in a source: the tensors of Hugging Face or Meta, or an opened Megatron checkpoint.

Each tensor of the source must be used: what is missing, misshapen, stored twice or too many is an error, and all of
them are raised at once.
"""

from __future__ import annotations

from pathlib import Path

from weights_conversion.architectures import latent
from weights_conversion.config import ModelConfig
from weights_conversion.errors import ConversionError
from weights_conversion.formats.megatron import RankFiles
from weights_conversion.formats.torch_dist import DistCheckpoint
from weights_conversion.layouts.placement import Located, TensorRef
from weights_conversion.layouts.rank_files import Rank, place_megatron, rank_folder
from weights_conversion.mapping.parameters import Architecture, is_buffer
from weights_conversion.sources import naming
from weights_conversion.sources.locate_dist import in_torch_dist


def locate(files: RankFiles | DistCheckpoint, architecture: Architecture, config: ModelConfig) -> Located:
    """Places every parameter of `architecture`. Raises ConversionError with all that does not fit."""
    if isinstance(files, RankFiles):
        return in_rank_files(files, architecture, config)
    if files.adapters:
        raise ConversionError(
            f"{files.folder} holds LoRA adapters beside its weights ({next(iter(files.adapters))}); megatron_to_hf.py "
            "merges them, or writes them as PEFT's (--adapter_as peft)"
        )
    return in_torch_dist(files, architecture, config)


def check_floating(located: Located, where: Path) -> None:
    """Refuses weights that are no floating-point numbers, as other programs' quantised ones."""
    placed = (each for group in located.values() for each in group)
    wrong = {each.name: each.dtype for each in placed if not each.dtype.is_floating_point}
    if wrong:
        name = next(iter(wrong))
        raise ConversionError(
            f"{where} stores {len(wrong)} weights as no floating-point numbers ({name} is {wrong[name]}), as a "
            "quantising program does; give the model before it was quantised"
        )


def in_rank_files(files: RankFiles, architecture: Architecture, config: ModelConfig) -> Located:
    missing: dict[str, str] = {}
    wrong: list[tuple[str, str]] = []
    used: set[tuple[Rank, str]] = set()
    count, stages = sum(map(len, files.ranks.values())), files.parallel.pipeline * files.parallel.virtual
    uneven = files.parallel.layers
    layers = config.num_layers * (2 if files.parallel.hybrid else 1)
    if layers > count or layers != (sum(uneven) or layers // stages * stages):
        raise ConversionError(
            f"the args of {files.folder} say {layers} layers, which {count} tensors in {stages} stages cannot be"
        )

    if latent.is_fused(files.names):
        if problems := latent.fusion_problems(config, files.parallel.tensor):
            raise ConversionError(*(f"{files.folder}: {problem}" for problem in problems))
        architecture = latent.fused(architecture)
    anything = next(ref for tensors in files.ranks.values() for ref in tensors.values())

    def place_of(rank: Rank) -> str:
        return f"{files.folder.name}/{rank_folder(rank, files.parallel)}"

    def find(rank: Rank, name: str, shape: tuple[int, ...]) -> TensorRef:
        tensors = files.ranks[rank]
        if name not in tensors:
            name = files.dialect.other_spelling(name)
        used.add((rank, name))
        ref = tensors.get(name)
        if ref is None:
            missing.setdefault(name, f"{place_of(rank)} has no tensor {name}, which should have shape {list(shape)}")
        elif ref.shape != shape:
            said = f"{name} in {place_of(rank)} has shape {list(ref.shape)}, its args say {list(shape)}"
            wrong.append((name, said))
        else:
            return ref
        return TensorRef(anything.file, name, anything.dtype, shape)

    placed: Located = {}
    for instance in architecture.instances(config):
        shape = instance.row.megatron_shape(config, files.vocabulary)
        placed[instance.key] = (place_megatron(instance, shape, config, files.parallel, files.dialect, find),)
    unexpected = {
        name: f"{place_of(rank)} has a tensor {name} that a {config.family} model does not have"
        for rank, tensors in sorted(files.ranks.items(), reverse=True)
        for name in sorted(tensors)
        if (rank, name) not in used and not is_buffer(name)
    }
    if problems := naming.grouped(wrong) + naming.mismatch(str(files.folder), missing, unexpected):
        raise ConversionError(*problems)
    return placed
