"""The forward pass of GPT-OSS on both sides, against transformers; what it must notice."""

from __future__ import annotations

import json
from pathlib import Path

import gpt_oss_models as oss
import pytest
import torch
from torch import Tensor

from weights_conversion.config import ModelConfig
from weights_conversion.configs import hf_config
from weights_conversion.mapping.dialects import MEGATRON_CORE
from weights_conversion.verification import conventions
from weights_conversion.verification.forward import trace
from weights_conversion.verification.whole import huggingface_weights

IDS = torch.arange(1, 49).view(1, -1) * 7 % 96
FAR = torch.arange(48) * 61


def config_of(folder: Path) -> ModelConfig:
    raw = json.loads((folder / "config.json").read_text())
    return hf_config.read_config("gpt-oss", raw, MEGATRON_CORE, "config.json")


def logits(config: ModelConfig, side: conventions.Convention, weights, positions: Tensor | None = None) -> Tensor:
    *_, (stage, _, found) = trace(config, side, weights, IDS, positions=positions)
    assert stage == "logits"
    return found[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
        {"layer_types": ["full_attention"] * 4},
        {"layer_types": ["sliding_attention"] * 4, "sliding_window": 3},
        {"intermediate_size": 32, "swiglu_limit": 0.5},
        {"tie_word_embeddings": True, "num_local_experts": 2, "num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
    ],
    ids=lambda changes: ", ".join(changes) or "as published",
)
def test_logits_are_those_of_transformers(changes: dict, tmp_path: Path) -> None:
    made = oss.model(**changes)
    made.config._attn_implementation = "eager"
    with torch.no_grad():
        near, far = made(IDS).logits[0], made(IDS, position_ids=FAR[None]).logits[0]
    folder = oss.write(tmp_path / "hf", made)
    config, theirs = config_of(folder), huggingface_weights(folder)
    whole = oss.in_megatron(oss.stored(folder), groups=config.num_query_groups)

    def ours(name: str, rows: slice | None) -> Tensor:
        return whole[name][rows or slice(None)].float()

    for side, weights in ((conventions.HF, theirs), (conventions.MEGATRON_CORE, ours)):
        found = [logits(config, side, lambda name, rows, w=weights: w(name, rows).float(), at) for at in (None, FAR)]
        assert (found[0] - near).abs().max() < 1e-5
        assert (found[1] - far).abs().max() < 1e-5
    assert near.std() > 0.1


@pytest.mark.parametrize(
    "part", ["sinks", "router.bias", "gate_up_proj_bias", "down_proj_bias", "o_proj.bias", "q_proj.bias"]
)
def test_each_bias_is_felt(part: str, tmp_path: Path) -> None:
    folder = oss.write(tmp_path / "hf")
    weights, config = huggingface_weights(folder), config_of(folder)

    def without(name: str, rows: slice | None) -> Tensor:
        return weights(name, rows).float() * (part not in name)

    whole = logits(config, conventions.HF, lambda name, rows: weights(name, rows).float())
    assert (logits(config, conventions.HF, without) - whole).abs().max() > 0.05
