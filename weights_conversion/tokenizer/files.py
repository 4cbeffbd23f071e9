"""Where tokenizer files lie: which ones import keeps, and where export finds them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights_conversion import fileio
from weights_conversion.errors import ConversionError

MODEL, JSON, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
SPECIAL_MAP, ADDED, CHAT_TEMPLATE = "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"
TOKENIZER_FILES = (MODEL, JSON, CONFIG, SPECIAL_MAP, ADDED, CHAT_TEMPLATE)

# Asked only where no file is at hand. Falcon's is the one that Megatron-LLM itself always uses.
REPOSITORIES = {
    "codellama": "codellama/CodeLlama-7b-hf",
    "falcon": "tiiuae/falcon-40b",
    "llama": "huggyllama/llama-7b",
    "llama2": "meta-llama/Llama-2-7b-hf",
    "mistral": "mistralai/Mistral-7B-v0.1",
}

Fetch = Callable[[str, "Path | None"], Path]


@dataclass(frozen=True)
class Source:
    """The tokenizer files found: where, in words for the report, and each file by its usual name."""

    origin: str
    files: Mapping[str, Path]

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file's content, {} where there is none. Raises ConversionError where it is no JSON object."""
        if name not in self.files:
            return {}
        try:
            return fileio.read_json(self.files[name], fileio.MAX_TOKENIZER_BYTES)
        except ConversionError as error:
            raise ConversionError(f"{error}; mend it, or name another tokenizer with --vocab_file") from error

    def same_model(self, other: Source) -> bool:
        """Whether both hold a tokenizer.model, equal byte for byte."""
        mine, theirs = self.files.get(MODEL), other.files.get(MODEL)
        return mine is not None and theirs is not None and fileio.sha256(mine) == fileio.sha256(theirs)


def source_tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The tokenizer files of a Hugging Face or Meta folder; Meta's tokenizer.model may lie in its parent."""
    found = tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
    is_meta = (folder / "params.json").is_file() or any(folder.glob("consolidated.*.pth"))
    if is_meta and not any(path.name in (MODEL, JSON) for path in found) and (folder.parent / MODEL).is_file():
        return (folder.parent / MODEL, *found)
    return found


def open_source(path: Path, origin: str, family: str) -> Source | None:
    """The tokenizer at a file or folder, or None where there is no vocabulary for this family."""
    if path.is_file() and path.name not in (MODEL, JSON):
        source = Source(origin, {JSON if path.suffix == ".json" else MODEL: path})
    else:
        folder = path.parent if path.is_file() else path
        source = Source(origin, {file.name: file for file in source_tokenizer_files(folder)})
    return source if JSON in source.files or (MODEL in source.files and family != "falcon") else None


def with_settings(source: Source, others: Sequence[Source]) -> Source:
    """A lone tokenizer.model takes the settings of the first other place whose tokenizer.model is the same."""
    if {JSON, CONFIG} & set(source.files):
        return source
    for other in others:
        if {JSON, CONFIG} & set(other.files) and source.same_model(other):
            return Source(f"{source.origin}, with the settings in {other.origin}", {**other.files, **source.files})
    return source


def locate(
    family: str,
    checkpoint: Path,
    trained_with: str | None,
    vocab_file: Path | None,
    search: Sequence[Path],
    fetch: Fetch | None,
    cache_dir: Path | None,
) -> Source:
    """The tokenizer to export: --vocab_file, else the checkpoint's root, else the file of training, else `search`, else
    the family's own repository.

    Raises ConversionError where there is none, or where the checkpoint's root and training disagree on tokenizer.model.
    """
    wanted = JSON if family == "falcon" else f"{MODEL} or {JSON}"
    places = [(checkpoint, f"the checkpoint, {checkpoint}")]
    if trained_with and family != "falcon":
        places.append((Path(trained_with), f"training's vocab_file, {trained_with}"))
    recorded = len(places)
    places += [(folder, str(folder)) for folder in search]
    opened = [open_source(path, origin, family) for path, origin in places]
    found = [source for source in opened if source is not None]

    if vocab_file is not None:
        source = open_source(vocab_file, f"--vocab_file {vocab_file}", family)
        if source is None:
            what = (
                "a folder without" if vocab_file.is_dir() else "not there; expected a vocabulary file or a folder with"
            )
            raise ConversionError(f"--vocab_file {vocab_file} is {what} {wanted}; name the tokenizer of training.")
        return with_settings(source, found)
    models = [source for source in opened[:recorded] if source is not None and MODEL in source.files]
    if len(models) == 2 and not models[0].same_model(models[1]):
        raise ConversionError(
            f"{models[0].files[MODEL]} and {models[1].files[MODEL]}, which training used, are different; "
            "name the right one with --vocab_file."
        )
    if found:
        return with_settings(found[0], found[1:])

    looked = [str(path) for path, _ in places]
    reasons: tuple[str, ...] = ()
    # A recorded vocab_file that is gone was training's own choice: the family's usual tokenizer would be a guess.
    if fetch is not None and family in REPOSITORIES and recorded == 1:
        looked.append(REPOSITORIES[family])
        try:
            fetched = open_source(fetch(REPOSITORIES[family], cache_dir), f"{REPOSITORIES[family]}, downloaded", family)
        except ConversionError as error:
            fetched, reasons = None, error.problems
        if fetched is not None:
            return fetched
    raise ConversionError(
        f"no tokenizer for {family} found; looked for {wanted} in {', '.join(looked)}. Name the file or its "
        "folder with --vocab_file, or export the weights alone with --no_tokenizer.",
        *reasons,
    )
