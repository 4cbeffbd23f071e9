"""transformers' classes read the configs of models with experts; what the converter reads otherwise is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from moe_families import CONFIGS, NAMES, families, read

from weights_conversion.verification.hf_values import misread

__all__ = ["families"]


def folder(family: str, tmp_path: Path, **changes: Any) -> Path:
    raw = {key: value for key, value in (CONFIGS[family] | changes).items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path


@pytest.mark.parametrize("family", NAMES)
def test_read_as_transformers_reads_them(family: str, tmp_path: Path) -> None:
    assert misread(folder(family, tmp_path), read(family)) == ([], [])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", ["num_local_experts", "num_experts_per_tok", "rope_theta", "rms_norm_eps"]),
        ("qwen3-moe", ["norm_topk_prob", "num_experts", "moe_intermediate_size", "head_dim"]),
        ("qwen2-moe", ["norm_topk_prob", "shared_expert_intermediate_size", "decoder_sparse_step"]),
        ("glm4-moe", ["attention_bias", "use_qk_norm", "partial_rotary_factor", "n_shared_experts", "topk_group"]),
        ("deepseek-v3", ["kv_lora_rank", "routed_scaling_factor", "first_k_dense_replace", "norm_topk_prob"]),
    ],
)
def test_defaults_of_transformers_are_known(family: str, changes: list[str], tmp_path: Path) -> None:
    for key in changes:
        values = {key: ...} | ({"num_hidden_layers": 8} if key == "first_k_dense_replace" else {})
        assert misread(folder(family, tmp_path, **values), read(family, **values)) == ([], []), key


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("qwen3-moe", "topk", 3),
        ("qwen3-moe", "pre_softmax", True),
        ("qwen3-moe", "layers", (True, True, True, False)),
        ("qwen2-moe", "shared_ffn_hidden_size", 40),
        ("mixtral", "num_experts", 8),
        ("mixtral", "ffn_hidden_size", 48),
        ("glm4-moe", "scaling_factor", None),
        ("deepseek-v2", "num_groups", 2),
        ("deepseek-v3", "num_groups", None),
        ("deepseek-v3", "group_topk", 2),
        ("deepseek-v3", "shared_ffn_hidden_size", 20),
    ],
)
def test_a_value_of_the_router_that_is_read_otherwise(family: str, field: str, value: Any, tmp_path: Path) -> None:
    config = read(family)
    assert config.moe is not None
    wrong = dataclasses.replace(config, moe=dataclasses.replace(config.moe, **{field: value}))
    problems, _ = misread(folder(family, tmp_path), wrong)
    word = "norm_topk_prob" if field == "pre_softmax" else field
    assert [problem.split()[0] for problem in problems] == [word]


def test_other_values_that_are_read_otherwise(tmp_path: Path) -> None:
    config = read("deepseek-v3")
    assert config.mla is not None
    assert config.rope_scaling is not None
    same_angles = dataclasses.replace(config.rope_scaling, mscale=2.0, mscale_all_dim=2.0)
    for family, wrong, word in (
        ("glm4-moe", {"qk_layernorm": False}, "qk_layernorm"),
        ("glm4-moe", {"rotary_percent": 1.0}, "rope"),
        ("deepseek-v3", {"mla": dataclasses.replace(config.mla, v_head_dim=8)}, "v_head_dim"),
        ("deepseek-v3", {"rope_scaling": dataclasses.replace(config.rope_scaling, beta_fast=1.0)}, "rope"),
        ("deepseek-v3", {"rope_scaling": dataclasses.replace(config.rope_scaling, mscale=2.0)}, "rope"),
        # the angles are the same, the softmax's scale is not
        ("deepseek-v3", {"rope_scaling": same_angles}, "rope"),
    ):
        problems, _ = misread(folder(family, tmp_path), dataclasses.replace(read(family), **wrong))
        assert [problem.split()[0] for problem in problems] == [word]


@pytest.mark.parametrize(
    ("family", "further"),
    [
        ("mixtral", {"norm_topk_prob": False, "mlp_only_layers": [1], "moe_intermediate_size": 7, "swiglu_limit": 3.0}),
        ("qwen3-moe", {"first_k_dense_replace": 1, "routed_scaling_factor": 9.0, "swiglu_limit": 3.0}),
        ("deepseek-v3", {"mlp_only_layers": [1], "decoder_sparse_step": 2, "swiglu_limit": 3.0}),
    ],
)
def test_keys_of_other_families_are_nothing_to_a_class(family: str, further: dict[str, Any], tmp_path: Path) -> None:
    """A config.json may hold any key: transformers carries those that its class does not have, and ignores them."""
    assert misread(folder(family, tmp_path, **further), read(family)) == ([], [])
