"""Hugging Face, Meta, or another Megatron checkpoint -> Megatron."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from weights_conversion.architectures import FAMILIES, latent
from weights_conversion.config import ModelConfig
from weights_conversion.configs import core_args, manifest, model_size, moe, moe_layers, training_lines
from weights_conversion.configs.training_lines import Shape
from weights_conversion.engine import rounding
from weights_conversion.engine.job import DTYPES, Job
from weights_conversion.engine.report import Report
from weights_conversion.engine.run import run
from weights_conversion.errors import Problems
from weights_conversion.files import links
from weights_conversion.files.collector import without_collector
from weights_conversion.files.watch import opened_files, watched
from weights_conversion.formats.core_forms import Form, checked, staged, stated, training
from weights_conversion.formats.dist_format import DistFormat
from weights_conversion.formats.format import Content
from weights_conversion.formats.iterations import TRACKER
from weights_conversion.formats.rank_format import RankFormat
from weights_conversion.layouts.parallel import check_parallelism
from weights_conversion.layouts.placement import Located, main_dtype
from weights_conversion.layouts.vocabulary import DIVISIBLE_BY, Vocabulary, to_write
from weights_conversion.mapping.dialects import MEGATRON_CORE, Dialect
from weights_conversion.mapping.parameters import is_buffer
from weights_conversion.sources import described, hf_form, sums
from weights_conversion.sources.locate import check_floating
from weights_conversion.sources.opening import Opened, adapter_folder, open_source
from weights_conversion.tokenizer.carried import carried, told
from weights_conversion.tokenizer.files import TOKENIZER_FILES
from weights_conversion.verbs.import_options import ImportOptions, Wanted, check_arguments, check_early, rows_asked
from weights_conversion.verify import proof


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
@without_collector()
def _hf_to_megatron(options: ImportOptions, headers: Path | None) -> Report:
    wanted = replace(check_arguments(options), headers=headers)
    options = replace(options, adapter=adapter_folder(options.adapter, options.cache_dir, options.verify))
    opened, located, notes = _open(options, wanted)
    job = _plan(options, wanted, opened, located, notes)
    read = [*job.plan.source_files(), *opened_files()]
    job.report.notes += links.told(opened.folder, read, TOKENIZER_FILES)
    job.report.replaced(list(wanted.replaced))
    return run(job, options)


def _open(options: ImportOptions, wanted: Wanted) -> tuple[Opened, Located, list[str]]:
    """The source, where its parameters are, and what is to be reported of it."""
    opened = open_source(
        options.model, options.model_path, wanted.dialect, cache=options.cache_dir, size=options.size,
        revision=options.revision, load_iters=options.load_iters, true_vocab_size=options.true_vocab_size,
        fields=options.fields, recheck=options.verify, adapter=options.adapter,
        early=lambda config, dtype: check_early(options, config, dtype, wanted), headers=wanted.headers,
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


def _shape(options: ImportOptions, wanted: Wanted, opened: Opened) -> tuple[Shape, Vocabulary]:
    """How the model is laid out, and its rows. Raises ConversionError with all that keeps it from being so."""
    config, dialect, problems = opened.config, wanted.dialect, Problems()
    stages = options.parallel, options.layers_per_virtual_stage
    parallel = problems.of(staged, wanted.form, config, *stages, wanted.ckpt_format) or options.parallel
    pads = wanted.ckpt_format == "torch"
    rows = problems.of(to_write, opened.vocabulary, *rows_asked(options), parallel.tensor, pads) or opened.vocabulary
    vocabulary = rows.written or rows.tokens
    problems.found += check_parallelism(config, parallel, vocabulary, dialect)
    asked = options.moe_layer_freq, options.moe_grouped_gemm
    freq = problems.of(training_lines.layer_freq, config, dialect, *asked) or 1
    problems.found += latent.fusion_problems(config, parallel.tensor) if options.mla_down_proj_fusion else []
    problems.raise_all()
    shape = Shape(
        parallel, dialect, wanted.ckpt_format, vocabulary, options.divisible_by or DIVISIBLE_BY, freq,
        options.moe_grouped_gemm, options.mla_down_proj_fusion, moe.router_dtype(opened.kept_args),
    )  # fmt: skip
    return shape, rows


def _plan(options: ImportOptions, wanted: Wanted, opened: Opened, located: Located, notes: list[str]) -> Job:
    config, dialect = opened.config, wanted.dialect
    shape, rows = _shape(options, wanted, opened)
    stored = main_dtype([placed for group in located.values() for placed in group])
    report = _report(options, opened, stored, notes, wanted.headers)
    files, notes = carried(opened.tokenizer)
    report.notes += notes
    dtype = DTYPES.get(options.dtype) or opened.trained_dtype
    args = training_lines.rank_args(config, shape, dtype or stored) | _kept_args(opened, dialect, set(files), report)
    form = checked(wanted.form, config)
    args |= stated(form, config, shape.parallel)
    architecture = FAMILIES[options.model]
    output = _format(config, shape, form, dtype or stored).plan(
        Content(
            latent.fused(architecture) if shape.fused else architecture, config, located, opened.dialect, dialect,
            shape.vocabulary, dtype, options.new_rows, args,
        )
    )  # fmt: skip
    if wanted.headers is None or not opened.folder.is_relative_to(wanted.headers):
        report.notes += rounding.told(output.plan)
    _say_training(report, config, shape, dtype or stored, wanted.out, set(files))
    if form != Form():
        report.training_flags, further = training(form, report.training_flags, wanted.out, config)
        report.warnings += further
    if shape.vocabulary != config.vocab_size:
        report.notes.append(
            f"vocabulary {config.vocab_size} rows of the source, {shape.vocabulary} written (new: {options.new_rows} "
            "row)"
        )
    text = manifest.build(
        # Rows that are added here are no tokens, whatever the source's are.
        config, true_vocab_size=rows.tokens if rows.known or shape.vocabulary > opened.vocabulary.stored else None,
        repository=opened.repository, revision=opened.revision, source_config=opened.raw_config,
        generation_config=opened.generation_config, tokenizer=opened.tokenizer, assumed=opened.assumed,
        hf_form=hf_form.stated(options.model, config, frozenset(opened.tensors), located, opened.dialect)
        or (opened.hf_form or None),
    )  # fmt: skip
    prove = proof(
        opened.folder, options.model, workers=options.workers, allow_inconsistent=options.allow_inconsistent,
        source_iters=opened.load_iters, fields=options.fields,
        true_vocab_size=config.vocab_size if opened.dialect.megatron else None, adapter=options.adapter,
        mtp=options.mtp,
    )  # fmt: skip
    files |= {**output.files, manifest.NAME: text.encode()}
    return Job(output.plan, report, output.targets, wanted.out, files, {TRACKER: form.tracker}, prove, (opened.folder,))


def _report(
    options: ImportOptions, opened: Opened, stored: torch.dtype, notes: list[str], headers: Path | None
) -> Report:
    report = Report(notes=[*opened.notes, *notes], warnings=list(opened.warnings))
    at = f"; {opened.repository} at {opened.revision}" if opened.repository and not opened.dialect.megatron else ""
    hollow = headers is not None and opened.folder.is_relative_to(headers)
    read = Path(str(opened.repository)) if hollow else opened.folder
    report.reads(read, f"{options.model}, {opened.what}", stored, at)
    if opened.trained_dtype is not None and options.dtype not in DTYPES:
        report.notes.append(described.as_trained(opened.trained_dtype))
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


def _format(config: ModelConfig, shape: Shape, form: Form, written: torch.dtype) -> RankFormat | DistFormat:
    if shape.ckpt_format == "torch_dist":
        stacked = moe_layers.is_stacked(shape.layer_freq) and config.gated_delta is None
        return DistFormat(form, stacked, written, shape.divisible_by)
    return RankFormat(shape.parallel, shape.grouped)


def _say_training(
    report: Report, config: ModelConfig, shape: Shape, dtype: torch.dtype, out: Path, names: set[str]
) -> None:
    report.training_flags = training_lines.training_flags(config, shape, out, dtype)
    report.training_flags += training_lines.tokenizer_flags(names, shape.dialect, out)
    if shape.dialect is MEGATRON_CORE and not FAMILIES[config.family].bridge_only:  # those are of Megatron-LM's flags
        report.warnings += core_args.training_warnings(config)
    report.notes += training_lines.notes(config, shape)
    report.warnings += training_lines.warnings(config, shape)
