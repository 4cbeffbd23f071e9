"""The forward pass of Gemma 3 on both sides, against transformers; what it must notice."""

from __future__ import annotations

import json
from pathlib import Path

import gemma_models as gemma
import pytest
import torch
from conftest import GOLDEN
from golden_core import read_torch_dist
from safetensors.torch import load_file
from torch import Tensor

from weights_conversion.config import ModelConfig
from weights_conversion.configs import hf_config
from weights_conversion.mapping.dialects import MEGATRON_CORE
from weights_conversion.verification import conventions
from weights_conversion.verification.forward import trace
from weights_conversion.verification.linear import Weights
from weights_conversion.verification.whole import huggingface_weights

IDS = torch.arange(1, 41).view(1, -1) * 7 % 67
FAR = torch.arange(40) * 61


def config_of(folder: Path) -> ModelConfig:
    raw = json.loads((folder / "config.json").read_text())
    return hf_config.read_config("gemma3", raw, MEGATRON_CORE, "config.json")


def logits(config: ModelConfig, side: conventions.Convention, weights: Weights, positions: Tensor | None) -> Tensor:
    *_, (stage, _, found) = trace(config, side, weights, IDS, positions=positions)
    assert stage == "logits"
    return found[0]


def of_megatron(folder: Path, groups: int) -> Weights:
    whole = gemma.in_bridge(gemma.stored(folder), groups)

    def read(name: str, rows: slice | None) -> Tensor:
        start, _, rest = name.partition("layers.")
        layer, _, rest = rest.partition(".")
        tensor = whole[name] if not rest else whole[f"{start}layers.{rest}"][int(layer)]
        return tensor[rows or slice(None)]

    return read


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention", *["sliding_attention"] * 4]},
        {"layer_types": ["full_attention"] * 7},
        {"num_hidden_layers": 3},
        {"sliding_window": 1, "query_pre_attn_scalar": 8, "num_key_value_heads": 1},
        {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in gemma.ROPES}},
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "num_hidden_layers": 6},
    ],
    ids=lambda changes: ", ".join(changes) or "as published",
)
def test_logits_are_those_of_transformers(changes: dict, tmp_path: Path) -> None:
    made = gemma.model(**changes)
    with torch.no_grad():
        near, far = made(IDS).logits[0], made(IDS, position_ids=FAR[None]).logits[0]
    folder = gemma.write(tmp_path / "hf", made)
    config = config_of(folder)
    sides = {
        conventions.HF: huggingface_weights(folder),
        conventions.MEGATRON_CORE: of_megatron(folder, config.num_query_groups),
    }
    for side, weights in sides.items():
        assert (logits(config, side, weights, None) - near).abs().max() < 1e-5
        assert (logits(config, side, weights, FAR) - far).abs().max() < 1e-5
    assert near.std() > 0.1


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_bridge_stores_gives_the_logits_of_transformers() -> None:
    """By transformers' rules, with one epsilon for all norms."""
    case = GOLDEN / "bridge-gemma3"
    stored, _ = read_torch_dist(case / "megatron-bridge")

    def read(name: str, rows: slice | None) -> Tensor:
        start, _, rest = name.partition("layers.")
        layer, _, rest = rest.partition(".")
        return (stored[f"{start}layers.{rest}"][int(layer)] if rest else stored[name])[rows or slice(None)]

    ids = torch.tensor([json.loads((case / "ids.json").read_text())])
    *_, (_, _, found) = trace(config_of(case / "hf"), conventions.MEGATRON_CORE, read, ids)
    assert (found[0] - load_file(case / "logits.safetensors")["logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("within", [False, True])
def test_text_of_a_repository_with_vision(within: bool, tmp_path: Path) -> None:
    text, whole = gemma.write(tmp_path / "text"), gemma.with_vision(tmp_path / "whole", within)
    found = [logits(config_of(each), conventions.HF, huggingface_weights(each), None) for each in (text, whole)]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "field", ["rope_theta", "local_rope_theta", "rope_scaling_factor", "query_pre_attn_scalar", "sliding_window"]
)
def test_each_number_is_felt(field: str, tmp_path: Path) -> None:
    folder = gemma.write(tmp_path / "hf")
    config, weights = config_of(folder), huggingface_weights(folder)
    other = ModelConfig(**{**vars(config), field: 2 * getattr(config, field)})
    one, two = (logits(each, conventions.HF, weights, FAR) for each in (config, other))
    assert (one - two).abs().max() > 1e-3
