"""The two sides of a comparison: the kind of each checkpoint, the model that it says it holds, and its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from weights_conversion.architectures import FAMILIES
from weights_conversion.config import PARTS, ModelConfig, RopeScaling
from weights_conversion.configs import (
    core_args,
    features,
    hf_config,
    hf_outer,
    hf_parts,
    manifest,
    megatron_args,
    meta_params,
    parts,
    rope,
    rope_core,
)
from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.formats import huggingface, meta
from weights_conversion.formats.iterations import MODEL_FILES
from weights_conversion.layouts.placement import Delta, Key, Placed, main_dtype
from weights_conversion.mapping.dialects import MEGATRON_CORE, MEGATRON_LLM, META, Dialect
from weights_conversion.mapping.parameters import Instance
from weights_conversion.sources import further, peft, quantised
from weights_conversion.sources.checkpoint import claimed_families, open_checkpoint, open_files
from weights_conversion.sources.detect import Kind, detect
from weights_conversion.sources.families import decide_family, read_features
from weights_conversion.sources.locate_hf import in_huggingface
from weights_conversion.sources.megatron_adapters import locate_merged
from weights_conversion.sources.named_folders import trained_from
from weights_conversion.sources.text_part import text_part
from weights_conversion.verification import dequantised

# Fields that decide the shapes: models that differ here have no tensors in common.
SHAPE_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "num_layernorms",
    *("mla", "gated_delta", "mtp_num_layers", "hybrid_layer_pattern", "mamba"),
    *features.SWITCHES,
)
NUMBER_FIELDS = (
    "layernorm_epsilon",
    "rope_theta",
    "rope_scaling_factor",
    "rope_scaling",
    "sliding_window",
    "window_layers",
    "tie_word_embeddings",
    "max_position_embeddings",
    *("rotary_percent", "local_rope_theta", "query_pre_attn_scalar"),
    "moe",
)


def same_shapes(one: ModelConfig, two: ModelConfig) -> bool:
    """Whether tensors can be compared: of experts, router values may differ."""
    if any(getattr(one, name) != getattr(two, name) for name in SHAPE_FIELDS):
        return False
    return one.moe == two.moe or parts.is_silent(one.moe, two.moe)


def shown(value: object, other: object = None) -> str:
    """A config's value in a sentence; one that has parts as "kind llama3, factor 8.0, ...", or as it differs from
    `other`."""
    if parts.differing(value, other):
        return parts.shown("", value, other)
    if isinstance(value, (RopeScaling, *PARTS.values())):
        return ", ".join(f"{name} {part}" for name, part in vars(value).items() if part is not None)
    return str(value)


@dataclass(frozen=True)
class Model:
    """One side. `assumed`: fields of `config` that the files do not state; `contradicted`: what they state twice."""

    path: Path
    dialect: Dialect
    config: ModelConfig
    placed: Mapping[Key, tuple[Placed, ...]] = field(repr=False)
    layout: str
    stored_vocabulary: int
    vocabulary_known: bool = True
    release: bool = False  # written by a conversion, not by training
    files: Any = field(default=None, repr=False)  # of a Megatron checkpoint, as to_hf opens it
    assumed: frozenset[str] = frozenset()
    contradicted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    weights: str = "model"  # or "master": the optimizer's float32 ones
    added: Mapping[str, tuple[Delta, ...]] = field(default_factory=dict, repr=False)  # by PEFT's adapter, to which name

    @property
    def kind(self) -> str:
        return self.dialect.name

    @property
    def dtype(self) -> torch.dtype:
        return main_dtype([placed for group in self.placed.values() for placed in group])

    def tensors(self, instance: Instance) -> tuple[Placed, ...]:
        """The placed tensors of a parameter; a tied head is the embedding."""
        if instance.key in self.placed:
            return self.placed[instance.key]
        return self.placed[FAMILIES[self.config.family].embedding.key]

    def file_name(self, file: str) -> str:
        """Short: below the checkpoint's folder, and a rank's folder instead of its only file."""
        path = Path(file)
        path = path.parent if path.name in MODEL_FILES else path
        return str(path.relative_to(self.path)) if path.is_relative_to(self.path) else file


def family_of(path: Path, load_iters: int | str | None) -> tuple[str | None, str | None]:
    """(the family that a checkpoint states, or None; the one that its numbers suggest, should nothing state it)."""
    here = detect(path, load_iters)
    path, load_iters = here.root, here.iteration
    if here.kind is Kind.HUGGINGFACE:
        raw = fileio.read_json(path / "config.json")
        kind = hf_outer.model_type(raw)
        known = [name for name, family in FAMILIES.items() if kind in family.model_types]
        if len(known) == 1:
            return known[0], known[0]
        if not known:
            raise ConversionError(f"{path / 'config.json'} says model_type {kind!r}, which none of the families has")
        if rope.read_scaling(raw, str(path / "config.json")) is not None:
            return None, "llama3"
        return None, _llama(hf_config.read_rope(raw, str(path / "config.json"))[0], raw.get("rms_norm_eps"))
    if here.kind is Kind.META:
        raw = meta.read_params(path)
        return None, _llama(raw.get("rope_theta"), raw.get("norm_eps"))
    files = open_files(path, load_iters)
    found = manifest.find([path, *trained_from(files.args)])
    claims = claimed_families(files.args, found[1] if found else None)
    family = next((family for family in claims.values() if family in FAMILIES), None)
    if family:
        return family, family
    candidates = decide_family({}, read_features(files.args, files.names, files.vocabulary))
    if candidates and set(candidates).isdisjoint(_LLAMAS):  # its tensors or its window say so
        return candidates[0] if len(candidates) == 1 else None, candidates[0]
    return None, _llama(files.args.get("rope_theta"), files.args.get("layernorm_epsilon"))


_LLAMAS, _USUAL = ("codellama", "llama", "llama2"), "llama2"  # the last where no number says more


def _llama(theta: object, eps: object) -> str:
    """Which of Llama's families the numbers are of; the families differ in their defaults alone."""
    return "codellama" if theta == 1e6 else "llama" if eps == 1e-6 else _USUAL


def choose_family(
    source: Path, checkpoint: Path, source_iters: int | str | None, checkpoint_iters: int | str | None
) -> str:
    """What the two sides state."""
    (one, first), (two, second) = family_of(source, source_iters), family_of(checkpoint, checkpoint_iters)
    if one and two and one != two:
        raise ConversionError(f"{source} holds a {one} model and {checkpoint} a {two} model; --model decides")
    guess = second if first == _USUAL else first
    return one or two or guess or _USUAL


def open_model(
    path: Path, family: str, load_iters: int | str | None = None, *, fields: Mapping[str, Any] | None = None,
    true_vocab_size: int | None = None, weights: str = "model", adapter: Path | None = None,
    adapter_alpha: float | None = None, mtp: str = further.KEEP,
) -> Model:  # fmt: skip
    """Opens one side: headers, configs and args are read and checked, no data.

    `fields` and `true_vocab_size` are what the user has stated about a Megatron side, over what its files say;
    `weights` is "master" for its optimizer's weights, `adapter` is one that is merged (PEFT's or Megatron's).
    `mtp` "drop": without layers that predict further tokens.
    """
    model = _open(path, family, load_iters, fields, true_vocab_size, weights, adapter, adapter_alpha, mtp)
    integers = [placed for group in model.placed.values() for placed in group if not placed.dtype.is_floating_point]
    if integers:
        raise ConversionError(
            f"{integers[0].name} in {path} is stored as {integers[0].dtype}, where a floating-point type was expected"
        )
    return model


def _open(
    path: Path, family: str, load_iters: int | str | None, fields: Mapping[str, Any] | None,
    true_vocab_size: int | None, weights: str, adapter: Path | None,
    adapter_alpha: float | None, mtp: str,
) -> Model:  # fmt: skip
    here = detect(path, load_iters)
    path, load_iters = here.root, here.iteration
    if here.kind is Kind.HUGGINGFACE:
        raw = fileio.read_json(path / "config.json")
        # The dialect that can express most, since nothing is to be written.
        dialect = MEGATRON_LLM if FAMILIES[family].parallel_attention else MEGATRON_CORE
        config = hf_config.read_config(family, raw, dialect, str(path / "config.json"))
        stored, left = huggingface.read_hf(path), []
        if mtp == further.DROP:
            config, stored, note = further.without(config, stored)
            left.append(note)
        read = quantised.dequantised(stored, raw, str(path / "config.json"))
        tensors = dequantised.again(stored, read.tensors, raw)
        if adapter is not None:
            tensors = peft.merged(tensors, peft.open_adapter(adapter))
        part = text_part(family, tensors)
        config, _ = hf_parts.with_further_layers(hf_config.class_of(family), config, part.tensors)
        # An absent key is stated: transformers has a default.
        return _apart(path, part.dialect, config, part.tensors, frozenset(), (*left, *read.notes))
    if here.kind is Kind.META:
        tensors, raw = meta.read_meta(path), meta.read_params(path)
        assumed = {"max_position_embeddings", *(() if raw.get("rope_theta") else ("rope_theta",))}
        config = meta_params.read_params(family, raw, tensors, str(path / "params.json"))
        return _apart(path, META, config, tensors, frozenset(assumed))
    return _open_megatron(path, family, load_iters, fields or {}, true_vocab_size, weights, adapter, adapter_alpha, mtp)


def _apart(
    path: Path, dialect: Dialect, config: ModelConfig, tensors: Mapping[str, Placed], assumed: frozenset[str],
    notes: tuple[str, ...] = (),
) -> Model:  # fmt: skip
    placed = in_huggingface(FAMILIES[config.family], config, tensors, dialect)
    blocks = (block for group in placed.values() for one in group for copy in one.copies for block in copy)
    files = len({ref.file for block in blocks for ref in block.ref.stored})
    layout = f"{files} file{'s' if files > 1 else ''}"
    added = {name: tensor.deltas for name, tensor in tensors.items() if tensor.deltas}
    return Model(path, dialect, config, placed, layout, config.vocab_size, assumed=assumed, notes=notes, added=added)


def _open_megatron(
    path: Path, family: str, load_iters: int | str | None, fields: Mapping[str, Any], true_vocab_size: int | None,
    weights: str, adapter: Path | None, adapter_alpha: float | None, mtp: str,
) -> Model:  # fmt: skip
    opened = open_checkpoint(
        path, family, load_iters=load_iters, flags=fields, true_vocab_size=true_vocab_size,
        compared=True, weights=weights, mtp=mtp,
    )  # fmt: skip
    files, config = opened.files, opened.config
    placed, _, _ = locate_merged(files, FAMILIES[family], config, adapter, adapter_alpha)
    assumed = {name for name, origin in opened.origins.items() if origin == "family"}
    if "rope_scaling_factor" not in fields and core_args.unused_factor(files.args, files.iteration, files.folder):
        assumed.add("rope_scaling_factor")  # only who has trained it knows
    # What training was told later may differ from what was imported; in a conversion's own output it must not.
    said = manifest.model_fields(opened.manifest) if opened.manifest and files.iteration == "release" else {}
    contradicted = []
    if not megatron_args.was_reset(files.args):
        stated = megatron_args.from_args(family, files.args)
        contradicted += [
            f"{name} is {said[name]} in its manifest and {stated[name]} in its args"
            for name in (*megatron_args.SILENT, "moe")
            if name in stated
            and name in said
            and name not in fields
            and not _agree(stated[name], said[name], latent=config.mla is not None)
        ]
    ties = files.args.get("tie_embed_logits")
    if FAMILIES[family].ties_in_megatron_llm and ties not in (None, config.tie_word_embeddings):
        stored = "stored" if files.has_head() else "not stored"
        contradicted.append(f"its head is {stored}, but its args say tie_embed_logits {ties}")
    return Model(
        path, files.dialect, config, placed, files.layout, files.vocabulary,
        vocabulary_known=opened.vocabulary.known, release=files.iteration == "release", files=files,
        assumed=frozenset(assumed), contradicted=tuple(contradicted), notes=opened.warnings,
        weights=weights,
    )  # fmt: skip


def _agree(stated: object, said: object, *, latent: bool) -> bool:
    """Args say it, as far as they can: not Llama 3's constants, nor the last digit of yarn's factor."""
    if isinstance(stated, RopeScaling) and isinstance(said, RopeScaling):
        return rope_core.completed(stated, said, latent=latent) == said
    return stated == said


def common_vocabulary(source: Model, checkpoint: Model) -> tuple[Model, Model]:
    """A side whose files do not record how many rows are tokens has as many as the other side, where it stores them."""

    def told(model: Model, other: Model) -> Model:
        rows = other.config.vocab_size
        if model.vocabulary_known or rows > model.stored_vocabulary:
            return model
        return replace(model, config=replace(model.config, vocab_size=rows))

    return told(source, checkpoint), told(checkpoint, source)


def adopt_assumed(model: Model, other: Model) -> Model:
    """Values that `model`'s files do not state become the other side's, where that one knows them."""
    names = model.assumed - other.assumed
    return replace(model, config=replace(model.config, **{name: getattr(other.config, name) for name in names}))
