"""Opens a Megatron checkpoint of any kind, and decides what model it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights_conversion import manifest, megatron_args
from weights_conversion.config import FAMILIES, ConversionError, ModelConfig
from weights_conversion.dialects import MEGATRON_LLM
from weights_conversion.formats import torch_dist
from weights_conversion.formats.megatron import RankFiles, find_iteration, open_rank_files
from weights_conversion.formats.torch_dist import DistCheckpoint


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A Megatron checkpoint with the model that it holds: headers and args read, no data."""

    files: RankFiles | DistCheckpoint
    config: ModelConfig
    manifest: Mapping[str, Any] | None
    origins: Mapping[str, str]
    true_rows_known: bool
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def open_checkpoint(
    root: Path, model: str, *, load_iters: int | None = None, true_vocab_size: int | None = None,
    flags: Mapping[str, Any] | None = None,
) -> OpenedCheckpoint:  # fmt: skip
    """Finds the iteration, its layout and its ModelConfig, whose vocabulary is the rows to keep."""
    folder, iteration = find_iteration(root, load_iters)
    dist = (folder / torch_dist.METADATA).is_file()
    files = torch_dist.open_dist(folder, iteration) if dist else open_rank_files(folder, iteration)
    found = manifest.find([root, *trained_from(files.args)])
    said = found[1] if found else None
    _check_family(model, files.args, said, root)
    if files.dialect is MEGATRON_LLM and (problems := megatron_args.foreign(model, files.args)):
        raise ConversionError(*problems)
    notes: list[str] = []
    warnings: list[str] = []
    if found:
        notes.append(f"config     from {found[0]}")
    rows, known = _rows(files.vocabulary, true_vocab_size, said, notes)
    fields = manifest.model_fields(said) if said else None
    args = dict(files.args)
    if model == "falcon":  # the original's release files leave it out
        args["tie_embed_logits"] = not files.has_head()
    elif not files.has_head() and not args.get("tie_embed_logits"):
        raise ConversionError(f"{folder} has no output layer (lm_head) on its last stage, which {model} needs")
    resolved = megatron_args.resolve(model, args, fields, flags or {}, rows)
    warnings += resolved.warnings
    for name in (said or {}).get("assumed", []):
        if resolved.origins.get(name) == "manifest":
            flag, value = megatron_args.NAMES[name], getattr(resolved.config, name)
            warnings.append(f"{flag} {value} is not known, it was assumed for {model} by an earlier conversion; "
                            f"--{flag} overrides it")  # fmt: skip
    padded = files.args.get("padded_vocab_size")
    if padded is not None and padded != files.vocabulary:
        warnings.append(
            f"args say padded_vocab_size {padded}, the embedding has {files.vocabulary} rows, which are used"
        )
    return OpenedCheckpoint(files, resolved.config, said, resolved.origins, known, tuple(notes), tuple(warnings))


def trained_from(args: Mapping[str, Any]) -> list[Path]:
    """Folders that training named, where the import that it started from may have left its manifest."""
    load, vocab = args.get("load"), args.get("vocab_file")
    named = [Path(load)] if isinstance(load, str) and load else []
    return [*named, *([Path(vocab).parent] if isinstance(vocab, str) and vocab else [])]


def _check_family(model: str, args: Mapping[str, Any], said: Mapping[str, Any] | None, root: Path) -> None:
    claims = {"args (model_name)": args.get("model_name"), "manifest": (said or {}).get("family")}
    if args.get("tokenizer_type") == "FalconTokenizer" or args.get("parallel_attn"):
        claims["args (parallel_attn)"] = "falcon"
    elif args.get("use_rms_norm") and model == "falcon":
        claims["args (use_rms_norm)"] = "llama2"
    for origin, family in claims.items():
        if family is not None and family != model and (family in FAMILIES or origin != "args (model_name)"):
            raise ConversionError(f"--model {model} was given, but {root} holds a {family} model, say its {origin}")


def _rows(stored: int, flag: int | None, said: Mapping[str, Any] | None, notes: list[str]) -> tuple[int, bool]:
    """(vocabulary rows to keep, whether that is known to be the true number)."""
    recorded = (said or {}).get("true_vocab_size")
    rows = flag if flag is not None else recorded
    if rows is None:
        notes.append(
            f"vocabulary {stored} rows, all kept: nothing records the true number (--true_vocab_size gives it)"
        )
        return stored, False
    origin = "--true_vocab_size" if flag is not None else "the manifest"
    if not isinstance(rows, int) or not 0 < rows <= stored:
        raise ConversionError(f"{origin} says {rows} vocabulary rows, but the embedding has {stored}")
    cut = f", {stored - rows} padding rows left out" if rows < stored else ""
    notes.append(f"vocabulary {rows} rows by {origin}{cut}")
    return rows, True
