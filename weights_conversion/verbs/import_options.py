"""What an import is asked for, and the checks that need no weights: arguments, OUT, and what a config.json shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from weights_conversion.architectures import FAMILIES
from weights_conversion.config import ModelConfig, Parallelism
from weights_conversion.configs import model_size
from weights_conversion.engine.job import DTYPES, RunOptions
from weights_conversion.errors import ConversionError, Problems
from weights_conversion.files import fileio
from weights_conversion.formats import hybrid
from weights_conversion.formats.core_forms import Form, staged
from weights_conversion.launch import distributed
from weights_conversion.layouts.parallel import check_parallelism
from weights_conversion.layouts.vocabulary import Vocabulary, to_write
from weights_conversion.mapping.dialects import MEGATRON_CORE, MEGATRON_LLM, Dialect
from weights_conversion.output import place, space
from weights_conversion.sources.detect import say_found
from weights_conversion.sources.opening import check_named, find_local

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
class Wanted:
    """What is asked for, once arguments and OUT are known to be right."""

    out: Path
    dialect: Dialect
    ckpt_format: str
    replaced: tuple[str, ...]  # files of an earlier output
    form: Form  # of a torch_dist output
    headers: Path | None = None  # where a dry run puts the headers of a repository's weights


def check_arguments(options: ImportOptions) -> Wanted:
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
    dialect = TARGETS[_target(options)]
    ckpt_format = options.ckpt_format or ("torch_dist" if dialect is MEGATRON_CORE else "torch")
    problems.of(_check_target, options)
    problems.of(_check_format, options, dialect, ckpt_format)
    form = problems.of(_form, options, dialect, ckpt_format) or Form()
    problems.raise_all()
    return Wanted(out, dialect, ckpt_format, tuple(replaced or ()), form)


def _check_target(options: ImportOptions) -> None:
    has, target = FAMILIES[options.model].bridge_only, _target(options)
    if has and target != "megatron-bridge":
        raise ConversionError(
            f"--target {target} has no place for a {options.model} model, which has {has}: only layers of "
            "Megatron-Bridge's own have; use --target megatron-bridge"
        )


def _target(options: ImportOptions) -> str:
    return options.target or FAMILIES[options.model].target


def _form(options: ImportOptions, dialect: Dialect, ckpt_format: str) -> Form:
    """The form of the output. Raises ConversionError where another format is written in it."""
    if options.spec is not None and list(options.spec) != hybrid.SPEC:
        raise ConversionError(f"--spec {' '.join(options.spec)} is not known; {' '.join(hybrid.SPEC)} was expected")
    form = Form(options.core_release, _target(options) == "megatron-bridge", options.hybrid_layer_pattern)
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


def check_early(options: ImportOptions, config: ModelConfig, dtype: str | None, wanted: Wanted) -> None:
    """What a config.json shows to be impossible, before the weights that it is of are fetched: size, layout, disk."""
    problems, stages = Problems(), (options.parallel, options.layers_per_virtual_stage)
    if options.size is not None:
        problems.of(model_size.check, config, options.size)
    parallel = problems.of(staged, wanted.form, config, *stages, wanted.ckpt_format) or options.parallel
    all_rows = Vocabulary(config.vocab_size, config.vocab_size)
    rows = problems.of(to_write, all_rows, *rows_asked(options), parallel.tensor, pads=False)
    problems.found += check_parallelism(config, parallel, rows.written if rows else config.vocab_size, wanted.dialect)
    kept = DTYPES.get(options.dtype) or DTYPES.get(dtype or "") or torch.bfloat16
    if distributed.current().rank == 0:
        problems.of(space.check_space, wanted.out, model_size.parameter_count(config) * kept.itemsize)
    problems.raise_all()


def rows_asked(options: ImportOptions) -> tuple[int | None, int | None]:
    return options.true_vocab_size, options.divisible_by


def _default_out(options: ImportOptions) -> Path:
    """Named after a local folder, or after the model and its size."""
    local = Path(options.model_path).expanduser() if options.model_path else None
    if local is not None and fileio.is_folder(local):
        return Path(f"{local.resolve().name or options.model}-megatron")
    return Path(f"{options.model}-{options.size or FAMILIES[options.model].default_size}b-megatron")
