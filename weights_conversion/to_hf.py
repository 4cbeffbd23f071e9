"""Megatron -> Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weights_conversion import links
from weights_conversion.architectures import FAMILIES
from weights_conversion.configs import hf_config, rope
from weights_conversion.configs.megatron_args import NAMES, SILENT
from weights_conversion.engine.job import DTYPES, Job, RunOptions
from weights_conversion.engine.report import Report
from weights_conversion.engine.run import run
from weights_conversion.errors import ConversionError
from weights_conversion.formats import huggingface
from weights_conversion.formats.torch_dist import DistCheckpoint
from weights_conversion.hub import repositories as hub
from weights_conversion.launch import distributed
from weights_conversion.layouts.placement import main_dtype
from weights_conversion.layouts.planners import plan_to_hf
from weights_conversion.mapping.dialects import HF, MEGATRON_CORE
from weights_conversion.output import place
from weights_conversion.sources import described, sums
from weights_conversion.sources.checkpoint import (
    OpenedCheckpoint,
    megatron_root,
    open_checkpoint,
    open_files,
    trained_from,
)
from weights_conversion.sources.detect import say_found
from weights_conversion.sources.locate import check_floating
from weights_conversion.sources.megatron_adapters import chosen, locate_merged
from weights_conversion.sources.reference import (
    Reference,
    Stated,
    beside,
    disagreements,
    open_reference,
    stated,
)
from weights_conversion.to_peft import config_of, write_peft
from weights_conversion.tokenizer import TokenizerOptions, TokenizerPlan, plan_tokenizer, source_tokenizer_files
from weights_conversion.tokenizer.files import TOKENIZER_FILES
from weights_conversion.verify import proof
from weights_conversion.watch import opened_files, watched


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
def megatron_to_hf(options: ExportOptions) -> Report:
    """Writes a Hugging Face folder. Raises ConversionError, before a byte is written, for everything that is wrong."""
    out = options.output_dir
    say_found(megatron_root(options.input_dir, options.load_iters))
    with distributed.rank_zero_first("output"):
        replaced = place.check(out, options.overwrite, options.verify)
    if options.adapter_as == "peft":
        return _adapters_alone(options, replaced)
    opened, reference = _open(options)
    config, architecture = opened.config, FAMILIES[opened.config.family]
    sources, notes, warnings = locate_merged(
        opened.files, architecture, config, options.adapter, options.adapter_alpha
    )  # fmt: skip
    check_floating(sources, opened.files.folder)
    dtype = DTYPES.get(options.dtype) or opened.files.trained_dtype
    plan = plan_to_hf(
        architecture, config, sources, opened.files.dialect, HF,
        options.num_output_shards, dtype,
    )  # fmt: skip
    targets = [huggingface.SafetensorsTarget(file, refs) for file, refs in plan.targets.items()]
    report = Report(notes=list(opened.notes), warnings=list(opened.warnings))
    report.notes += notes
    report.warnings += warnings
    if options.checksums or options.verify:
        report.notes += sums.checked(opened.files.folder, options.workers)
    stored = main_dtype([placed for group in sources.values() for placed in group])
    report.reads(opened.root, f"{config.family}, {described.of_megatron(opened.root, opened.files)}", stored)
    if options.weights == "master":
        report.notes.append("weights    the optimizer's float32 weights (--weights master), not the model's own")
    files: dict[str, bytes | Path] = {}
    if len(targets) > 1:
        files["model.safetensors.index.json"] = huggingface.Index(targets).text().encode()

    written_dtype = dtype or stored
    if dtype is not None and options.dtype not in DTYPES:
        report.notes.append(f"dtype      {dtype}, as trained; the checkpoint holds the optimizer's own (--dtype)")
    said = stated(opened.manifest, reference, chosen=options.reference is not None)
    report.notes += said.notes
    if problems := hf_config.foreign(config.family, said.config, said.where):
        raise ConversionError(*problems)
    exported = hf_config.write_config(config, said.config, str(written_dtype).removeprefix("torch."))
    generation = dict(said.generation)
    if reference is not None:
        report.warnings += disagreements(reference, config)
        report.notes.append(f"reference  {reference.name} gives what the checkpoint does not state")
    if options.no_tokenizer:
        report.notes.append("tokenizer  left out (--no_tokenizer)")
    else:
        planned = _tokenizer(_with_reference(options, reference), opened, generation)
        report.notes += planned.report
        report.warnings += planned.warnings
        _set_token_ids(exported, generation, planned, has_base=bool(said.config))
        files |= planned.copied
        files |= {name: _json(content) for name, content in planned.written.items()}
    files["config.json"] = _json(exported)
    if generation or not said.config:
        files["generation_config.json"] = _json(generation or _default_generation(exported))
    report.notes += _differences(said, exported)
    report.notes.append(f"values     {described.values(config, opened.origins)}")
    prove = proof(
        opened.root, config.family, workers=options.workers, allow_inconsistent=options.allow_inconsistent,
        source_iters=opened.load_iters, fields=options.fields, true_vocab_size=config.vocab_size,
        weights=options.weights, adapter=options.adapter, adapter_alpha=options.adapter_alpha,
    )  # fmt: skip
    copied = [content for content in files.values() if isinstance(content, Path)]
    place.check_apart(out, [*map(Path, plan.source_files()), opened.root, options.input_dir, *copied])
    report.notes += links.told(opened.root, [*plan.source_files(), *opened_files()], TOKENIZER_FILES)
    report.replaced(replaced)
    return run(Job(plan, report, targets, out, files, prove=prove), options)


def _adapters_alone(options: ExportOptions, replaced: list[str]) -> Report:
    """--adapter_as peft: the adapters of --adapter, or of --input_dir itself, whose base need not be there then."""
    files = open_files(options.input_dir, options.load_iters)
    holder = chosen(files, options.adapter)
    if holder is None:
        raise ConversionError(f"{files.folder} holds no adapters, so --adapter_as peft has nothing to write")
    if isinstance(files, DistCheckpoint) and not files.stored:
        config = config_of(holder, options.model, options.fields)
    else:
        config = _open(options)[0].config
    return write_peft(holder, config, options.adapter_alpha, options.output_dir, options.reference, replaced, options)


def _open(options: ExportOptions) -> tuple[OpenedCheckpoint, Reference | None]:
    """The checkpoint, and --reference, whose number of rows counts where nothing else states it."""
    reference = open_reference(options.reference, options.tokenizer.cache_dir) if options.reference else None

    def opened(fields: Mapping[str, Any], rows: int | None = None) -> OpenedCheckpoint:
        return open_checkpoint(
            options.input_dir, options.model, load_iters=options.load_iters, true_vocab_size=options.true_vocab_size,
            flags=fields, weights=options.weights, reference_rows=rows,
        )  # fmt: skip

    found = opened(options.fields)
    if reference is None and (place := beside(found.files.folder)) is not None:
        reference = open_reference(str(place), None)
    if reference is None:
        return found, None
    model = reference.model(found.config.family)
    # What nothing in the checkpoint says is the reference's, before it is the family's usual value.
    lost = {name: getattr(model, name) for name in SILENT if found.origins.get(name) == "family"}
    again = opened({**lost, **options.fields}, model.vocab_size)
    taken = [f"{NAMES[name]} {value}" for name, value in lost.items() if name not in options.fields]
    notes = [f"values     of {reference.name}, since the checkpoint says none: {', '.join(taken)}"] if taken else []
    # Constants of Megatron-Core's rope, which args cannot carry, are the reference's where all else agrees.
    whole = rope.completed(again.config.rope_scaling, model.rope_scaling, latent=again.config.mla is not None)
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


def _tokenizer(options: ExportOptions, opened: OpenedCheckpoint, generation: Mapping[str, Any]) -> TokenizerPlan:
    args = opened.files.args

    def fetch(repository: str, cache: Path | None) -> Path:
        with distributed.rank_zero_first("tokenizer"):
            return hub.snapshot(repository, cache_dir=cache, weights=False, recheck=options.verify).folder

    try:
        return plan_tokenizer(
            opened.config.family, opened.root, args, options.tokenizer, embedding_rows=opened.config.vocab_size,
            rows_known=opened.true_rows_known, core=opened.files.dialect is MEGATRON_CORE,
            iteration=opened.files.folder, search=trained_from(args), fetch=fetch, generation=generation,
        )  # fmt: skip
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        place = options.tokenizer.vocab_file or opened.root
        raise ConversionError(
            f"the tokenizer files of {place} are malformed ({type(error).__name__}: {error}); "
            "--vocab_file names others, --no_tokenizer leaves them out"
        ) from error


def _set_token_ids(config: dict, generation: dict, planned: TokenizerPlan, has_base: bool) -> None:
    """Overrides reach config.json and generation_config.json; a config made from nothing gets bos and eos too."""
    if not has_base:
        for key in ("bos", "eos"):
            if key in planned.token_ids:
                config.setdefault(f"{key}_token_id", planned.token_ids[key][1])
                generation.setdefault(f"{key}_token_id", planned.token_ids[key][1])
    for key, value in planned.config_overrides.items():
        config[key] = value
        generation[key] = value


def _default_generation(config: Mapping[str, Any]) -> dict[str, Any]:
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
    return {"_from_model_config": True, **ids}


def _differences(said: Stated, exported: Mapping[str, Any]) -> list[str]:
    """Fields whose meaning differs from the source's config.json (keys written for other readers do not count)."""
    source = said.config
    if not source:
        return []
    rope = ("rope_theta", "rope_scaling", "rope_parameters")  # in two spellings: compared by what they mean
    pairs = {key: (source[key], exported[key]) for key in sorted(set(source) & set(exported) - set(rope))}
    for name, one, two in zip(
        ("rope theta", "rope scaling"),
        hf_config.read_rope(source, said.where),
        hf_config.read_rope(exported, "config.json"),
        strict=True,
    ):
        pairs[name] = (one, two)
    left = [key for key in hf_config.LEFT_BEHIND if source.get(key) is not None and key not in exported]
    differing = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    return [
        *(f"config     {key}: {one!r} in the {said.of}, {two!r} here" for key, (one, two) in differing.items()),
        *(f"config     {key} is left out: the export holds nothing of what it names" for key in left),
    ]


def _json(content: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        return (json.dumps(content, indent=2) + "\n").encode()
