"""What every format does, for whoever reads or writes it: it opens a folder, or plans one, whose files then finish.

A format never sees a family: what it writes comes to it located, under the names of a dialect. Its own options (ranks,
shards, a release to be readable by) are fields of the format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from weights_conversion.config import ModelConfig, Parallelism
from weights_conversion.layouts.placement import Located
from weights_conversion.layouts.plan import Plan
from weights_conversion.mapping.dialects import Dialect
from weights_conversion.mapping.parameters import Architecture
from weights_conversion.output.assembly import TargetFile

Opened_co = TypeVar("Opened_co", covariant=True)


@dataclass(frozen=True)
class Content:
    """A located model on its way into a format. `vocabulary`: rows to write; `dtype` None: each tensor's own.

    `args` are what Megatron's training is told of it.
    """

    architecture: Architecture
    config: ModelConfig
    located: Located = field(repr=False)
    source: Dialect
    target: Dialect
    vocabulary: int
    dtype: torch.dtype | None
    new_rows: str = "last"
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """What a format writes: the plan, the files of its tensors, and the small files that are part of the format."""

    plan: Plan
    targets: Sequence[TargetFile]
    files: Mapping[str, bytes | Path] = field(default_factory=dict)


class Format(Protocol[Opened_co]):
    """One format on disk. The files of a plan finish themselves: TargetFile has `create`, `find` and `finish`."""

    @property
    def name(self) -> str:
        """As --ckpt-format says it."""
        ...

    @property
    def keeps_crcs(self) -> bool:
        """Whether its files hold a CRC-32 of each tensor, which is then taken on the way."""
        ...

    def opens(self, folder: Path) -> bool:
        """Whether `folder` is of this format."""
        ...

    def open(self, folder: Path, iteration: int | str = "release", weights: str = "model") -> Opened_co:
        """Headers and args, no data. `weights` "master": the optimizer's in the places of the model's."""
        ...

    def plan(self, content: Content) -> Output:
        """Everything that is to be written, complete before a byte of it is."""
        ...


class MegatronFiles(Protocol):
    """An opened Megatron checkpoint, whichever format it is in."""

    @property
    def format(self) -> str: ...

    @property
    def folder(self) -> Path: ...

    @property
    def iteration(self) -> int | str: ...

    @property
    def dialect(self) -> Dialect: ...

    @property
    def args(self) -> Mapping[str, Any]: ...

    @property
    def parallel(self) -> Parallelism: ...

    @property
    def layout(self) -> str:
        """Its ranks, or its format where it has none, in a few words."""
        ...

    @property
    def names(self) -> set[str]: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def holds_model(self) -> bool:
        """False where there are adapters alone."""
        ...

    @property
    def said_by(self) -> Path | None:
        """The file that states the args, where that is not the one that holds the weights."""
        ...

    @property
    def trained_dtype(self) -> torch.dtype | None: ...

    def has_head(self) -> bool: ...

    def check_unread(self) -> None:
        """Raises ConversionError where what training loads, and no conversion reads, is not all there."""
        ...
