"""What a checkpoint is, in the few words with which a report begins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

import torch

from weights_conversion.config import ModelConfig
from weights_conversion.formats.format import MegatronFiles
from weights_conversion.formats.iterations import iterations, named, number_of
from weights_conversion.layouts.placement import Placed


def of_files(kind: str, tensors: Iterable[Placed]) -> str:
    """A Hugging Face or Meta folder: its kind, and how many files hold its weights."""
    blocks = (block for placed in tensors for copy in placed.copies for block in copy)
    files = len({ref.file for block in blocks for ref in block.ref.stored})
    return f"{kind}, {files} file{'s' * (files > 1)}"


def of_megatron(root: Path, files: MegatronFiles) -> str:
    """A Megatron checkpoint: whose, its layout, and which of its iterations is read."""
    which = "release" if files.iteration == "release" else f"iteration {files.iteration}"
    there = []
    with contextlib.suppress(PermissionError):  # its iterations may be open, and it not to be listed
        there = [str(number_of(name)) for name in iterations(root)]
    return f"{files.dialect.name}, {files.layout}, {which}" + (f" (there are {named(there)})" if len(there) > 1 else "")


def as_trained(dtype: torch.dtype) -> str:
    """A note where the weights' type is that of training, since the checkpoint stores another."""
    return f"dtype      {dtype}, as trained; the checkpoint holds the optimizer's own (--dtype)"


def values(config: ModelConfig, origins: Mapping[str, str]) -> str:
    """Where each value of a model comes from: most of them as a number, the others by name.

    What a model has not (a bias, a window) is left out.
    """
    usual = {field.name: field.default for field in fields(config)}
    by_origin: dict[str, list[str]] = {}
    for name, origin in sorted(origins.items()):
        if origin != "flag" and getattr(config, name) in (usual[name], None, False):
            continue
        by_origin.setdefault(origin, []).append(name)
    first, *others = sorted(by_origin, key=lambda origin: -len(by_origin[origin]))
    said = [f"{len(by_origin[first])} from {_FROM.get(first, first)}"]
    said += [f"from {_FROM.get(origin, origin)}: {', '.join(by_origin[origin])}" for origin in others]
    return "; ".join(said)


_FROM = {"manifest": "the manifest", "args": "the args", "family": "the family's defaults", "flag": "flags"}
