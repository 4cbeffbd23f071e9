"""Opens what a conversion reads: a Hugging Face folder or repository, Meta's files, or a Megatron checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weights_conversion import distributed, hf_config, megatron_args
from weights_conversion.checkpoint import open_checkpoint
from weights_conversion.config import ConversionError, ModelConfig
from weights_conversion.dialects import HF, MEGATRON_CORE, META, Dialect
from weights_conversion.formats import huggingface, meta
from weights_conversion.formats.megatron import TRACKER
from weights_conversion.mapping import Architecture
from weights_conversion.placement import Placed
from weights_conversion.plan import Side, source_hf
from weights_conversion.tokenizer.files import source_tokenizer_files

# What training decided, which a new layout of the same checkpoint keeps.
_KEPT_ARGS = ("seq_length", "new_tokens", "vocab_extra_ids", "vocab_extra_ids_list")


@dataclass(frozen=True)
class Opened:
    """A source that has been opened: headers read, no data. `sources` finds and checks every parameter."""

    folder: Path
    side: Side
    config: ModelConfig
    sources: Callable[[Architecture], dict[tuple[str, int | None], tuple[Placed, ...]]]
    raw_config: Mapping[str, Any] | None = None
    generation_config: Mapping[str, Any] | None = None
    repository: str | None = None
    revision: str | None = None
    true_rows_known: bool = True
    kept_args: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> tuple[Path, ...]:
        return source_tokenizer_files(self.folder)


def open_source(
    model: str, path: str | None, target: Dialect, *, cache: Path | None = None, size: int | None = None,
    revision: str | None = None, load_iters: int | None = None, true_vocab_size: int | None = None,
) -> Opened:  # fmt: skip
    """What `path` (a folder or a repository) names, or else `model` and `size`. `target` decides what is refused."""
    if path is None and cache is not None and cache.is_dir() and model in ("llama", "llama2"):
        folder = meta.find_meta(cache, model, size or 7)
        if folder is not None:
            return open_meta(model, folder)
    if path is not None and Path(path).expanduser().is_dir():
        folder = Path(path).expanduser()
        if (folder / TRACKER).is_file() or load_iters is not None:
            return open_megatron(model, folder, target, load_iters, true_vocab_size)
        consolidated = meta.find_meta(folder, model, size or 7)
        if consolidated is not None and not (folder / "config.json").is_file():
            return open_meta(model, consolidated)
        return open_hf(model, folder, target)
    from weights_conversion import hub

    repository = path or hub.default_repository(model, size or 7)
    if path is not None and (repository.count("/") != 1 or repository.startswith((".", "/", "~"))):
        raise ConversionError(f"--model-path {repository} is neither a folder here nor the name of a repository")
    with distributed.rank_zero_first("hub"):
        snapshot = hub.snapshot(repository, revision=revision, cache_dir=cache)
    opened = open_hf(model, snapshot.folder, target)
    return dataclasses.replace(opened, repository=snapshot.repository, revision=snapshot.revision)


def open_hf(model: str, folder: Path, target: Dialect) -> Opened:
    raw = huggingface.read_json(folder / "config.json")
    config = hf_config.read_config(model, raw, target)
    generation = folder / "generation_config.json"
    generation_config = huggingface.read_json(generation) if generation.is_file() else None
    tensors = huggingface.read_hf(folder)
    return Opened(
        folder, Side(HF, megatron=False), config, lambda architecture: source_hf(architecture, config, tensors, HF),
        raw, generation_config,
    )  # fmt: skip


def open_meta(model: str, folder: Path) -> Opened:
    tensors = meta.read_meta(folder)
    config = hf_config.read_params(model, meta.read_params(folder), tensors)
    return Opened(
        folder, Side(META, megatron=False), config, lambda architecture: source_hf(architecture, config, tensors, META)
    )


def open_megatron(
    model: str, root: Path, target: Dialect, load_iters: int | None = None, true_vocab_size: int | None = None
) -> Opened:
    """A Megatron checkpoint as the source of another; its manifest, tokenizer and training args go along."""
    opened = open_checkpoint(root, model, load_iters=load_iters)
    if target is MEGATRON_CORE and model == "falcon":
        raise ConversionError("Megatron-Core cannot express falcon: it has no attention in parallel with the MLP")
    if target is not MEGATRON_CORE and opened.config.tie_word_embeddings and model != "falcon":
        raise ConversionError(f"{root} has a head tied to the embedding, which {target.name} cannot express")
    config, known = opened.config, opened.true_rows_known
    stored = true_vocab_size is not None and true_vocab_size <= opened.files.vocabulary
    if true_vocab_size is not None and stored and (not known or true_vocab_size > config.vocab_size):
        # the user knows which of the stored rows are tokens
        config, known = dataclasses.replace(config, vocab_size=true_vocab_size), True
    said = opened.manifest or {}
    reset = megatron_args.was_reset(opened.files.args)
    same = opened.files.dialect is target and not reset
    kept = {name: opened.files.args[name] for name in _KEPT_ARGS if same and name in opened.files.args}
    return Opened(
        root, Side(opened.files.dialect, megatron=True), config,
        lambda architecture: opened.files.sources(architecture, config), said.get("config"),
        said.get("generation_config"), said.get("repository"), said.get("revision"), known, kept,
        opened.notes, opened.warnings,
    )  # fmt: skip
