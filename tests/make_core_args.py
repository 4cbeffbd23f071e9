"""Writes weights_conversion/configs/core_fields.json: which args there are in Megatron-LM, and which reach the model.

    pip download --no-deps --python-version 3.12 --only-binary=:all: -d WHEELS megatron-core==0.16.1 (and newer ones)
    python tests/make_core_args.py WHEELS/*.whl

The wheels' sources are parsed, never run. `model` holds every field of the configs that a GPTModel is built from, and
every arg that the functions which build it read, with the default in each release ("" where it has none, null where
it is not there). `training`
holds the names of all other args. Which of `model` change the forward pass is said in core_table.py, by hand.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path

TARGET = Path(__file__).parents[1] / "weights_conversion" / "configs" / "core_fields.json"
CONFIGS = {
    "megatron/core/model_parallel_config.py": ("ModelParallelConfig",),
    "megatron/core/transformer/transformer_config.py": ("TransformerConfig", "MLATransformerConfig"),
    "megatron/core/transformer/heterogeneous/heterogeneous_config.py": ("HeterogeneousTransformerConfig",),
    "megatron/training/models/gpt.py": ("GPTModelConfig",),
}
MODEL = ("megatron/core/models/gpt/gpt_model.py", "GPTModel")
BUILDERS = ("core_transformer_config_from_args", "gpt_config_from_args", "_apply_yarn_config_from_args")


def parsed(wheel: zipfile.ZipFile, name: str) -> ast.Module:
    return ast.parse(wheel.read(name))


def fields(tree: ast.Module, classes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(field, default as source) of dataclasses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name in classes:
            for part in node.body:
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    yield part.target.id, _default(part.value)


def _default(value: ast.expr | None) -> str:
    if isinstance(value, ast.Call):  # dataclasses.field(default=...)
        value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
    return "" if value is None else ast.unparse(value)


def parameters(tree: ast.Module, name: str) -> Iterator[tuple[str, str]]:
    """(parameter, default as source) of a class's __init__."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                    given = part.args.args[1:]
                    defaults = [None] * (len(given) - len(part.args.defaults)) + list(part.args.defaults)
                    yield from ((arg.arg, _default(value)) for arg, value in zip(given, defaults, strict=True))


def read_by_builders(tree: ast.Module) -> Iterator[str]:
    """Args that the functions read which build the model."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in BUILDERS:
            for part in ast.walk(node):
                if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "args":
                    yield part.attr


def parser_names(tree: ast.Module) -> Iterator[str]:
    """Names in args of what a module adds to a parser, and of the fields of its dataclasses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            named = next((word.value for word in node.keywords if word.arg == "dest"), None)
            first = node.args[0] if node.args else None
            for value in (named, first):
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value.lstrip("-").replace("-", "_")
                    break
        elif isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(part) for part in node.decorator_list):
            yield from (name for name, _ in fields(ast.Module([node], []), (node.name,)))
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "args"
        ):
            yield node.attr


def main(wheels: list[str]) -> None:
    model: dict[str, dict[str, str]] = {}
    training: set[str] = set()
    releases = []
    for path in wheels:
        release = re.split(r"-", Path(path).name)[1]
        releases.append(release)
        with zipfile.ZipFile(path) as wheel:
            names = set(wheel.namelist())
            for name, classes in CONFIGS.items():
                if name in names:
                    for field, default in fields(parsed(wheel, name), classes):
                        model.setdefault(field, {})[release] = default
            for field, default in parameters(parsed(wheel, MODEL[0]), MODEL[1]):
                model.setdefault(field, {}).setdefault(release, default)
            for name in sorted(names):
                if name.endswith(".py") and name.startswith(("megatron/training/", "megatron/core/")):
                    tree = parsed(wheel, name)
                    for field in read_by_builders(tree):
                        model.setdefault(field, {}).setdefault(release, "")
                    if name.startswith("megatron/training/") or name.endswith("config.py"):
                        training.update(parser_names(tree))
    rows = [
        f"  {json.dumps(name)}: {json.dumps([model[name].get(release) for release in releases])}"
        for name in sorted(model)
    ]
    others = textwrap.fill(", ".join(json.dumps(name) for name in sorted(training - set(model))), 118)
    TARGET.write_text(
        f'{{\n "releases": {json.dumps(releases)},\n "model": {{\n' + ",\n".join(rows) + "\n },\n"
        f' "training": [\n{textwrap.indent(others, "  ")}\n ]\n}}\n'
    )


if __name__ == "__main__":
    main(sorted(sys.argv[1:]))
