"""Hugging Face, Meta, or another Megatron checkpoint -> Megatron."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from weights_conversion.architectures import FAMILIES, latent
from weights_conversion.config import ModelConfig, Parallelism
from weights_conversion.configs import core_args, manifest, model_size, moe_layers, training_lines
from weights_conversion.configs.training_lines import Shape
from weights_conversion.engine.job import DTYPES, Job, RunOptions
from weights_conversion.engine.report import Report
from weights_conversion.engine.run import run
from weights_conversion.errors import ConversionError, Problems
from weights_conversion.files import links
from weights_conversion.files.collector import without_collector
from weights_conversion.files.watch import opened_files, watched
from weights_conversion.formats import hybrid
from weights_conversion.formats.core_forms import Form, checked, staged, stated, training
from weights_conversion.formats.iterations import TRACKER
from weights_conversion.formats.targets import dist_targets, rank_file, rank_targets
from weights_conversion.launch import distributed
from weights_conversion.layouts.parallel import check_parallelism
from weights_conversion.layouts.placement import Located, main_dtype
from weights_conversion.layouts.plan import Plan
from weights_conversion.layouts.planners import plan_to_dist, plan_to_megatron
from weights_conversion.layouts.vocabulary import DIVISIBLE_BY, Vocabulary, to_write
from weights_conversion.mapping.dialects import MEGATRON_CORE, MEGATRON_CORE_EACH, MEGATRON_LLM, Dialect
from weights_conversion.mapping.parameters import is_buffer
from weights_conversion.output import place, space
from weights_conversion.output.assembly import TargetFile
from weights_conversion.sources import sums
from weights_conversion.sources.detect import say_found
from weights_conversion.sources.locate import check_floating
from weights_conversion.sources.locate_hf import packs_experts
from weights_conversion.sources.opening import Opened, adapter_folder, check_named, find_local, open_source
from weights_conversion.tokenizer.carried import carried, told
from weights_conversion.tokenizer.files import TOKENIZER_FILES
from weights_conversion.verify import proof

TARGETS: dict[str, Dialect] = {
    "megatron-llm": MEGATRON_LLM, "megatron-core": MEGATRON_CORE, "megatron-bridge": MEGATRON_CORE,
}  # fmt: skip


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
    moe_grouped_gemm: bool = False
    moe_layer_freq: str | None = None
    mla_down_proj_fusion: bool = False
    adapter: Path | None = None
    core_release: str = "auto"
    hybrid_layer_pattern: str | None = None
    spec: tuple[str, ...] | None = None  # Megatron-LM's flag beside the pattern
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Wanted:
    """What is asked for, once arguments and OUT are known to be right."""

    out: Path
    dialect: Dialect
    ckpt_format: str
    replaced: tuple[str, ...]  # files of an earlier output
    form: Form  # of a torch_dist output
    headers: Path | None = None  # where a dry run puts the headers of a repository's weights


def hf_to_megatron(options: ImportOptions) -> Report:
    """Writes a Megatron checkpoint. Raises ConversionError, before a byte is written, for everything that is wrong.

    Problems are raised together at the end of three stages: arguments and OUT; the source; plan and machine (run).
    """
    with contextlib.ExitStack() as held:
        headers = None
        if options.dry_run:  # of a repository, no weights are fetched
            headers = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="weights-conversion-headers-")))
        return _hf_to_megatron(options, headers)


@watched
def _hf_to_megatron(options: ImportOptions, headers: Path | None) -> Report:
    wanted = replace(_check_arguments(options), headers=headers)
    options = replace(options, adapter=adapter_folder(options.adapter, options.cache_dir, options.verify))
    opened, located, notes = _open(options, wanted)
    job = _plan(options, wanted, opened, located, notes)
    read = [*job.plan.source_files(), *opened_files()]
    job.report.notes += links.told(opened.folder, read, TOKENIZER_FILES)
    job.report.replaced(list(wanted.replaced))
    return run(job, options)


def _check_arguments(options: ImportOptions) -> _Wanted:
    problems, out = Problems(), options.out or _default_out(options)
    here = problems.of(find_local, options.model_path, options.model, options.size, options.load_iters)
    say_found(here)
    if not problems:
        problems.of(
            check_named, options.model_path, here, revision=options.revision, fields=options.fields,
            adapter=options.adapter,
        )  # fmt: skip
    with distributed.rank_zero_first("output"):
        replaced = problems.of(place.check, out, options.overwrite, options.verify)
    dialect = TARGETS[options.target or FAMILIES[options.model].target]
    ckpt_format = options.ckpt_format or ("torch_dist" if dialect is MEGATRON_CORE else "torch")
    problems.of(_check_format, options, dialect, ckpt_format)
    form = problems.of(_form, options, dialect, ckpt_format) or Form()
    problems.raise_all()
    return _Wanted(out, dialect, ckpt_format, tuple(replaced or ()), form)


def _form(options: ImportOptions, dialect: Dialect, ckpt_format: str) -> Form:
    """The form of the output. Raises ConversionError where another format is written in it."""
    if options.spec is not None and list(options.spec) != hybrid.SPEC:
        raise ConversionError(f"--spec {' '.join(options.spec)} is not known; {' '.join(hybrid.SPEC)} was expected")
    form = Form(options.core_release, options.target == "megatron-bridge", options.hybrid_layer_pattern)
    allowed = Form(pattern=form.pattern if dialect is MEGATRON_CORE else None)
    if ckpt_format == "torch_dist" or form == allowed:
        return form
    asked = {
        "--target megatron-bridge": form.bridge,
        f"--core-release {form.release}": form.release != "auto",
        "--hybrid-layer-pattern": form.pattern is not None and dialect is not MEGATRON_CORE,
    }
    names = ", ".join(name for name, there in asked.items() if there)
    raise ConversionError(
        f"{names} is for --ckpt-format torch_dist, which is Megatron-Core's; {dialect.name} is written here in "
        f"{ckpt_format}"
    )


def _check_format(options: ImportOptions, dialect: Dialect, ckpt_format: str) -> None:
    parallel, problems = options.parallel, []
    if ckpt_format == "torch_dist" and dialect is not MEGATRON_CORE:
        problems.append("--ckpt-format torch_dist is Megatron-Core's; add --target megatron-core")
    if options.layers_per_virtual_stage is not None and parallel.pipeline == 1:
        problems.append("--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size 2 or more, not 1")
    elif ckpt_format == "torch_dist" and (parallel != Parallelism() or options.layers_per_virtual_stage):
        problems.append(f"--ckpt-format torch_dist is free of {parallel}: any run can load it; leave the sizes out")
    if problems:
        raise ConversionError(*problems)


@without_collector()
def _open(options: ImportOptions, wanted: _Wanted) -> tuple[Opened, Located, list[str]]:
    """The source, where its parameters are, and what is to be reported of it."""
    opened = open_source(
        options.model, options.model_path, wanted.dialect, cache=options.cache_dir, size=options.size,
        revision=options.revision, load_iters=options.load_iters, true_vocab_size=options.true_vocab_size,
        fields=options.fields, recheck=options.verify, adapter=options.adapter,
        early=lambda config, dtype: _check_early(options, config, dtype, wanted), headers=wanted.headers,
        mtp=options.mtp,
    )  # fmt: skip
    problems = Problems()
    if options.size is not None:
        problems.of(model_size.check, opened.config, options.size)
    located = problems.of(opened.sources, FAMILIES[options.model])
    if located is not None:
        problems.of(check_floating, located, opened.folder)
    notes = None
    if opened.iteration is not None and (options.checksums or options.verify):
        notes = problems.of(sums.checked, opened.iteration, options.workers)
    problems.raise_all()
    assert located is not None
    return opened, located, notes or []


@without_collector()
def _plan(options: ImportOptions, wanted: _Wanted, opened: Opened, located: Located, notes: list[str]) -> Job:
    config, dialect, problems = opened.config, wanted.dialect, Problems()
    stages = options.parallel, options.layers_per_virtual_stage
    parallel = problems.of(staged, wanted.form, config, *stages, wanted.ckpt_format) or options.parallel
    pads = wanted.ckpt_format == "torch"
    rows = problems.of(to_write, opened.vocabulary, *_rows_asked(options), parallel.tensor, pads) or opened.vocabulary
    vocabulary = rows.written or rows.tokens
    problems.found += check_parallelism(config, parallel, vocabulary, dialect)
    asked = options.moe_layer_freq, options.moe_grouped_gemm
    freq = problems.of(training_lines.layer_freq, config, dialect, *asked) or 1
    problems.found += latent.fusion_problems(config, parallel.tensor) if options.mla_down_proj_fusion else []
    problems.raise_all()

    stored = main_dtype([placed for group in located.values() for placed in group])
    report = _report(options, opened, stored, notes, wanted.headers)
    files, notes = carried(opened.tokenizer)
    report.notes += notes
    divisible_by, grouped = options.divisible_by or DIVISIBLE_BY, options.moe_grouped_gemm
    fused = options.mla_down_proj_fusion
    shape = Shape(parallel, dialect, wanted.ckpt_format, vocabulary, divisible_by, freq, grouped, fused)
    dtype = DTYPES.get(options.dtype)
    args = training_lines.rank_args(config, shape, dtype or stored) | _kept_args(opened, dialect, set(files), report)
    form = checked(wanted.form, config)
    args |= stated(form, config, parallel)
    plan, targets, small = _targets(options, opened, located, shape, args, form, dtype or stored)
    _say_training(report, config, shape, dtype or stored, wanted.out, set(files))
    if form != Form():
        report.training_flags, further = training(form, report.training_flags, wanted.out, config)
        report.warnings += further
    if vocabulary != config.vocab_size:
        report.notes.append(
            f"vocabulary {config.vocab_size} rows of the source, {vocabulary} written (new: {options.new_rows} row)"
        )
    text = manifest.build(
        config, true_vocab_size=rows.tokens if rows.known else None,
        repository=opened.repository, revision=opened.revision, source_config=opened.raw_config,
        generation_config=opened.generation_config, tokenizer=opened.tokenizer, assumed=opened.assumed,
        packed_experts=opened.packed_experts
        or packs_experts(FAMILIES[options.model], config, set(opened.tensors)),
    )  # fmt: skip
    prove = proof(
        opened.folder, options.model, workers=options.workers, allow_inconsistent=options.allow_inconsistent,
        source_iters=opened.load_iters, fields=options.fields,
        true_vocab_size=config.vocab_size if opened.dialect.megatron else None, adapter=options.adapter,
        mtp=options.mtp,
    )  # fmt: skip
    files |= {**small, manifest.NAME: text.encode()}
    return Job(plan, report, targets, wanted.out, files, {TRACKER: form.tracker}, prove, (opened.folder,))


def _report(
    options: ImportOptions, opened: Opened, stored: torch.dtype, notes: list[str], headers: Path | None
) -> Report:
    report = Report(notes=[*opened.notes, *notes], warnings=list(opened.warnings))
    at = f"; {opened.repository} at {opened.revision}" if opened.repository and not opened.dialect.megatron else ""
    hollow = headers is not None and opened.folder.is_relative_to(headers)
    read = Path(str(opened.repository)) if hollow else opened.folder
    report.reads(read, f"{options.model}, {opened.what}", stored, at)
    report.ignored = [name for name in opened.tensors if is_buffer(name)]
    return report


def _kept_args(opened: Opened, dialect: Dialect, names: set[str], report: Report) -> dict[str, Any]:
    """Args of the source that go along, and the tokenizer's type; what training lacks of a tokenizer is reported."""
    kept = dict(opened.kept_args)
    if dialect is MEGATRON_CORE and names & {"tokenizer.json", "tekken.json"} and "tokenizer.model" not in names:
        kept.setdefault("tokenizer_type", "HuggingFaceTokenizer")
    notes, warnings = told(names, opened.folder, named=bool({"vocab_file", "tokenizer_model"} & set(kept)))
    report.notes += notes
    report.warnings += warnings
    return kept


def _targets(
    options: ImportOptions, opened: Opened, located: Located, shape: Shape, args: Mapping[str, Any], form: Form,
    written: torch.dtype,
) -> tuple[Plan, list[TargetFile], dict[str, bytes | Path]]:  # fmt: skip
    """The plan, the files of its tensors, and the small files that are part of the format."""
    architecture, config, dtype = FAMILIES[options.model], opened.config, DTYPES.get(options.dtype)
    if shape.ckpt_format == "torch_dist":
        own = config.hybrid_layer_pattern is not None
        stacked = moe_layers.is_stacked(shape.layer_freq) and not own
        plan = plan_to_dist(
            architecture, config, located, opened.dialect, shape.dialect, shape.vocabulary, dtype, form.folder,
            options.new_rows, stacked=stacked, hybrid=form.pattern is not None and not own,
        )  # fmt: skip
        return plan, *dist_targets(
            plan, config, args, form, shape.vocabulary, written, shape.divisible_by, stacked=stacked
        )  # fmt: skip
    each = config.moe is not None and not shape.grouped
    architecture = latent.fused(architecture) if shape.fused else architecture
    plan = plan_to_megatron(
        architecture, config, located, opened.dialect, MEGATRON_CORE_EACH if each else shape.dialect, shape.parallel,
        shape.vocabulary, dtype, rank_file("release", shape.parallel), options.new_rows,
    )  # fmt: skip
    core = shape.dialect is MEGATRON_CORE
    return plan, rank_targets(plan, args, 0 if core else "release", flat=core), {}


def _say_training(
    report: Report, config: ModelConfig, shape: Shape, dtype: torch.dtype, out: Path, names: set[str]
) -> None:
    report.training_flags = training_lines.training_flags(config, shape, out, dtype)
    report.training_flags += training_lines.tokenizer_flags(names, shape.dialect, out)
    if shape.dialect is MEGATRON_CORE:
        report.warnings += core_args.training_warnings(config)
    report.notes += training_lines.notes(config, shape)
    report.warnings += training_lines.warnings(config, shape)


def _check_early(options: ImportOptions, config: ModelConfig, dtype: str | None, wanted: _Wanted) -> None:
    """What a config.json shows to be impossible, before the weights that it is of are fetched: size, layout, disk."""
    problems, stages = Problems(), (options.parallel, options.layers_per_virtual_stage)
    if options.size is not None:
        problems.of(model_size.check, config, options.size)
    parallel = problems.of(staged, wanted.form, config, *stages, wanted.ckpt_format) or options.parallel
    all_rows = Vocabulary(config.vocab_size, config.vocab_size)
    rows = problems.of(to_write, all_rows, *_rows_asked(options), parallel.tensor, pads=False)
    problems.found += check_parallelism(config, parallel, rows.written if rows else config.vocab_size, wanted.dialect)
    kept = DTYPES.get(options.dtype) or DTYPES.get(dtype or "") or torch.bfloat16
    if distributed.current().rank == 0:
        problems.of(space.check_space, wanted.out, model_size.parameter_count(config) * kept.itemsize)
    problems.raise_all()


def _rows_asked(options: ImportOptions) -> tuple[int | None, int | None]:
    return options.true_vocab_size, options.divisible_by


def _default_out(options: ImportOptions) -> Path:
    """Named after a local folder, or after the model and its size."""
    local = Path(options.model_path).expanduser() if options.model_path else None
    if local is not None and local.is_dir():
        return Path(f"{local.resolve().name or options.model}-megatron")
    return Path(f"{options.model}-{options.size or FAMILIES[options.model].default_size}b-megatron")
