"""Opens what a conversion reads: a Hugging Face folder or repository, Meta's files, or a Megatron checkpoint."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from weights_conversion.architectures import FAMILIES
from weights_conversion.config import ModelConfig
from weights_conversion.configs import generation, hf_config, hf_parts, megatron_args, meta_params, moe, secrets
from weights_conversion.errors import ConversionError
from weights_conversion.errors.text import short
from weights_conversion.files import fileio
from weights_conversion.formats import huggingface, meta
from weights_conversion.launch import distributed
from weights_conversion.layouts.placement import Located
from weights_conversion.layouts.vocabulary import Vocabulary
from weights_conversion.mapping.dialects import HF, MEGATRON_CORE, META, Dialect
from weights_conversion.mapping.parameters import Architecture
from weights_conversion.sources import described, further, peft, quantised, scales
from weights_conversion.sources.checkpoint import open_checkpoint
from weights_conversion.sources.detect import Found, Kind, detect
from weights_conversion.sources.locate import locate
from weights_conversion.sources.locate_hf import in_huggingface
from weights_conversion.sources.named_folders import trained_from
from weights_conversion.sources.text_part import text_part
from weights_conversion.tokenizer.files import source_tokenizer_files
from weights_conversion.tokenizer.places import taken_along

_HF_FORM = ("packed_experts", "packed_names", "own_types", "names_outside")  # in a manifest
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A source that has been opened: headers read, no data. `sources` finds and checks every parameter."""

    folder: Path
    dialect: Dialect
    config: ModelConfig
    sources: Callable[[Architecture], Located]
    raw_config: Mapping[str, Any] | None = None
    generation_config: Mapping[str, Any] | None = None
    repository: str | None = None
    revision: str | None = None
    counted: Vocabulary | None = None  # of a Megatron source
    tokenizer: tuple[Path, ...] = ()
    kept_args: Mapping[str, Any] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()  # fields that nothing states, taken from the family
    tensors: tuple[str, ...] = ()  # names of an HF or Meta source
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    load_iters: int | str | None = None  # of a Megatron source: the iteration, where the user or the path named one
    iteration: Path | None = None  # its folder
    what: str = ""  # kind and layout, for the report
    trained_dtype: torch.dtype | None = None  # of a Megatron source whose tensors are of another
    hf_form: Mapping[str, Any] = field(default_factory=dict)  # of the HF source that a Megatron source was made from

    @property
    def vocabulary(self) -> Vocabulary:
        """A Hugging Face or Meta source has no padding: its rows are its tokens."""
        return self.counted or Vocabulary(self.config.vocab_size, self.config.vocab_size)


def open_source(
    model: str, path: str | None, target: Dialect, *, cache: Path | None = None, size: str | None = None,
    revision: str | None = None, load_iters: int | str | None = None, true_vocab_size: int | None = None,
    fields: Mapping[str, Any] | None = None, recheck: bool = False, adapter: Path | None = None,
    early: Callable[[ModelConfig, str | None], None] = lambda config, dtype: None, headers: Path | None = None,
    mtp: str = further.KEEP,
) -> Opened:  # fmt: skip
    """What `path` (a folder or a repository) names, or else `model` and `size`. `target` decides what is refused.

    `fields` are ModelConfig fields that the user states about a Megatron checkpoint. `recheck`: hold what the hub's
    cache has against the hub's sums, also where that was done before. `adapter`: PEFT's, to be merged into the source.
    `early` raises ConversionError for what the model and its dtype (as its config.json states them) cannot become,
    before weights are fetched. `mtp` "drop": without layers that predict further tokens. `headers`, a folder to be
    made: of a repository's weights, fetch the headers alone.
    """
    here = find_local(path, model, size, load_iters)
    if here is not None:
        if here.kind is Kind.MEGATRON:
            opened = open_megatron(model, here.root, target, here.iteration, true_vocab_size, fields, mtp)
        else:
            hf = here.kind is Kind.HUGGINGFACE
            opened = open_hf(model, here.root, target, adapter, mtp) if hf else open_meta(model, here.root)
        return dataclasses.replace(opened, notes=(*here.notes, *opened.notes))
    if path is None and cache is not None and (found := _meta_in_cache(model, cache, size)) is not None:
        return open_meta(model, found)
    from weights_conversion.hub import repositories as hub

    repository = path or FAMILIES[model].repositories[size or FAMILIES[model].default_size]

    def accept(folder: Path) -> None:
        """The family, and what the target cannot express, before the weights are fetched."""
        raw = fileio.read_json(folder / "config.json")
        config = hf_config.read_config(model, raw, target, str(folder / "config.json"))
        dtype = raw.get("dtype") or raw.get("torch_dtype")
        early(config, dtype if isinstance(dtype, str) else None)

    with distributed.rank_zero_first("hub"):
        settings: dict[str, Any] = {"recheck": True} if recheck and distributed.current().rank == 0 else {}
        settings |= {"headers": headers / repository} if headers is not None else {}
        snapshot = hub.snapshot(repository, revision=revision, cache_dir=cache, accept=accept, **settings)
    opened = open_hf(model, snapshot.folder, target, adapter, mtp, hollow=headers is not None)
    notes = (*opened.notes, *([snapshot.note] if getattr(snapshot, "note", "") else []))
    return dataclasses.replace(opened, repository=snapshot.repository, revision=snapshot.revision, notes=notes)


def _meta_in_cache(model: str, cache: Path, size: str | None) -> Path | None:
    """Meta's files below --cache-dir, as the original script takes them; None: it is the hub's cache."""
    if not fileio.is_folder(cache) or not FAMILIES[model].meta_in_cache_dir:
        return None
    folder = meta.find_meta(cache, _meta_names(model, size))
    if folder is None and any(cache.iterdir()) and not any(cache.glob("models--*")):
        logger.warning(
            "--cache-dir %s holds no consolidated.00.pth, nor a folder (%s) that does; so it is the hub's "
            "cache, into which the model is fetched",
            cache, ", ".join(_meta_names(model, size)),
        )  # fmt: skip
    return folder


def adapter_folder(adapter: Path | None, cache: Path | None, recheck: bool) -> Path | None:
    """--adapter, brought into the hub's cache where it names a repository."""
    if adapter is None or fileio.exists(adapter):
        return adapter
    if str(adapter).count("/") != 1 or str(adapter).startswith((".", "/", "~")):
        raise ConversionError(f"--adapter {adapter} is neither a folder here nor the name of a repository")
    from weights_conversion.hub import adapters

    with distributed.rank_zero_first("adapter"):
        return adapters.snapshot(str(adapter), cache_dir=cache, recheck=recheck).folder


def check_named(
    path: str | None, here: Found | None, *, revision: str | None, fields: Mapping[str, Any], adapter: Path | None
) -> None:
    """Refuses options that say nothing of `here`, which `path` is (None: not here), with all of them that do not."""
    problems = []
    if fields and (here is None or here.kind is not Kind.MEGATRON):
        names = ", ".join(f"--{megatron_args.NAMES[name]}" for name in fields)
        problems.append(f"{names} is for Megatron sources; a Hugging Face or Meta source has a config of its own")
    if adapter is not None and here is not None and here.kind is not Kind.HUGGINGFACE:
        problems.append(
            f"--adapter {adapter} is for a Hugging Face model, but {here.root} is a folder of {here.kind.value}; "
            "export that first (megatron_to_hf.py merges Megatron's own adapters)"
        )
    if revision is not None and here is not None:
        problems.append(f"--revision {revision} is for repositories, but {path} is a local folder")
    if path is not None and here is None and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        problems.append(f"--model-path {path} is neither a folder here nor the name of a repository")
    if problems:
        raise ConversionError(*problems)


def find_local(
    path: str | None, model: str, size: str | None = None, load_iters: int | str | None = None
) -> Found | None:
    """What a local path is (of Meta's folders in one, `size` says which is meant); None: it is none here."""
    local = Path(path).expanduser() if path is not None else None
    return _found(local, model, size, load_iters) if local is not None and fileio.exists(local) else None


def _meta_names(model: str, size: str | None) -> list[str]:
    """What Meta calls the folder of a download."""
    family = FAMILIES[model]
    return [name.format(size or family.default_size) for name in family.meta_folders]


def _found(path: Path, model: str, size: str | None, load_iters: int | str | None) -> Found:
    consolidated = meta.find_meta(path, _meta_names(model, size))
    found = detect(path, load_iters) if consolidated in (None, path) else detect(consolidated)
    if load_iters is not None and found.kind is not Kind.MEGATRON:
        raise ConversionError(
            f"--load_iters {load_iters} is for Megatron checkpoints, but {found.root} is a folder of {found.kind.value}"
        )
    return found


def open_hf(
    model: str, folder: Path, target: Dialect, adapter: Path | None = None, mtp: str = further.KEEP,
    hollow: bool = False,
) -> Opened:  # fmt: skip
    """`hollow`: weights may be headers without data."""
    raw = fileio.read_json(folder / "config.json")
    config = hf_config.read_config(model, raw, target, str(folder / "config.json"))
    generation_config = generation.read(folder)
    tensors, left = huggingface.read_hf(folder), []
    if mtp == further.DROP:
        config, tensors, note = further.without(config, tensors)
        left.append(note)
    read = quantised.dequantised(tensors, raw, str(folder / "config.json"))
    tensors = read.tensors
    if not hollow:
        scales.check(tensors)
    merged = [] if adapter is None else [f"adapter    {adapter}, merged in float32, rounded once"]
    if adapter is not None:
        tensors = peft.merged(tensors, peft.open_adapter(adapter))
    part = text_part(model, tensors)
    tensors, dialect = part.tensors, part.dialect
    config, corrected = hf_parts.with_further_layers(hf_config.class_of(model), config, tensors)
    unread = hf_config.unread(model, raw)
    shown = ", ".join(map(short, unread[:10])) + (f" and {len(unread) - 10} more" if len(unread) > 10 else "")
    notes = [f"keys of config.json that are not known here are kept as they are: {shown}"] if unread else []
    raw, dropped = secrets.without_secrets(raw)
    notes += [secrets.note(dropped, str(folder / "config.json"))] if dropped else []
    if generation_config is not None:
        generation_config, dropped = secrets.without_secrets(generation_config)
        notes += [secrets.note(dropped, str(folder / generation.NAME))] if dropped else []
    return Opened(
        folder, dialect, config, lambda architecture: in_huggingface(architecture, config, tensors, dialect),
        raw, generation_config, tokenizer=source_tokenizer_files(folder), tensors=tuple(tensors),
        notes=(*left, *read.notes, *merged, *corrected, *part.notes, *notes),
        what=described.of_files(HF.name, tensors.values()),
    )  # fmt: skip


def open_meta(model: str, folder: Path) -> Opened:
    tensors = meta.read_meta(folder)
    config = meta_params.read_params(model, meta.read_params(folder), tensors, str(folder / "params.json"))
    return Opened(
        folder, META, config, lambda architecture: in_huggingface(architecture, config, tensors, META),
        tokenizer=source_tokenizer_files(folder), tensors=tuple(tensors),
        what=described.of_files(META.name, tensors.values()),
    )  # fmt: skip


def open_megatron(
    model: str, root: Path, target: Dialect, load_iters: int | str | None = None, true_vocab_size: int | None = None,
    fields: Mapping[str, Any] | None = None, mtp: str = further.KEEP,
) -> Opened:  # fmt: skip
    """A Megatron checkpoint as the source of another; its manifest, tokenizer and training args go along."""
    opened = open_checkpoint(
        root, model, load_iters=load_iters, true_vocab_size=true_vocab_size, may_grow=True, flags=fields, mtp=mtp
    )
    root = opened.root
    if FAMILIES[model].parallel_attention and not target.parallel_attention:
        raise ConversionError(f"{target.name} cannot express {model}: it has no attention in parallel with the MLP")
    if opened.config.rope_scaling and opened.config.rope_scaling.kind not in target.ropes:
        raise ConversionError(
            f"{root} has rope scaling of kind {opened.config.rope_scaling.kind}, which {target.name} cannot express"
        )
    if lacking := hf_config.lacking(model, target):
        raise ConversionError(f"{target.name} cannot express {model}: it has no {', '.join(lacking)}")
    if not FAMILIES[model].ties_in_megatron_llm and not target.ties_heads and opened.config.tie_word_embeddings:
        raise ConversionError(f"{root} has a head tied to the embedding, which {target.name} cannot express")
    said = opened.manifest or {}
    args = opened.files.args
    reset = megatron_args.was_reset(args)
    tokenizer, kept, said_of_it = taken_along(
        model, root, opened.files.folder, {} if reset else args, trained_from(args), target is MEGATRON_CORE
    )
    if opened.files.dialect is target and not reset and "seq_length" in args:
        kept["seq_length"] = args["seq_length"]
    if opened.files.dialect is target and opened.config.moe is not None and moe.ROUTER_DTYPE in args:
        kept[moe.ROUTER_DTYPE] = moe.router_dtype(args)
    assumed = tuple(sorted(name for name, origin in opened.origins.items() if reset and origin == "family"))
    return Opened(
        root, opened.files.dialect, opened.config,
        lambda architecture: locate(opened.files, architecture, opened.config), said.get("config"),
        said.get("generation_config"), said.get("repository"), said.get("revision"), opened.vocabulary, tokenizer, kept,
        assumed, notes=opened.notes,
        warnings=(*opened.warnings, *said_of_it),
        hf_form={name: said[name] for name in _HF_FORM if name in said},
        load_iters=opened.load_iters, iteration=opened.files.folder, trained_dtype=opened.files.trained_dtype,
        what=described.of_megatron(root, opened.files),
    )  # fmt: skip
