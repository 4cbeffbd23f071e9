"""Megatron -> Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from weights_conversion.architectures import FAMILIES
from weights_conversion.configs import exported, hf_config, hf_outer, hf_write, rope_core, rope_latent
from weights_conversion.configs.megatron_args import NAMES, SILENT
from weights_conversion.engine import rounding
from weights_conversion.engine.job import DTYPES, Job, RunOptions
from weights_conversion.engine.report import Report
from weights_conversion.engine.run import run
from weights_conversion.errors import ConversionError, Problems
from weights_conversion.files import links
from weights_conversion.files.collector import without_collector
from weights_conversion.files.watch import opened_files, watched
from weights_conversion.formats.format import Content
from weights_conversion.formats.hf_format import HuggingFaceFormat
from weights_conversion.hub import repositories as hub
from weights_conversion.launch import distributed
from weights_conversion.layouts.placement import Located, main_dtype
from weights_conversion.mapping.dialects import MEGATRON_CORE
from weights_conversion.output import place
from weights_conversion.sources import described, hf_form, sums
from weights_conversion.sources.checkpoint import (
    OpenedCheckpoint,
    megatron_root,
    open_checkpoint,
    open_files,
)
from weights_conversion.sources.detect import say_found
from weights_conversion.sources.locate import check_floating
from weights_conversion.sources.megatron_adapters import chosen, locate_merged
from weights_conversion.sources.named_folders import trained_from
from weights_conversion.sources.reference import (
    Reference,
    Stated,
    around,
    beside,
    disagreements,
    open_reference,
    stated,
)
from weights_conversion.tokenizer import TokenizerOptions, TokenizerPlan, plan_tokenizer, source_tokenizer_files
from weights_conversion.tokenizer.checks import nameless
from weights_conversion.tokenizer.files import TOKENIZER_FILES
from weights_conversion.verbs.to_peft import config_of, write_peft
from weights_conversion.verify import proof


@dataclass(frozen=True)
class ExportOptions(RunOptions):
    """megatron_to_hf.py's arguments. `fields` are ModelConfig fields that the user states (--rope_theta ...).

    `model` None: the family that the checkpoint says or shows. `weights` "master": the optimizer's float32 weights.
    """

    input_dir: Path = Path()
    output_dir: Path = Path()
    model: str | None = None
    num_output_shards: int = 1
    tokenizer: TokenizerOptions = TokenizerOptions()
    no_tokenizer: bool = False
    true_vocab_size: int | None = None
    load_iters: int | str | None = None
    reference: str | None = None
    weights: str = "model"
    adapter: Path | None = None
    adapter_as: str = "merged"
    adapter_alpha: float | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@watched
@without_collector()
def megatron_to_hf(options: ExportOptions) -> Report:
    """Writes a Hugging Face folder. Raises ConversionError, before a byte is written, for everything that is wrong.

    Problems are raised together at the end of three stages: arguments and OUT; the source; plan and machine (run).
    """
    replaced = _check_arguments(options)
    if options.adapter_as == "peft":
        return _adapters_alone(options, replaced)
    with ExitStack() as held:
        source = _read(options, held)
        job = _plan(options, source)
        job.report.notes += links.told(source.opened.root, [*job.plan.source_files(), *opened_files()], TOKENIZER_FILES)
        job.report.replaced(replaced)
        return run(job, options)


def _check_arguments(options: ExportOptions) -> list[str]:
    """The files of an earlier output that would go."""
    problems = Problems()
    say_found(problems.of(megatron_root, options.input_dir, options.load_iters))
    problems.of(_check_provable, options)
    with distributed.rank_zero_first("output"):
        replaced = problems.of(place.check, options.output_dir, options.overwrite, options.verify)
    problems.raise_all()
    return replaced or []


def _check_provable(options: ExportOptions) -> None:
    if options.adapter_as == "peft" and options.verify:
        raise ConversionError(
            "--verify compares whole models, and --adapter_as peft writes none; leave --verify out (the factors are "
            "copied bit for bit), or --adapter_as, so that what is merged is proven"
        )


@dataclass(frozen=True)
class _Read:
    """A source that has passed every check of its own."""

    opened: OpenedCheckpoint
    located: Located
    reference: Reference | None
    said: Stated  # config.json and generation_config.json of the model that it was made from
    tokenizer: TokenizerPlan | None
    notes: list[str]
    warnings: list[str]


def _read(options: ExportOptions, held: ExitStack) -> _Read:
    opened, reference = _open(options)
    config, files, problems = opened.config, opened.files, Problems()
    merged = problems.of(locate_merged, files, FAMILIES[config.family], config, options.adapter, options.adapter_alpha)
    located, notes, warnings = merged or ({}, [], [])
    problems.of(check_floating, located, files.folder)
    asked = options.checksums or options.verify
    checked = problems.of(sums.checked, files.folder, options.workers) if asked else None
    said = stated(opened.manifest, reference, chosen=options.reference is not None)
    problems.found += hf_config.foreign(config.family, said.config, said.where)
    tokenizer = None
    if not options.no_tokenizer:
        # Nothing is downloaded for a source that is refused.
        tokenizer = problems.of(
            _tokenizer, _with_reference(options, reference), opened, dict(said.generation), may_fetch=not problems
        )
    problems.raise_all()
    notes = [*opened.notes, *notes, *(checked or []), *said.notes]
    reference = hf_form.with_others(reference, config.family, options.tokenizer.cache_dir, held, dry=options.dry_run)
    return _Read(opened, located, reference, said, tokenizer, notes, [*opened.warnings, *warnings])


def _plan(options: ExportOptions, source: _Read) -> Job:
    opened, config = source.opened, source.opened.config
    dtype = DTYPES.get(options.dtype) or opened.files.trained_dtype
    form = hf_form.form_of(config, opened.manifest, source.said.config, source.reference)
    written = HuggingFaceFormat(options.num_output_shards, form.packed, form.own_types, form.others)
    output = written.plan(
        Content(
            FAMILIES[config.family], config, source.located, opened.files.dialect, form.dialect, config.vocab_size,
            dtype,
        )
    )  # fmt: skip
    stored = main_dtype([placed for group in source.located.values() for placed in group])
    report = _report(options, source, stored, dtype)
    files, changed = _configs(source, dtype or stored)
    files |= {path.name: path for path in form.files}
    report.notes += [*form.notes, *rounding.told(output.plan)]
    report.warnings += form.warnings
    report.notes += [*changed, f"values     {described.values(config, opened.origins)}"]
    files |= output.files
    prove = proof(
        opened.root, config.family, workers=options.workers, allow_inconsistent=options.allow_inconsistent,
        source_iters=opened.load_iters, fields=options.fields, true_vocab_size=config.vocab_size,
        weights=options.weights, adapter=options.adapter, adapter_alpha=options.adapter_alpha,
        mtp=options.mtp,
    )  # fmt: skip
    read = (opened.root, options.input_dir)
    return Job(output.plan, report, output.targets, options.output_dir, files, prove=prove, read=read)


def _report(options: ExportOptions, source: _Read, stored: torch.dtype, dtype: torch.dtype | None) -> Report:
    opened, reference, tokenizer = source.opened, source.reference, source.tokenizer
    report = Report(notes=list(source.notes), warnings=list(source.warnings))
    report.warnings += hf_write.written_warnings(opened.config)
    report.reads(opened.root, f"{opened.config.family}, {described.of_megatron(opened.root, opened.files)}", stored)
    if options.weights == "master":
        report.notes.append("weights    the optimizer's float32 weights (--weights master), not the model's own")
    if dtype is not None and options.dtype not in DTYPES:
        report.notes.append(described.as_trained(dtype))
    if reference is None and opened.manifest is None and opened.config.mla is not None:
        report.notes += rope_latent.constants_note(opened.config.rope_scaling, opened.files.args)
    if reference is not None:
        report.warnings += disagreements(reference, opened.config)
        report.notes.append(f"reference  {reference.name} gives what the checkpoint does not state")
    report.notes += ["tokenizer  left out (--no_tokenizer)"] if tokenizer is None else tokenizer.report
    if tokenizer is not None:
        report.warnings += tokenizer.warnings
        report.warnings += nameless(tokenizer.ids, source.said.config.get("vocab_size"), opened.config.vocab_size)
    return report


def _configs(source: _Read, dtype: torch.dtype) -> tuple[dict[str, bytes | Path], list[str]]:
    """config.json, generation_config.json and the tokenizer's files; and how the first differs from the source's."""
    files: dict[str, bytes | Path] = {}
    said, generation, tokenizer = source.said, dict(source.said.generation), source.tokenizer
    config = hf_write.write_config(source.opened.config, said.config, str(dtype).removeprefix("torch."))
    if not said.config and hf_write.is_wrapped(source.opened.config.family, {}):
        config |= hf_outer.stated(source.opened.files.args)
    if tokenizer is not None:
        exported.set_token_ids(
            config, generation, tokenizer.token_ids, tokenizer.config_overrides, has_base=bool(said.config)
        )
        files |= tokenizer.copied
        files |= {name: exported.as_json(content) for name, content in tokenizer.written.items()}
    files["config.json"] = exported.as_json(config)
    if generation or not said.config:
        files["generation_config.json"] = exported.as_json(generation or exported.default_generation(config))
    return files, exported.differences(said.config, said.where, said.of, config)


def _adapters_alone(options: ExportOptions, replaced: list[str]) -> Report:
    """--adapter_as peft: the adapters of --adapter, or of --input_dir itself, whose base need not be there then."""
    files = open_files(options.input_dir, options.load_iters)
    holder = chosen(files, options.adapter)
    if holder is None:
        raise ConversionError(f"{files.folder} holds no adapters, so --adapter_as peft has nothing to write")
    config = _open(options)[0].config if files.names else config_of(holder, options.model, options.fields)
    return write_peft(holder, config, options.adapter_alpha, options.output_dir, options.reference, replaced, options)


def _open(options: ExportOptions) -> tuple[OpenedCheckpoint, Reference | None]:
    """The checkpoint, and --reference, whose number of rows counts where nothing else states it."""
    reference = open_reference(options.reference, options.tokenizer.cache_dir) if options.reference else None

    def opened(fields: Mapping[str, Any], rows: int | None = None) -> OpenedCheckpoint:
        return open_checkpoint(
            options.input_dir, options.model, load_iters=options.load_iters, true_vocab_size=options.true_vocab_size,
            flags=fields, weights=options.weights, reference_rows=rows, mtp=options.mtp,
            model_type=hf_outer.model_type(reference.config) if reference else None,
        )  # fmt: skip

    found = opened(options.fields)
    if reference is None and (place := beside(found.files.folder)) is not None:
        reference = open_reference(str(place), None)
    if reference is None and found.manifest is None:
        reference = around(found.files.args, found.root, found.config)
    if reference is None:
        return found, None
    model = reference.model(found.config.family)
    if options.reference is None and model.vocab_size > found.files.vocabulary:
        raise ConversionError(
            f"{reference.folder / 'config.json'} says {model.vocab_size} vocabulary rows, but the embedding has "
            f"{found.files.vocabulary}: it is of another model"
        )
    # What nothing in the checkpoint says is the reference's, before it is the family's usual value.
    lost = {name: getattr(model, name) for name in SILENT if found.origins.get(name) == "family"}
    again = opened({**lost, **options.fields}, model.vocab_size)
    taken = [f"{NAMES[name]} {value}" for name, value in lost.items() if name not in options.fields]
    notes = [f"values     of {reference.name}, since the checkpoint says none: {', '.join(taken)}"] if taken else []
    # Constants of Megatron-Core's rope, which args cannot carry, are the reference's where all else agrees.
    whole = rope_core.completed(again.config.rope_scaling, model.rope_scaling, latent=again.config.mla is not None)
    if again.origins.get("rope_scaling") == "args" and whole != again.config.rope_scaling:
        again = replace(again, config=replace(again.config, rope_scaling=whole))
        notes.append(f"values     of {reference.name}: the parts of its rope scaling that args cannot carry")
    return replace(again, notes=(*again.notes, *notes)), reference


def _with_reference(options: ExportOptions, reference: Reference | None) -> ExportOptions:
    """--reference's tokenizer is as good as named by --vocab_file, which outranks it."""
    if reference is None or options.tokenizer.vocab_file is not None:
        return options
    if not source_tokenizer_files(reference.folder):
        return options
    return replace(options, tokenizer=replace(options.tokenizer, vocab_file=reference.folder))


def _tokenizer(
    options: ExportOptions, opened: OpenedCheckpoint, generation: Mapping[str, Any], may_fetch: bool
) -> TokenizerPlan:
    args = opened.files.args

    def fetch(repository: str, cache: Path | None) -> Path:
        with distributed.rank_zero_first("tokenizer"):
            return hub.snapshot(repository, cache_dir=cache, weights=False, recheck=options.verify).folder

    try:
        return plan_tokenizer(
            opened.config.family, opened.root, args, options.tokenizer, embedding_rows=opened.config.vocab_size,
            rows_known=opened.vocabulary.known, core=opened.files.dialect is MEGATRON_CORE,
            iteration=opened.files.folder, search=trained_from(args), fetch=fetch if may_fetch else None,
            generation=generation,
        )  # fmt: skip
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        place = options.tokenizer.vocab_file or opened.root
        raise ConversionError(
            f"the tokenizer files of {place} are malformed ({type(error).__name__}: {error}); "
            "--vocab_file names others, --no_tokenizer leaves them out"
        ) from error
