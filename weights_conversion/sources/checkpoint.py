"""Opens a Megatron checkpoint of any kind, and decides what model it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights_conversion.architectures import FAMILIES
from weights_conversion.config import ModelConfig
from weights_conversion.configs import core_args, core_foreign, manifest, megatron_args, moe, rope_core
from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.formats import hybrid
from weights_conversion.formats.dist_format import DistFormat
from weights_conversion.formats.iterations import TRACKER, find_iteration
from weights_conversion.formats.megatron import RankFiles
from weights_conversion.formats.rank_format import RankFormat
from weights_conversion.formats.run_config import RUN_CONFIG, pretrained
from weights_conversion.formats.torch_dist import DistCheckpoint
from weights_conversion.layouts.vocabulary import Vocabulary
from weights_conversion.mapping.dialects import MEGATRON_CORE
from weights_conversion.sources import further, statements
from weights_conversion.sources.detect import Found, Kind, detect
from weights_conversion.sources.families import chosen_family, read_features, with_flags
from weights_conversion.sources.named_folders import passed_over, trained_from
from weights_conversion.sources.unstated_args import args_of_others
from weights_conversion.sources.vocabulary import count

FORMATS = (DistFormat(), RankFormat())  # of Megatron checkpoints, in the order in which a folder is held to be one


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A Megatron checkpoint with the model that it holds: headers and args read, no data."""

    root: Path
    files: RankFiles | DistCheckpoint
    config: ModelConfig
    manifest: Mapping[str, Any] | None
    origins: Mapping[str, str]
    vocabulary: Vocabulary
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    load_iters: int | str | None = None  # the iteration below `root`, where the user or the path named one


def open_files(
    root: Path, load_iters: int | str | None = None, weights: str = "model"
) -> RankFiles | DistCheckpoint:  # fmt: skip
    """Opens an iteration in whichever format it is, its args respelled in Megatron-LLM's names. No data are read.

    `weights` "master": the optimizer's float32 weights stand in the places of the model's.
    """
    here = megatron_root(root, load_iters)
    folder, iteration = find_iteration(here.root, here.iteration)
    files = next(each for each in FORMATS if each.opens(folder)).open(folder, iteration, weights)
    core = files.dialect is MEGATRON_CORE
    if problems := (core_foreign if core else megatron_args).unreadable(files.left_out, folder):
        raise ConversionError(*problems)
    if not core:
        return files
    return dataclasses.replace(files, args=core_args.normalise(files.args or args_of_others(folder), folder))


def megatron_root(path: Path, load_iters: int | str | None) -> Found:
    """The Megatron checkpoint that `path` names. Raises ConversionError for one of another kind."""
    here = detect(path, load_iters)
    if here.kind is not Kind.MEGATRON:
        raise ConversionError(
            f"{here.root} is a {here.kind.value} folder, where a Megatron checkpoint was expected (the folder that "
            f"holds {TRACKER})"
        )
    return here


def open_checkpoint(
    root: Path, model: str | None, *, load_iters: int | str | None = None, true_vocab_size: int | None = None,
    flags: Mapping[str, Any] | None = None, compared: bool = False,
    weights: str = "model", reference_rows: int | None = None, model_type: str | None = None,
    mtp: str = further.KEEP, may_grow: bool = False,
) -> OpenedCheckpoint:  # fmt: skip
    """Finds the iteration, its layout and its ModelConfig, whose vocabulary is the rows to keep.

    `model` None: the family that the checkpoint says or shows, which is reported. `compared`: it is to be compared with
    another, so that a value which nothing states needs no flag. `weights`: as open_files has it. `reference_rows`: what
    --reference has, which count where nothing else states the true number. `model_type` is that of its config.json,
    which decides where the checkpoint does not. `mtp` "drop": without layers that predict further tokens. `may_grow`:
    `true_vocab_size` is what another layout is to have, as vocabulary.count has it.
    """
    here, flags = megatron_root(root, load_iters), flags or {}
    root, files = here.root, open_files(here.root, here.iteration, weights)
    if not files.holds_model:
        raise ConversionError(_no_base(files.folder))
    found = manifest.find([root, *trained_from(files.args)])
    said = found[1] if found else None
    notes = list(here.notes)
    if mtp == further.DROP:
        files, left = further.without_in_files(files)
        notes.append(left)
    shown, stored = _contradicted(files), files.args
    model = _family(model, files, said, root, true_vocab_size, notes, flags, model_type)
    files, told = _expressible(files, model, flags, root, compared=compared)
    counted = count(files, true_vocab_size, said, reference_rows, may_grow=may_grow)
    args, tied = _with_head(files, model)
    notes += [*told, *([f"config     from {found[0]}"] if found else []), counted.note, *tied]
    fields = manifest.model_fields(said) if said else None
    resolved = megatron_args.resolve(model, args, fields, flags, counted.vocabulary.tokens)
    warnings = [*passed_over(files.args, root), *shown, *counted.warnings, *_warnings(files, resolved, args, said)]
    problems, others = statements.contradictions(files, resolved, stored)
    if problems and not compared:
        raise ConversionError(*problems)
    warnings += [*others, *problems]
    return OpenedCheckpoint(
        root, files, resolved.config, said, resolved.origins, counted.vocabulary, tuple(notes), tuple(warnings),
        here.iteration,
    )  # fmt: skip


def _expressible(
    files: RankFiles | DistCheckpoint, model: str, flags: Mapping[str, Any], root: Path, *, compared: bool
) -> tuple[RankFiles | DistCheckpoint, list[str]]:
    """`files` with the args that the checkpoint shows, and notes on them. Raises ConversionError for foreign ones."""
    if flags.get("sliding_window") is not None and not FAMILIES[model].windowed:
        raise ConversionError(f"--sliding_window_size was given, but {root} holds a {model} model, which has no window")
    notes = []
    if files.dialect is MEGATRON_CORE:
        files = dataclasses.replace(files, args={**files.args, **core_foreign.shown(files.names, files.args)})
        problems = core_foreign.foreign_tensors(files.names, model, files.folder)
        problems += core_foreign.foreign_to_family(_with_window(files.args, flags), model, files.folder)
        unused = core_args.unused_factor(files.args, files.iteration, files.folder)
        if unused and compared:
            files = dataclasses.replace(files, args={**files.args, "rope_scaling_factor": None})
        elif "rope_scaling_factor" not in flags:
            problems += unused
        problems += core_foreign.by_name(files.args, files.folder)
        notes += core_foreign.unknown(files.args)
    else:
        problems = megatron_args.foreign(model, _with_window(files.args, flags))
        problems += core_foreign.in_megatron_llm(files.args, files.folder)
    if files.said_by is not None:
        notes.append(f"args       from {files.said_by}")
    if isinstance(files, DistCheckpoint) and files.others:
        notes.append(
            f"vision     {len(files.others)} tensors beside the text model stay behind ({files.others[0]} and so on)"
        )
    if problems:
        raise ConversionError(*problems)
    return files, notes


def _contradicted(files: RankFiles | DistCheckpoint) -> list[str]:
    """Warnings on args that the tensors contradict. Raises ConversionError where tensors are missing."""
    if files.dialect is not MEGATRON_CORE:
        return []
    problems, warnings = core_foreign.contradicted(files.names, files.args, files.folder)
    if problems:
        raise ConversionError(*problems)
    return warnings


def _with_head(files: RankFiles | DistCheckpoint, model: str) -> tuple[dict[str, Any], list[str]]:
    """The args, which say whether the head is tied to the embedding, and a note where only the tensors show it."""
    args, said = dict(files.args), _said_of_head(files)
    if said and args.get("tie_embed_logits") and files.has_head() and files.parallel.pipeline == 1:
        raise ConversionError(f"{files.folder} has an output layer of its own, output_layer.weight{said}")
    if FAMILIES[model].ties_in_megatron_llm:  # the original's release files leave it out
        args["tie_embed_logits"] = not files.has_head()
    elif files.dialect.ties_heads and "tie_embed_logits" not in args and not files.has_head():
        args["tie_embed_logits"] = True
        return args, ["config     the head is tied to the embedding: the args do not say, and there is no output layer"]
    elif not files.has_head() and not args.get("tie_embed_logits"):
        raise ConversionError(
            f"{files.folder} has no output layer (lm_head) on its last stage, which {model} needs{said}"
        )
    return args, []


def _said_of_head(files: RankFiles | DistCheckpoint) -> str:
    """What the args say of the head, by the name that the checkpoint has for it."""
    names = ("untie_embeddings_and_output_weights", "share_embeddings_and_output_weights")
    said = next((f"{name} {files.args[name]!r}" for name in names if files.args.get(name) is not None), None)
    if files.dialect is not MEGATRON_CORE or said is None:
        return ""
    return f": its args say {said}; was the copy complete, and are they this model's args?"


def _warnings(
    files: RankFiles | DistCheckpoint, resolved: megatron_args.Resolved, args: Mapping[str, Any],
    said: Mapping[str, Any] | None,
) -> list[str]:  # fmt: skip
    """What was resolved and may not be what was trained."""
    config = resolved.config
    warnings = [*resolved.warnings, *rope_core.assumed_warnings(config, files.args)]
    if files.dialect is MEGATRON_CORE:
        warnings += rope_core.trained_warnings(config)
        warnings += hybrid.warnings(files.args) + moe.trained_warnings(args)
    for name in (said or {}).get("assumed", []):
        if resolved.origins.get(name) == "manifest":
            flag, value = megatron_args.NAMES[name], getattr(config, name)
            warnings.append(f"{flag} {value} is not known, it was assumed for {config.family} by an earlier "
                            f"conversion; --{flag} overrides it")  # fmt: skip
    padded = files.args.get("padded_vocab_size")
    if padded is not None and padded != files.vocabulary:
        warnings.append(
            f"args say padded_vocab_size {padded}, the embedding has {files.vocabulary} rows, which are used"
        )
    return warnings


def _no_base(folder: Path) -> str:
    """The sentence for adapters where a model was expected."""
    path = folder / RUN_CONFIG
    base = pretrained(path) if fileio.is_file(path) else None
    named = f" ({RUN_CONFIG} names {base})" if base else ""
    return (
        f"{folder} holds adapters alone, without the model that they belong to; give their base{named} with "
        "--input_dir and this folder with --adapter, or write them as PEFT's with --adapter_as peft"
    )


def _with_window(args: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """`args` with the window that the user states, for what a family may have."""
    return {**args, **({"sliding_window_size": flags["sliding_window"]} if "sliding_window" in flags else {})}


def claimed_families(args: Mapping[str, Any], said: Mapping[str, Any] | None) -> dict[str, str]:
    """What args and manifest (`said`) state: origin -> family, the ones to be trusted most first.

    Anyone may have called a model anything in its args (model_name), so names of no family do not count there.
    """
    claims = {}
    if (said or {}).get("family") is not None:
        claims["manifest"] = (said or {})["family"]
    if args.get("model_name") in FAMILIES:
        claims["args (model_name)"] = args["model_name"]
    if args.get("tokenizer_type") == "FalconTokenizer" or args.get("parallel_attn"):
        claims["args (parallel_attn)"] = "falcon"
    return claims


def _check_family(model: str, args: Mapping[str, Any], said: Mapping[str, Any] | None, root: Path) -> None:
    claims = claimed_families(args, said)
    if FAMILIES[model].norm != "rms" and args.get("use_rms_norm") and "args (parallel_attn)" not in claims:
        claims["args (use_rms_norm)"] = "llama2"
    for origin, family in claims.items():
        if family != model:
            raise ConversionError(f"--model {model} was given, but {root} holds a {family} model, say its {origin}")


def _family(
    model: str | None, files: RankFiles | DistCheckpoint, said: Mapping[str, Any] | None, root: Path,
    true_vocab_size: int | None, notes: list[str], flags: Mapping[str, Any], model_type: str | None,
) -> str:  # fmt: skip
    """`model` where it was given and nothing contradicts it, else what the checkpoint says or shows."""
    if model is not None:
        _check_family(model, files.args, said, root)
        return model
    rows = count(files, true_vocab_size, said).vocabulary.tokens
    features = with_flags(read_features(files.args, files.names, rows), flags)
    family, why = chosen_family(claimed_families(files.args, said), features, root, model_type)
    if family not in FAMILIES:
        raise ConversionError(f"{root} holds a {family} model ({why}), which is none of {', '.join(FAMILIES)}")
    notes.append(f"model      {family}, {why}")
    return family
