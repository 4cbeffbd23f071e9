"""What files show of experts at first sight: how many there are, and whether they are there twice."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from weights_conversion.config import ModelConfig
from weights_conversion.errors import ConversionError
from weights_conversion.layouts.placement import Placed
from weights_conversion.mapping.parameters import Architecture, named

_STACKED, _APART = re.compile(r"decoder\.layers\.(?!\d+\.)"), re.compile(r"decoder\.layers\.\d+\.")


def check_huggingface(architecture: Architecture, config: ModelConfig, tensors: Mapping[str, Placed]) -> None:
    """Raises ConversionError for layers whose experts are there one by one and packed, and for another number of them.

    What is missing or too many in single layers is left to the search, which names each.
    """
    if config.moe is None:
        return
    alone = _alone(architecture, config, tensors)
    problems = [
        f"the source holds the experts of layer {layer} twice, one by one ({one}) and packed ({packed}); remove one of "
        "the two"
        for layer, packed in _packed(architecture, config, tensors)
        if (one := alone.get(layer, {}).get(0)) is not None
    ]
    if problems:
        raise ConversionError(problems[0] + (f" (and {len(problems) - 1} more layers)" if len(problems) > 1 else ""))
    counts = {layer: len(names) for layer, names in alone.items() if len(names) == max(names) + 1}
    if len(counts) == len(alone) and len(set(counts.values())) == 1:
        (count,) = set(counts.values())
        if count != config.moe.num_experts:
            name = next(iter(alone.values()))[count - 1]
            raise ConversionError(
                f"the config says {config.moe.num_experts} experts, where each layer of the source has {count} ({name} "
                "is the last); mend its config.json, or give the model's whole files"
            )


def _alone(architecture: Architecture, config: ModelConfig, names: Collection[str]) -> dict[int, dict[int, str]]:
    """Layer -> number of an expert -> its first tensor's name, of experts with tensors of their own."""
    templates = [row.hf[0] for row in architecture.parameters(config) if "{expert}" in row.hf[0]]
    found: dict[int, dict[int, str]] = {}
    if not templates:
        return found
    pattern = re.escape(templates[0]).replace(r"\{layer\}", r"(\d{1,9})").replace(r"\{expert\}", r"(\d{1,9})")
    for name in names:
        if match := re.fullmatch(pattern, name):
            found.setdefault(int(match[1]), {})[int(match[2])] = name
    return found


def _packed(architecture: Architecture, config: ModelConfig, names: Collection[str]) -> Iterator[tuple[int, str]]:
    """(layer, name) of tensors that hold all experts of a layer, one for each."""
    rows = [row for row in architecture.parameters(config) if row.packed and "{expert}" in row.hf[0]]
    for layer in range(config.num_layers if rows else 0):
        whole = named(rows[0].packed[0].name, (layer, 0))
        if whole in names:
            yield layer, whole


def check_forms(names: Collection[str], where: str) -> None:
    """Raises ConversionError for layers that are there stacked and one by one, as of two checkpoints in one folder."""
    stacked = next((name for name in names if _STACKED.match(name)), None)
    apart = next((name for name in names if _APART.match(name)), None)
    if stacked is not None and apart is not None:
        raise ConversionError(
            f"{where} holds layers stacked ({stacked}) and layers one by one ({apart}), as if two checkpoints had been "
            "written into it; remove the tensors of one, or give the folder as training left it"
        )
