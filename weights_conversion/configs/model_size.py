"""How many parameters a model has, and whether that is the size by which it goes."""

from __future__ import annotations

from math import prod

from weights_conversion.architectures import FAMILIES
from weights_conversion.config import ModelConfig
from weights_conversion.errors import ConversionError


def parameter_count(config: ModelConfig) -> int:
    return sum(prod(each.row.megatron_shape(config)) for each in FAMILIES[config.family].instances(config))


def _billions(size: str) -> float:
    """Of parameters, as a size's name has them: "70", or "8x7" of experts that share the rest."""
    return prod(float(number) for number in size.split("x"))


def check(config: ModelConfig, size: str) -> None:
    """A size in billions is a round name, off by up to a quarter (Llama "1B" has 1.24): the family's nearest."""
    billions = parameter_count(config) / 1e9
    nearest = min(FAMILIES[config.family].repositories, key=lambda name: abs(_billions(name) / billions - 1))
    if nearest != size or abs(billions - _billions(size)) > _billions(size) / 4:
        raise ConversionError(
            f"--size {size} was given, but this checkpoint's config makes a model of {billions:.3g} billion parameters "
            f"({config.num_layers} layers of hidden size {config.hidden_size}); leave --size out or correct it"
        )
