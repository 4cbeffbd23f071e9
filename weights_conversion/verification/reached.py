"""How many experts a forward pass asked for: those that no token reaches are not read, and not run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from weights_conversion.config import ModelConfig
from weights_conversion.verification.conventions import Convention

if TYPE_CHECKING:
    from torch import Tensor

    from weights_conversion.verification.linear import Weights


@dataclass(frozen=True)
class Read:
    """Weights that remember which tensors were asked for."""

    weights: Weights
    names: set[str] = field(default_factory=set)

    def __call__(self, name: str, rows: slice | None) -> Tensor:
        self.names.add(name)
        return self.weights(name, rows)

    def experts(self, config: ModelConfig, convention: Convention) -> tuple[int, int] | None:
        """(experts asked for, experts that there are), of all layers together; None: the model has none."""
        there = list(_experts(config, convention))
        return (sum(name in self.names for name in there), len(there)) if there else None


def _experts(config: ModelConfig, convention: Convention) -> Iterator[str]:
    """One tensor's name of each expert."""
    names = convention.names_for(config)
    if config.moe is None or names.experts is None:
        return
    for layer in range(config.num_layers):
        if config.moe.layers[layer]:
            prefix = names.layer.format(layer)
            yield from (prefix + names.experts.outer.format(number) for number in range(config.moe.num_experts))
