"""Forms that Hugging Face's files of one model may have, and that an export is to have too.

Which experts are packed, which rows keep a type of their own, what is around a text model: the source's form is kept in
the manifest, a reference's is read from its files, else it is the family's on the hub.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weights_conversion.architectures import FAMILIES
from weights_conversion.config import ModelConfig
from weights_conversion.configs import hf_write
from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.formats import huggingface
from weights_conversion.launch import distributed
from weights_conversion.layouts.placement import Located, Placed
from weights_conversion.mapping.dialects import HF, HF_OUTSIDE, HF_TEXT, Dialect
from weights_conversion.sources.locate_hf import packed_names
from weights_conversion.sources.reference import Reference
from weights_conversion.sources.text_part import text_part

# Beside a model's weights and its tokenizer's files: how images and videos become its input.
PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class HFForm:
    """`packed`: names of all experts in one tensor. `own_types`: rows that keep their hf_dtype. `others`: tensors of a
    repository that are not the text model's; `files` are small ones of it."""

    packed: frozenset[str] = frozenset()
    own_types: frozenset[str] = frozenset()
    dialect: Dialect = HF
    others: tuple[Placed, ...] = ()
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def stated(
    family: str, config: ModelConfig, names: frozenset[str], located: Located, dialect: Dialect
) -> dict[str, Any]:
    """What a manifest keeps of a Hugging Face source's form; of another source nothing."""
    if dialect.megatron:
        return {}
    architecture = FAMILIES[family]
    own = {
        instance.row.megatron
        for instance in architecture.instances(config)
        if instance.row.hf_dtype is not None and str(located[instance.key][0].dtype) == f"torch.{instance.row.hf_dtype}"
    }
    packed = sorted(packed_names(architecture, config, names, dialect))
    outside = architecture.outer is not None and architecture.outer.outside and dialect is not HF_TEXT
    of_names = {"names_outside": dialect is HF_OUTSIDE} if outside else {}
    return {"packed_names": packed, "own_types": sorted(own), **of_names}


def form_of(
    config: ModelConfig, manifest: Mapping[str, Any] | None, base: Mapping[str, Any], reference: Reference | None
) -> HFForm:
    """Of an export on top of the config `base`. Raises ConversionError for a reference of files in another form."""
    family = FAMILIES[config.family]
    rows = family.parameters(config)
    dialect = HF
    if family.outer is not None and not hf_write.is_wrapped(config.family, base):
        dialect = HF_TEXT
    elif family.outer is not None and family.outer.outside and (manifest or {}).get("names_outside", True):
        dialect = HF_OUTSIDE
    if reference is not None and family.outer is not None and (found := _of_reference(config, reference, dialect)):
        return found
    said = manifest or {}
    packed = {place.name for row in rows for place in row.packed}
    if isinstance(said.get("packed_names"), list):
        packed &= set(map(str, said["packed_names"]))
    elif not said.get("packed_experts", family.packs):
        packed = set()
    elif not said:
        packed = {name for name in packed if not name.startswith("mtp.")}
    own = {row.megatron for row in rows if row.hf_dtype is not None}
    if isinstance(said.get("own_types"), list):
        own &= set(map(str, said["own_types"]))
    return HFForm(frozenset(packed), frozenset(own), dialect, warnings=_alone(config.family, dialect, reference))


def _alone(family: str, dialect: Dialect, reference: Reference | None) -> tuple[str, ...]:
    """A warning on a repository that is written without what is around its text model."""
    if FAMILIES[family].outer is None or dialect is HF_TEXT:
        return ()
    if reference is not None:
        return (
            f"--reference {reference.name} holds no weights here, so that the vision tensors are left out; name a "
            "folder that has them, or copy them beside the output",
        )
    return (
        "the vision tensors of such a repository are not part of a Megatron checkpoint, and are left out; --reference "
        "names the folder of the model that it was made from, whose are copied",
    )


def with_others(
    reference: Reference | None, family: str, cache: Path | None, held: ExitStack, *, dry: bool
) -> Reference | None:
    """A repository with what is around its text model: the files that hold such tensors are fetched, of the others the
    headers, into a temporary folder that `held` removes. A dry run fetches headers alone. Raises ConversionError.
    """
    outer = FAMILIES[family].outer
    if reference is None or reference.commit is None or outer is None:
        return reference
    if not hf_write.is_wrapped(family, reference.config):  # a text model alone
        return reference
    from weights_conversion.hub import repositories

    others = tuple(f".{start}" for start in outer.others)  # behind a wrapper's name too
    folder = held.enter_context(tempfile.TemporaryDirectory(prefix="weights-conversion-reference-"))
    wanted = repositories.Partly(lambda name: not dry and any(start in f".{name}" for start in others), PROCESSORS)
    with distributed.rank_zero_first("reference"):
        found = repositories.snapshot(
            reference.name, revision=reference.commit, cache_dir=cache, headers=Path(folder) / "of", partly=wanted
        )
    reference = replace(reference, folder=found.folder)
    if not dry and found.folder.is_relative_to(folder):
        _check_fetched(reference, family)
    return reference


def _check_fetched(reference: Reference, family: str) -> None:
    """What is around the text model lies in files that were fetched, which are links; the others have no data."""
    others = text_part(family, huggingface.read_hf(reference.folder)).others or {}
    hollow = [name for name, placed in others.items() if not fileio.is_link(Path(placed.copies[0][0].ref.file))]
    if hollow:
        raise ConversionError(
            f"the index of --reference {reference.name} does not say where {hollow[0]} is; name a folder with all files"
        )


def _of_reference(config: ModelConfig, reference: Reference, dialect: Dialect) -> HFForm | None:
    """None: it has no weights here."""
    if not any(fileio.is_file(reference.folder / name) for name in huggingface.WEIGHT_FILES):
        return None
    part = text_part(config.family, huggingface.read_hf(reference.folder))
    if (part.dialect is HF_TEXT) != (dialect is HF_TEXT):
        raise ConversionError(
            f"config.json of --reference {reference.name} and the names of its weights are of two forms of a model"
        )
    family, own = FAMILIES[config.family], set()
    for row in family.parameters(config):
        if row.hf_dtype is None:
            continue
        names = [part.dialect.spell(row.hf[0]).format(layer=layer, expert=0) for layer in range(config.num_layers)]
        kinds = {part.tensors[name].dtype for name in names if name in part.tensors}
        if kinds and {str(kind) for kind in kinds} == {f"torch.{row.hf_dtype}"}:
            own.add(row.megatron)
    others = tuple(part.others.values()) if part.others and dialect is not HF_TEXT else ()
    files = tuple(reference.folder / name for name in PROCESSORS if fileio.is_file(reference.folder / name))
    note = f"vision     {len(others)} tensors that are not the text model's, of {reference.name}"
    return HFForm(
        packed_names(family, config, set(part.tensors), part.dialect), frozenset(own), part.dialect, others, files,
        notes=(note,) if others else (),
    )  # fmt: skip
