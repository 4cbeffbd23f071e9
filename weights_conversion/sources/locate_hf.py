"""Finds every parameter of a model among the tensors of Hugging Face or Meta, experts one by one or packed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from weights_conversion.config import ModelConfig
from weights_conversion.errors import ConversionError
from weights_conversion.layouts.parts import joined_shape, part_of
from weights_conversion.layouts.placement import Located, Placed, slab, two_dimensional
from weights_conversion.mapping.dialects import Dialect
from weights_conversion.mapping.parameters import Architecture, Instance, Packed, is_buffer, named
from weights_conversion.sources import expert_counts, naming


def in_huggingface(
    architecture: Architecture, config: ModelConfig, tensors: Mapping[str, Placed], dialect: Dialect
) -> Located:
    """Finds each parameter among the tensors of an HF or Meta source. Missing, misshapen and unexpected ones: error."""
    _check_counts(config, tensors)
    expert_counts.check_huggingface(architecture, config, tensors)
    search = _Search(config, tensors, dialect)
    found = {instance.key: search.find(instance) for instance in architecture.instances(config)}
    if config.tie_word_embeddings and architecture.tied_head:
        search.join(dialect.spell(architecture.tied_head), architecture.embedding, found)
    for instance in architecture.instances(config):
        for copy in architecture.copies(instance, config):
            search.join(copy, instance, found)
    unexpected = {
        name: f"the source has a tensor {name} that a {architecture.family} model does not have"
        + (", of a layer that predicts further tokens; --mtp drop leaves those out" if name.startswith("mtp.") else "")
        for name in sorted(tensors)
        if name not in search.used and not is_buffer(name)
    }
    problems = search.problems + naming.grouped(search.wrong)
    problems += naming.mismatch("the source", search.missing, unexpected)
    if problems:
        raise ConversionError(*problems)
    return found


def packed_names(
    architecture: Architecture, config: ModelConfig, tensors: Collection[str], dialect: Dialect
) -> frozenset[str]:  # fmt: skip
    """Which of the architecture's names of all experts in one the source has, by its tensors' names."""
    names = {packed.name for row in architecture.parameters(config) for packed in row.packed}
    layers = range(config.num_layers + config.mtp_num_layers)
    return frozenset(
        name for name in names if any(named(dialect.spell(name), (layer, 0)) in tensors for layer in layers)
    )  # fmt: skip


def _check_counts(config: ModelConfig, tensors: Mapping[str, Placed]) -> None:
    """Before a loop over as many layers and experts as a config may claim."""
    if config.num_layers > len(tensors):
        raise ConversionError(f"the config says {config.num_layers} layers, the source has {len(tensors)} tensors")
    if config.moe is not None:
        most = max(
            (each.copies[0][0].ref.shape[0] for each in tensors.values() if each.copies[0][0].ref.shape), default=0
        )
        if config.moe.num_experts > max(len(tensors), most):
            raise ConversionError(
                f"the config says {config.moe.num_experts} experts, the source has {len(tensors)} tensors"
            )


@dataclass
class _Search:
    """Looks parameters up one by one; collects what is used, missing and wrong."""

    config: ModelConfig
    tensors: Mapping[str, Placed]
    dialect: Dialect
    used: set[str] = field(default_factory=set)
    missing: dict[str, str] = field(default_factory=dict)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def find(self, instance: Instance) -> tuple[Placed, ...]:
        found = []
        for at, shape in enumerate(instance.row.hf_shapes(self.config)):
            name = self._name(instance, instance.row.hf[at])
            packed = instance.row.packed[at] if instance.row.packed else None
            if instance.row.within:
                part = instance.row.within[at]
                stored = self._whole(instance.hf(self.dialect.spell(part.name)), joined_shape(part, shape, self.config))
                tensor = None if stored is None else part_of(stored, part, self.config, name=name)
            elif packed is not None and self._is_packed(name, self._packed(instance, packed), packed):
                tensor = self._slab(instance, packed, shape)
            else:
                tensor = self._whole(name, shape)
            if tensor is not None:
                found.append(tensor)
        return tuple(found)

    def _name(self, instance: Instance, template: str) -> str:
        """What the source has of two names, where files with packed experts have another one."""
        name, other = instance.hf(self.dialect.spell(template)), instance.row.beside_packed
        if other is None or name in self.tensors:
            return name
        beside = instance.hf(self.dialect.spell(other))
        return beside if beside in self.tensors else name

    def _packed(self, instance: Instance, packed: Packed) -> str:
        return instance.hf(self.dialect.spell(packed.name))

    def _whole(self, name: str, shape: tuple[int, ...]) -> Placed | None:
        self.used.add(name)
        tensor = self.tensors.get(name)
        if tensor is None:
            self.missing[name] = _missing(name, shape)
            return None
        if (tensor.rows, tensor.columns) != two_dimensional(shape):
            shown = [tensor.rows, tensor.columns] if len(shape) > 1 else [tensor.rows]
            self.wrong.append((name, f"{name} has shape {shown}, but its config says {list(shape)}"))
            return None
        return tensor

    def _is_packed(self, name: str, whole: str, packed: Packed) -> bool:
        return packed.always or (name not in self.tensors and whole in self.tensors)

    def _slab(self, instance: Instance, packed: Packed, shape: tuple[int, ...]) -> Placed | None:
        """One expert's part of a tensor of all experts, which lies in one piece."""
        if packed.turned and instance.hf(packed.turned) in self.tensors:
            packed = replace(packed, name=packed.turned, transposed=False)
        name, moe = self._packed(instance, packed), self.config.moe
        expected = packed.shape(moe.num_experts if moe is not None else 0, shape)
        if name not in self.tensors:
            self.missing[name] = _missing(name, expected)
            return None
        told = name in self.used  # of another expert
        self.used.add(name)
        if self.tensors[name].deltas and not told:
            self.problems.append(f"an adapter is for {name}, which holds all experts of a layer: it cannot be merged")
        (block,) = self.tensors[name].copies[0]
        if block.ref.shape != expected:
            said = f"{name} has shape {list(block.ref.shape)}, but its config says {list(expected)}"
            self.wrong += [] if told else [(name, said)]
            return None
        return slab(block.ref, instance.expert or 0, packed, shape)

    def join(self, head: str, instance: Instance, found: Located) -> None:
        """A table that is stored a second time, as a tied head may be, is a copy of the first."""
        if head not in self.tensors or not found[instance.key]:
            return
        (placed,), copy = found[instance.key], self.tensors[head]
        self.used.add(head)
        if (copy.rows, copy.dtype) != (placed.rows, placed.dtype):
            self.problems.append(f"{head} and {placed.name} are tied, but differ in shape or dtype")
        if copy.deltas:
            said = f"an adapter is for {head}, which is tied to {placed.name}: no single table is both"
            self.problems.append(said)
        found[instance.key] = (replace(placed, copies=placed.copies + copy.copies),)


def _missing(name: str, shape: tuple[int, ...]) -> str:
    return f"the source has no tensor {name}, which its config asks for with shape {list(shape)}"
