"""Hugging Face or Meta -> Megatron."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights_conversion import assembly, hf_config, manifest, megatron_args, tokenizer_files
from weights_conversion.architectures import ARCHITECTURES
from weights_conversion.config import ConversionError, ModelConfig, Parallelism
from weights_conversion.convert import DIVISIBLE_BY, DTYPES, Job, RunOptions, main_dtype, run
from weights_conversion.dialects import HF, MEGATRON_LLM, META
from weights_conversion.formats import huggingface, meta, torch_files
from weights_conversion.formats.megatron import TRACKER
from weights_conversion.placement import Placed, rank_folder
from weights_conversion.plan import Plan, Side, check_parallelism, padded_vocabulary, plan_to_megatron, source_hf
from weights_conversion.progress import Report


@dataclass(frozen=True)
class ImportOptions(RunOptions):
    """hf_to_megatron.py's arguments. `size` None: not given."""

    model: str = "llama2"
    size: int | None = None
    out: Path | None = None
    cache_dir: Path | None = None
    model_path: str | None = None
    revision: str | None = None
    parallel: Parallelism = Parallelism()
    layers_per_virtual_stage: int | None = None
    divisible_by: int | None = None
    true_vocab_size: int | None = None
    new_rows: str = "last"


@dataclass(frozen=True)
class Opened:
    """A source that has been opened: headers read, no data."""

    folder: Path
    side: Side
    tensors: Mapping[str, Placed]
    config: ModelConfig
    raw_config: Mapping[str, Any] | None
    generation_config: Mapping[str, Any] | None
    repository: str | None = None
    revision: str | None = None


def hf_to_megatron(options: ImportOptions) -> Report:
    """Writes a Megatron checkpoint. Raises ConversionError, before a byte is written, for everything that is wrong."""
    out = options.out or Path(f"{options.model}-{options.size or 7}b-megatron")
    assembly.check_absent(out, options.overwrite)
    opened = open_source(options)
    config = opened.config
    if options.size is not None:
        hf_config.check_size(config, options.size)
    parallel = _with_virtual(options, config)
    vocabulary, true_rows = _vocabulary(options, config, parallel)
    target = Side(MEGATRON_LLM, megatron=True)
    problems = check_parallelism(config, parallel, vocabulary, target.dialect)
    if problems:
        raise ConversionError(*problems)

    architecture = ARCHITECTURES[options.model]
    sources = source_hf(architecture, config, opened.tensors, opened.side.dialect)
    dtype = DTYPES.get(options.dtype)
    plan = plan_to_megatron(
        architecture, config, sources, opened.side, target, parallel, vocabulary, dtype,
        rank_file("release", parallel), options.new_rows,
    )  # fmt: skip
    divisible_by = options.divisible_by or DIVISIBLE_BY
    written_dtype = dtype or main_dtype([placed for group in sources.values() for placed in group])
    args = megatron_args.write_args(
        config, parallel, vocabulary=vocabulary, dtype=written_dtype, divisible_by=divisible_by
    )
    targets = rank_targets(plan, args, "release")
    report = Report()
    report.training_flags = megatron_args.training_flags(config, vocabulary, divisible_by, parallel.tensor)
    if vocabulary != config.vocab_size:
        report.notes.append(
            f"vocabulary: {config.vocab_size} rows of the source, {vocabulary} written ({options.new_rows} row for the new)"
        )
    tokenizer = tokenizer_files.source_tokenizer_files(opened.folder)
    text = manifest.build(
        config, true_vocab_size=true_rows, repository=opened.repository, revision=opened.revision,
        source_config=opened.raw_config, generation_config=opened.generation_config, tokenizer=tokenizer,
    )  # fmt: skip
    files: dict[str, bytes | Path] = {path.name: path for path in tokenizer}
    files[manifest.NAME] = text.encode()
    return run(Job(plan, report, targets, out, files, {TRACKER: b"release"}), options)


def open_source(options: ImportOptions) -> Opened:
    """Finds and opens the HF folder, hub snapshot, or Meta folder that the arguments name."""
    cache = options.cache_dir
    if cache is not None and options.model_path is None and options.model in ("llama", "llama2"):
        folder = meta.find_meta(cache, options.model, options.size or 7) if cache.is_dir() else None
        if folder is not None:
            return open_meta(options.model, folder)
    if options.model_path is not None and Path(options.model_path).expanduser().is_dir():
        folder = Path(options.model_path).expanduser()
        if not (folder / "config.json").is_file() and meta.find_meta(folder, options.model, options.size or 7):
            return open_meta(options.model, folder)
        return open_hf(options.model, folder)
    from weights_conversion import hub

    repository = options.model_path or hub.default_repository(options.model, options.size or 7)
    if options.model_path is not None and (repository.count("/") != 1 or repository.startswith((".", "/", "~"))):
        raise ConversionError(f"--model-path {repository} is neither a folder here nor the name of a repository")
    snapshot = hub.snapshot(repository, revision=options.revision, cache_dir=cache)
    opened = open_hf(options.model, snapshot.folder)
    return dataclasses.replace(opened, repository=snapshot.repository, revision=snapshot.revision)


def open_hf(model: str, folder: Path) -> Opened:
    raw = huggingface.read_json(folder / "config.json")
    config = hf_config.read_config(model, raw, MEGATRON_LLM)
    generation = folder / "generation_config.json"
    generation_config = huggingface.read_json(generation) if generation.is_file() else None
    return Opened(folder, Side(HF, megatron=False), huggingface.read_hf(folder), config, raw, generation_config)


def open_meta(model: str, folder: Path) -> Opened:
    folder = meta.find_meta(folder, model, 0) or folder
    tensors = meta.read_meta(folder)
    config = hf_config.read_params(model, meta.read_params(folder), tensors)
    return Opened(folder, Side(META, megatron=False), tensors, config, None, None)


def _with_virtual(options: ImportOptions, config: ModelConfig) -> Parallelism:
    parallel, per_stage = options.parallel, options.layers_per_virtual_stage
    if per_stage is None:
        return parallel
    if parallel.pipeline == 1:
        raise ConversionError(
            "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size 2 or more, not 1"
        )
    if config.num_layers % (parallel.pipeline * per_stage):
        raise ConversionError(
            f"{config.num_layers} layers cannot be divided among {parallel.pipeline} pipeline stages with "
            f"--num-layers-per-virtual-pipeline-stage {per_stage}"
        )
    return dataclasses.replace(parallel, virtual=config.num_layers // (parallel.pipeline * per_stage))


def _vocabulary(options: ImportOptions, config: ModelConfig, parallel: Parallelism) -> tuple[int, int]:
    """(rows to write, rows that are true): padded where a layout, a divisor, or a true size was asked for."""
    rows = options.true_vocab_size or config.vocab_size
    if rows < config.vocab_size:
        raise ConversionError(
            f"--true-vocab-size {rows} is less than the {config.vocab_size} rows of the source, which would be cut off"
        )
    if parallel.tensor == 1 and options.divisible_by is None and options.true_vocab_size is None:
        return rows, rows
    return padded_vocabulary(rows, options.divisible_by or DIVISIBLE_BY, parallel.tensor), rows


def rank_file(folder: str, parallel: Parallelism) -> Callable[[int, int], str]:
    """The path of each rank's file below the checkpoint's root."""
    return lambda tp, pp: f"{folder}/{rank_folder(tp, pp, parallel)}/model_optim_rng.pt"


def rank_targets(
    plan: Plan, args: Mapping[str, Any], iteration: int | str, *, flat: bool = False
) -> list[assembly.TargetFile]:
    """One torch file per rank."""
    return [
        torch_files.TorchFileTarget(file, torch_files.rank_content(refs, args, iteration, flat=flat), refs)
        for file, refs in plan.targets.items()
    ]
