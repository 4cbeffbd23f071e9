"""Hugging Face, Meta, or another Megatron checkpoint -> Megatron."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from weights_conversion import links
from weights_conversion.architectures import FAMILIES
from weights_conversion.config import ModelConfig, Parallelism
from weights_conversion.configs import core_args, manifest, megatron_args
from weights_conversion.engine.job import DIVISIBLE_BY, DTYPES, Job, RunOptions
from weights_conversion.engine.report import Report
from weights_conversion.engine.run import run
from weights_conversion.errors import ConversionError
from weights_conversion.formats import dist_index, dist_writer, megatron, torch_files
from weights_conversion.formats.iterations import TRACKER
from weights_conversion.launch import distributed
from weights_conversion.layouts import dist
from weights_conversion.layouts.placement import main_dtype
from weights_conversion.layouts.plan import Plan
from weights_conversion.layouts.planners import check_parallelism, padded_vocabulary, plan_to_dist, plan_to_megatron
from weights_conversion.layouts.rank_files import Rank, rank_folder
from weights_conversion.mapping.dialects import MEGATRON_CORE, MEGATRON_LLM, Dialect
from weights_conversion.mapping.parameters import is_buffer
from weights_conversion.output import assembly, place, space
from weights_conversion.sources import sums
from weights_conversion.sources.detect import say_found
from weights_conversion.sources.locate import check_floating
from weights_conversion.sources.opening import find_local, open_source
from weights_conversion.tokenizer.carried import carried
from weights_conversion.tokenizer.files import TOKENIZER_FILES
from weights_conversion.verify import proof
from weights_conversion.watch import opened_files, watched

TARGETS: dict[str, Dialect] = {"megatron-llm": MEGATRON_LLM, "megatron-core": MEGATRON_CORE}


@dataclass(frozen=True)
class ImportOptions(RunOptions):
    """hf_to_megatron.py's arguments. `size` None: not given."""

    model: str = "llama2"
    size: str | None = None
    out: Path | None = None
    cache_dir: Path | None = None
    model_path: str | None = None
    revision: str | None = None
    load_iters: int | str | None = None
    parallel: Parallelism = Parallelism()
    layers_per_virtual_stage: int | None = None
    divisible_by: int | None = None
    true_vocab_size: int | None = None
    new_rows: str = "last"
    target: str | None = None  # the family's own
    ckpt_format: str | None = None
    adapter: Path | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


def hf_to_megatron(options: ImportOptions) -> Report:
    """Writes a Megatron checkpoint. Raises ConversionError, before a byte is written, for everything that is wrong."""
    with contextlib.ExitStack() as held:
        headers = None
        if options.dry_run:  # of a repository, no weights are fetched
            headers = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="weights-conversion-headers-")))
        return _hf_to_megatron(options, headers)


@watched
def _hf_to_megatron(options: ImportOptions, headers: Path | None) -> Report:
    architecture = FAMILIES[options.model]
    out = options.out or _default_out(options)
    say_found(find_local(options.model_path, options.model, options.size, options.load_iters))
    with distributed.rank_zero_first("output"):
        replaced = place.check(out, options.overwrite, options.verify)
    dialect = TARGETS[options.target or architecture.target]
    ckpt_format = options.ckpt_format or ("torch_dist" if dialect is MEGATRON_CORE else "torch")
    if ckpt_format == "torch_dist" and dialect is not MEGATRON_CORE:
        raise ConversionError("--ckpt-format torch_dist is Megatron-Core's; add --target megatron-core")
    opened = open_source(
        options.model, options.model_path, dialect, cache=options.cache_dir, size=options.size,
        revision=options.revision, load_iters=options.load_iters, true_vocab_size=options.true_vocab_size,
        fields=options.fields, recheck=options.verify, adapter=options.adapter,
        early=lambda config, dtype: _check_early(options, config, dtype, out, dialect), headers=headers,
    )  # fmt: skip
    config = opened.config
    if options.size is not None:
        _check_size(config, options.size)
    parallel = _with_virtual(options, config)
    if ckpt_format == "torch_dist" and parallel != Parallelism():
        raise ConversionError(
            f"--ckpt-format torch_dist is free of {parallel}: any run can load it; leave the sizes out"
        )
    padded = opened.stored_vocabulary is not None and opened.stored_vocabulary != config.vocab_size
    vocabulary, true_rows = _vocabulary(options, config, parallel, padded and ckpt_format == "torch")
    if problems := check_parallelism(config, parallel, vocabulary, dialect):
        raise ConversionError(*problems)

    sources = opened.sources(architecture)
    check_floating(sources, opened.folder)
    dtype = DTYPES.get(options.dtype)
    written = dtype or main_dtype([placed for group in sources.values() for placed in group])
    divisible_by = options.divisible_by or DIVISIBLE_BY
    report = Report(notes=list(opened.notes), warnings=list(opened.warnings))
    if opened.iteration is not None and (options.checksums or options.verify):
        report.notes += sums.checked(opened.iteration, options.workers)
    at = f"; {opened.repository} at {opened.revision}" if opened.repository and not opened.dialect.megatron else ""
    stored = main_dtype([placed for group in sources.values() for placed in group])
    hollow = headers is not None and opened.folder.is_relative_to(headers)
    report.reads(
        Path(str(opened.repository)) if hollow else opened.folder, f"{options.model}, {opened.what}", stored, at
    )
    report.ignored = [name for name in opened.tensors if is_buffer(name)]
    files, notes = carried(opened.tokenizer)
    report.notes += notes
    names = set(files)
    kept_args = dict(opened.kept_args)
    if dialect is MEGATRON_CORE and names & {"tokenizer.json", "tekken.json"} and "tokenizer.model" not in names:
        kept_args.setdefault("tokenizer_type", "HuggingFaceTokenizer")
    if "tekken.json" in names and not names & {"tokenizer.model", "tokenizer.json"}:
        report.notes.append(
            "tokenizer  tekken.json alone, which transformers reads with the package mistral-common; an export builds "
            "tokenizer.json from it"
        )
    elif not names & {"tokenizer.model", "tokenizer.json"} and not {"vocab_file", "tokenizer_model"} & set(kept_args):
        report.warnings.append(
            f"{opened.folder} holds no tokenizer (tokenizer.model or tokenizer.json), so none is written; training "
            "needs one, and an export asks for it (--vocab_file)"
        )
    if ckpt_format == "torch_dist":
        stacked = config.moe is None or config.moe.everywhere
        plan = plan_to_dist(
            architecture, config, sources, opened.dialect, dialect, vocabulary, dtype, "release", options.new_rows,
            stacked=stacked,
        )  # fmt: skip
        targets, small = dist_targets(plan, config, written, divisible_by, kept_args, stacked=stacked)
        files |= small
    else:
        plan = plan_to_megatron(
            architecture, config, sources, opened.dialect, dialect, parallel, vocabulary, dtype,
            rank_file("release", parallel), options.new_rows,
        )  # fmt: skip
        args = _rank_args(config, parallel, dialect, written, divisible_by, vocabulary) | kept_args
        targets = rank_targets(plan, args, "release" if dialect is MEGATRON_LLM else 0, flat=dialect is MEGATRON_CORE)
    report.training_flags = _training_flags(
        config, dialect, ckpt_format, out, vocabulary, divisible_by, parallel, written
    )
    if dialect is MEGATRON_CORE:
        report.warnings += core_args.training_warnings(config)
    report.training_flags += _tokenizer_flags(names, dialect, out)
    if vocabulary != config.vocab_size:
        report.notes.append(
            f"vocabulary {config.vocab_size} rows of the source, {vocabulary} written (new: {options.new_rows} row)"
        )
    text = manifest.build(
        config, true_vocab_size=true_rows if opened.true_rows_known or options.true_vocab_size else None,
        repository=opened.repository, revision=opened.revision, source_config=opened.raw_config,
        generation_config=opened.generation_config, tokenizer=opened.tokenizer,
        assumed=opened.assumed,
    )  # fmt: skip
    files[manifest.NAME] = text.encode()
    prove = proof(
        opened.folder, options.model, workers=options.workers, allow_inconsistent=options.allow_inconsistent,
        source_iters=opened.load_iters, fields=options.fields,
        true_vocab_size=config.vocab_size if opened.dialect.megatron else None, adapter=options.adapter,
    )  # fmt: skip
    copied = [content for content in files.values() if isinstance(content, Path)]
    place.check_apart(out, [*map(Path, plan.source_files()), opened.folder, *copied])
    report.notes += links.told(opened.folder, [*plan.source_files(), *opened_files()], TOKENIZER_FILES)
    report.replaced(replaced)
    return run(Job(plan, report, targets, out, files, {TRACKER: b"release"}, prove), options)


def _check_early(
    options: ImportOptions, config: ModelConfig, dtype: str | None, out: Path, dialect: Dialect
) -> None:  # fmt: skip
    """What a config.json shows to be impossible, before the weights that it is of are fetched: size, layout, disk."""
    if options.size is not None:
        _check_size(config, options.size)
    parallel = _with_virtual(options, config)
    vocabulary, _ = _vocabulary(options, config, parallel, False)
    if problems := check_parallelism(config, parallel, vocabulary, dialect):
        raise ConversionError(*problems)
    kept = DTYPES.get(options.dtype) or DTYPES.get(dtype or "") or torch.bfloat16
    if distributed.current().rank == 0:
        space.check_space(out, _parameter_count(config) * kept.itemsize)


def _default_out(options: ImportOptions) -> Path:
    """Named after a local folder, or after the model and its size."""
    local = Path(options.model_path).expanduser() if options.model_path else None
    if local is not None and local.is_dir():
        return Path(f"{local.resolve().name or options.model}-megatron")
    return Path(f"{options.model}-{options.size or FAMILIES[options.model].default_size}b-megatron")


def megatron_to_megatron(
    source: Path, out: Path, model: str, parallel: Parallelism = Parallelism(), target: str | None = None,
    **options: Any,
) -> Report:  # fmt: skip
    """Writes the Megatron checkpoint at `source` in another layout or dialect: merged and cut in one pass, no HF files.

    `options` are further fields of ImportOptions.
    """
    return hf_to_megatron(
        ImportOptions(model=model, model_path=str(source), out=out, parallel=parallel, target=target, **options)
    )


def _parameter_count(config: ModelConfig) -> int:
    return sum(prod(each.row.megatron_shape(config)) for each in FAMILIES[config.family].instances(config))


def _billions(size: str) -> float:
    """Of parameters, as a size's name has them: "70", or "8x7" of experts that share the rest."""
    return prod(float(number) for number in size.split("x"))


def _check_size(config: ModelConfig, size: str) -> None:
    """A size in billions is a round name, off by up to a quarter (Llama "1B" has 1.24): the family's nearest."""
    billions = _parameter_count(config) / 1e9
    nearest = min(FAMILIES[config.family].repositories, key=lambda name: abs(_billions(name) / billions - 1))
    if nearest != size or abs(billions - _billions(size)) > _billions(size) / 4:
        raise ConversionError(
            f"--size {size} was given, but this checkpoint's config makes a model of {billions:.3g} billion parameters "
            f"({config.num_layers} layers of hidden size {config.hidden_size}); leave --size out or correct it"
        )


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


def _vocabulary(options: ImportOptions, config: ModelConfig, parallel: Parallelism, padded: bool) -> tuple[int, int]:
    """(rows to write, rows that are true): padded where a layout, a divisor, or a true size was asked for.

    `padded`: the source is a checkpoint that was padded already, as another layout of it then is.
    """
    rows = max(options.true_vocab_size or 0, config.vocab_size)
    if options.true_vocab_size is not None and options.true_vocab_size < config.vocab_size:
        raise ConversionError(
            f"--true-vocab-size {options.true_vocab_size} is less than the {config.vocab_size} rows of the source, "
            "which would be cut off"
        )
    asked = options.divisible_by is not None or options.true_vocab_size is not None
    if parallel.tensor == 1 and not asked and not padded:
        return rows, rows
    return padded_vocabulary(rows, options.divisible_by or DIVISIBLE_BY, parallel.tensor), rows


def _rank_args(
    config: ModelConfig, parallel: Parallelism, dialect: Dialect, dtype: torch.dtype, divisible_by: int, vocabulary: int
) -> dict[str, Any]:
    if dialect is MEGATRON_CORE:
        args = core_args.write_args(
            config, parallel, dtype=dtype, divisible_by=divisible_by, ckpt_format="torch", vocabulary=vocabulary
        )
        sizes = {"expert_model_parallel_size": parallel.expert, "expert_tensor_parallel_size": parallel.experts_tensor}
        return args | (sizes if config.moe is not None else {})
    return megatron_args.write_args(config, parallel, vocabulary=vocabulary, dtype=dtype, divisible_by=divisible_by)


def _training_flags(
    config: ModelConfig, dialect: Dialect, ckpt_format: str, out: Path, vocabulary: int, divisible_by: int,
    parallel: Parallelism, dtype: torch.dtype,
) -> list[str]:  # fmt: skip
    """What training is to be started with, as a shell takes it."""
    load = f"--load {shlex.quote(str(out))}"
    if dialect is not MEGATRON_CORE:
        flags = megatron_args.training_flags(config, vocabulary, divisible_by, parallel.tensor)
        return [f"{load} --use_checkpoint_args", *flags]
    form = f"{load} --ckpt-format {ckpt_format} --use-checkpoint-args --no-load-optim --no-load-rng"
    # Without it a run of other sizes cannot find its rank files, says so in one line, and trains from nothing.
    sizes = ["--use-mp-args-from-checkpoint-args"] if parallel != Parallelism() else []
    return [form, *sizes, *core_args.training_flags(config, dtype)]


def _tokenizer_flags(names: Collection[str], dialect: Dialect, out: Path) -> list[str]:
    """Which tokenizer Megatron-LM is to be given; Megatron-LLM has a flag for a file that the user chooses."""
    if dialect is not MEGATRON_CORE:
        return []
    if "tokenizer.model" in names:
        return [f"--tokenizer-model {shlex.quote(str(out / 'tokenizer.model'))}"]
    if {"tokenizer.json", "tekken.json"} & set(names):
        return [f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {shlex.quote(str(out))}"]
    return []


def dist_targets(
    plan: Plan,
    config: ModelConfig,
    dtype: torch.dtype,
    divisible_by: int,
    kept_args: Mapping[str, Any],
    *,
    stacked: bool = True,
) -> tuple[list[assembly.TargetFile], dict[str, bytes | Path]]:
    """The .distcp files, and the small files around them."""
    targets = [dist_writer.DistFileTarget(file, refs) for file, refs in plan.targets.items()]
    names = dist.extra_states((step.instance for step in plan.steps), config, stacked=stacked)
    states, entries = dist_writer.extra_states(list(names))
    args = core_args.write_args(
        config, Parallelism(), dtype=dtype, divisible_by=divisible_by, ckpt_format="torch_dist", vocabulary=None
    )
    args |= kept_args
    files: dict[str, bytes | Path] = {
        f"release/{dist_writer.EXTRA_STATES}": states,
        f"release/{dist_index.METADATA}": dist_writer.metadata(targets, entries),
    }
    files |= {f"release/{name}": content for name, content in dist_writer.small_files(args, 0).items()}
    return list(targets), files


def rank_file(folder: str, parallel: Parallelism) -> Callable[[Rank], str]:
    """The path of each rank's file below the checkpoint's root."""
    return lambda rank: f"{folder}/{rank_folder(rank, parallel)}/model_optim_rng.pt"


def rank_targets(
    plan: Plan, args: Mapping[str, Any], iteration: int | str, *, flat: bool = False
) -> list[assembly.TargetFile]:
    """One torch file per rank."""
    return [
        torch_files.TorchFileTarget(file, megatron.rank_content(refs, args, iteration, flat=flat), refs)
        for file, refs in plan.targets.items()
    ]
