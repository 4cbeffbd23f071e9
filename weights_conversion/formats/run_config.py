"""The YAML that stands in place of args: Megatron-Bridge's run_config.yaml, NeMo 2's context/model.yaml.

What they name is never imported or called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weights_conversion.errors import ConversionError
from weights_conversion.errors.text import short
from weights_conversion.files import fileio
from weights_conversion.files.owners import is_closed

RUN_CONFIG = "run_config.yaml"
MODEL_YAML = "model.yaml"
_FUNCTIONS = ("activation_func",)  # a function, however it is spelled
MAX_BYTES = 1_000_000  # real ones have some tens of thousands
# What makes a section the model's own: the outer one of newer releases holds it under a name such as `transformer`.
_SIZES = ("num_layers", "hidden_size")


def read_run_config(path: Path) -> dict[str, Any]:
    """The values that `path` states about its model, by Megatron-Core's names, those of the tokenizer among them."""
    content = _yaml(path)
    name = "config" if path.name == MODEL_YAML else "model"
    model = content.get(name) if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise ConversionError(f"{path} has no section `{name}`")
    stated: dict[str, Any] = {}
    problems: list[str] = []
    for section in (model, *_inner(model)):
        for key, value in section.items():
            plain = _plain(str(key), value)
            before = stated.get(str(key))
            if None not in (before, plain) and _differ(before, plain) and not str(key).startswith("_"):
                problems.append(f"{path} says {key} {short(before)} and {short(plain)} in two sections of `{name}`")
            if stated.get(str(key)) is None:
                stated[str(key)] = plain
    if problems:
        raise ConversionError(*problems)
    tokenizer = content.get("tokenizer")
    for key in ("tokenizer_type", "tokenizer_model", "vocab_file"):
        if isinstance(tokenizer, dict) and isinstance(tokenizer.get(key), str):
            stated.setdefault(key, tokenizer[key])
    if isinstance(tokenizer, dict) and path.name == MODEL_YAML:
        _nemo_tokenizer(stated, tokenizer, path)
    return stated


def read_peft(path: Path) -> dict[str, Any]:
    """What `path` states about adapters (Bridge's section `peft`, NeMo 2's `model_transform`); {} where nothing."""
    content = _yaml(path)
    section = "model_transform" if path.name == MODEL_YAML else "peft"
    said = content.get(section) if isinstance(content, dict) else None
    return {str(key): value for key, value in said.items()} if isinstance(said, dict) else {}


def pretrained(path: Path) -> str | None:
    """The base that Bridge's run_config.yaml names for adapters that it trained alone."""
    content = _yaml(path)
    section = content.get("checkpoint") if isinstance(content, dict) else None
    named = section.get("pretrained_checkpoint") if isinstance(section, dict) else None
    return named if isinstance(named, str) else None


def _nemo_tokenizer(stated: dict[str, Any], tokenizer: Mapping[Any, Any], path: Path) -> None:
    """NeMo 2 names a tokenizer's folder as seen from the folder around context/, or a repository."""
    for key in ("pretrained_model_name", "model_path"):
        name = tokenizer.get(key)
        if isinstance(name, str) and name:
            places = (path.parent.parent / name, path.parent / name)
            inside = next((place for place in places if not is_closed(place) and fileio.exists(place)), None)
            stated.setdefault("tokenizer_model", name if inside is None else str(inside))


def model_yaml(weights: Path) -> Path | None:
    """NeMo 2's statement of the model whose weights lie in `weights`: in context/ beside it, or, once, in it."""
    places = (weights.parent / "context", weights / "context", weights)
    return next((place / MODEL_YAML for place in places if fileio.is_file(place / MODEL_YAML)), None)


def _inner(model: Mapping[Any, Any]) -> list[dict[Any, Any]]:
    """The sections within `model` that state a transformer's sizes, where `model` does not do so itself."""
    if all(model.get(name) is not None for name in _SIZES):
        return []
    sections = [value for value in model.values() if isinstance(value, dict)]
    return [section for section in sections if all(section.get(name) is not None for name in _SIZES)]


def _plain(key: str, value: Any) -> Any:
    """An object that the file spells as `_target_` becomes its name (a spec the whole one); the rest stays."""
    if not isinstance(value, dict) or not isinstance(value.get("_target_"), str):
        return value
    if key.endswith("_spec"):
        return value["_target_"]
    if isinstance(value.get("_name_"), str):  # a member of an enumeration
        return value["_name_"]
    return value["_target_"].rpartition(".")[2] if value.get("_call_") is False or key in _FUNCTIONS else value


def _differ(one: Any, two: Any) -> bool:
    """Whether two values are not the same; of containers, whose parts may be shared, only the beginning counts."""
    containers = isinstance(one, (list, dict)) and isinstance(two, (list, dict))
    return short(one) != short(two) if containers else one != two


def _yaml(path: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ConversionError(f"{path} cannot be read without PyYAML; pip install pyyaml") from error

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):
        """Tags that YAML does not know (a set, an object of Python) become nothing: no value here is of such a kind.

        Merged keys (`<<`) are refused: a few lines of them can make more keys than any memory holds.
        """

        def flatten_mapping(self, node: Any) -> None:
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise yaml.YAMLError("it merges keys by <<, which no trainer writes")

    # As OmegaConf, which trainers read it with: YAML 1.1 takes 1e-05, without a point, for text.
    number = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    try:
        text = fileio.read_whole(path, MAX_BYTES).decode("utf-8")
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} cannot be read ({str(error)[:300]})") from error
