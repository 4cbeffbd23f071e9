"""Latent attention and its yarn between config.json, ModelConfig and Megatron-Core's args."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_families import CONFIGS, CORE, families, from_args, read
from test_moe_config import args_of

from weights_conversion.config import Mla
from weights_conversion.configs import core_args, hf_config, hf_write, rope_core, rope_latent
from weights_conversion.errors import ConversionError
from weights_conversion.verification.rope import frequencies

__all__ = ["families"]
YARN = CONFIGS["deepseek-v2"]["rope_scaling"]


def scaled(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (YARN | changes).items() if value is not ...}


def test_the_sizes_of_a_config() -> None:
    assert read("deepseek-v2").mla == Mla(28, 16, 8, 12)
    config = read("deepseek-v3")
    assert config.mla == Mla(28, 16, 8, 12, q_lora_rank=40)
    assert (config.head_dim, config.num_query_groups, config.qk_layernorm) == (8, 4, False)
    assert read("deepseek-v3", q_lora_rank=...).mla == Mla(28, 16, 8, 12, q_lora_rank=1536)  # the class's default
    assert read("deepseek-v3", num_key_value_heads=None).num_query_groups == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_lora_rank": 0}, ["kv_lora_rank 0"]),
        ({"q_lora_rank": "40"}, ["q_lora_rank '40'"]),
        ({"v_head_dim": None}, ["v_head_dim None"]),
        ({"num_key_value_heads": 2}, ["num_key_value_heads 2"]),
        ({"qk_head_dim": 32}, ["qk_head_dim 32"]),
        ({"head_dim": 16}, ["head_dim 16 and qk_rope_head_dim 8", "angles", "remove head_dim"]),
        ({"head_dim": None}, ["head_dim None and qk_rope_head_dim 8"]),  # transformers: hidden_size / heads
        ({"qk_rope_head_dim": 7}, ["7 rows have no rotary pairs"]),
        ({"attention_bias": True}, ["attention_bias True"]),
        ({"rope_interleave": False}, ["rope_interleave False"]),
        ({"rope_scaling": {"type": "yarn", "factor": 40, "mscale": -1}}, ["mscale -1"]),
    ],
)
def test_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConversionError) as caught:
        read("deepseek-v3", **changes)
    assert all(word in str(caught.value) for word in ["config.json", *words]), caught.value


def test_a_class_that_takes_no_head_dim() -> None:
    """DeepseekV2Config sets it to qk_rope_head_dim, whatever is stated."""
    assert read("deepseek-v2", head_dim=16) == read("deepseek-v2")


def test_keys_that_transformers_adds() -> None:
    """It writes the sum of a head's two parts, and the part that turns as head_dim."""
    config = read("deepseek-v3", qk_head_dim=24, head_dim=8)
    assert config == read("deepseek-v3")
    found = hf_write.write_config(config, {"head_dim": 4, "qk_head_dim": 9}, "bfloat16")
    assert (found["head_dim"], found["qk_head_dim"]) == (8, 24)
    assert "head_dim" not in hf_write.write_config(config, {}, "bfloat16")


# --- args -------------------------------------------------------------------------------------------------------------


def test_args_as_megatron_lm_writes_them() -> None:
    args = args_of("deepseek-v3")
    expected = {
        **{"multi_latent_attention": True, "q_lora_rank": 40, "kv_lora_rank": 28, "qk_head_dim": 16},
        **{"qk_pos_emb_head_dim": 8, "v_head_dim": 12, "kv_channels": 12, "qk_layernorm": True, "rope_type": "yarn"},
        **{"num_query_groups": 1, "group_query_attention": False, "position_embedding_type": "rope"},
        **{"rotary_scaling_factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0, "mtp_num_layers": 1},
    }
    assert {name: args[name] for name in expected} == expected
    assert args_of("deepseek-v3", rope_scaling=None)["rope_type"] == "rope"


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_channels": 128},  # idle there
        {"rope_type": None},  # yarn, unless it is said otherwise
        {"yarn_beta_fast": 8.0},  # of another attention
        {"rope_scaling_factor": 8.0},
        {"mla_down_proj_fusion": True},
        {"cache_mla_latents": True},
        {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1},  # Megatron-Bridge's
    ],
)
def test_args_that_say_the_same(changes: dict[str, Any]) -> None:
    assert from_args("deepseek-v3", args_of("deepseek-v3") | changes) == read("deepseek-v3")


def test_defaults_in_the_args_of_other_models() -> None:
    """Each file of Megatron-LM has sizes of latent attention; they count where it is on."""
    idle = {"kv_lora_rank": 32, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128, "q_lora_rank": None}
    assert from_args("qwen3-moe", args_of("qwen3-moe") | idle).mla is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"multi_latent_attention": False}, ["without latent attention"]),
        ({"qk_layernorm": False}, ["norms of the latents"]),
        ({"kv_lora_rank": None}, ["kv_lora_rank None"]),
        ({"group_query_attention": True, "num_query_groups": 2}, ["num_query_groups 2"]),
        ({"rope_type": "ntk"}, ["rope_type 'ntk'"]),
        ({"rope_type": "rope"}, ["rope_type 'rope'", "mscale_all_dim 1"]),
        ({"rotary_scaling_factor": "40"}, ["rotary_scaling_factor '40'"]),
        ({"rotary_seq_len_interpolation_factor": 4}, ["rotary_seq_len_interpolation_factor 4"]),
        ({"experimental_attention_variant": "dsa"}, ["experimental_attention_variant"]),
        ({"num_experts": None}, ["without a mixture of experts"]),
    ],
)
def test_args_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConversionError) as caught:
        from_args("deepseek-v3", args_of("deepseek-v3") | changes)
    assert all(word in str(caught.value) for word in words), caught.value


# --- yarn -------------------------------------------------------------------------------------------------------------


def core_yarn(factor: float, mscale: float, all_dim: float) -> tuple[float, float]:
    """(what cos and sin are multiplied by, what the softmax's scale is) as Megatron-Core computes them."""

    def m(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return m(mscale) / m(all_dim), m(all_dim) ** 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"mscale": 0.5},
        {"mscale": ..., "mscale_all_dim": ...},
        {"mscale": ...},
        {"mscale_all_dim": ...},
        {"mscale_all_dim": 0},
        {"attention_factor": 1.25},
        {"attention_factor": 1.25, "mscale_all_dim": ...},
    ],
)
def test_yarn_means_the_same_everywhere(changes: dict[str, Any]) -> None:
    """As transformers reads it, in Megatron-Core's args, and in the config.json of an export without a manifest."""
    source = scaled(**changes)
    config = read("deepseek-v2", rope_scaling=source)
    values = {key: value for key, value in source.items() if key != "type"}
    angles, on_angles = frequencies("yarn", dim=8, theta=10000, **values)
    softmax = core_yarn(40, 1, source.get("mscale_all_dim") or 0)[1]
    args = args_of("deepseek-v2", rope_scaling=source)
    found = core_yarn(args["rotary_scaling_factor"], args["mscale"], args["mscale_all_dim"])
    assert found == pytest.approx((on_angles, softmax), rel=1e-12)
    again = from_args("deepseek-v2", args)
    assert rope_core.completed(again.rope_scaling, config.rope_scaling, latent=True) == config.rope_scaling
    written = hf_write.write_config(again, {}, "bfloat16")["rope_parameters"]
    written = {key: value for key, value in written.items() if key not in ("rope_type", "rope_theta")}
    theirs, factor = frequencies("yarn", dim=8, theta=10000, **written)
    assert torch.equal(theirs, angles)
    assert factor == pytest.approx(on_angles, rel=1e-12)
    assert written.get("mscale_all_dim", 0) == (source.get("mscale_all_dim") or 0)


def test_the_files_of_the_hub_come_back_as_they_were() -> None:
    for family in ("deepseek-v2", "deepseek-v3"):
        again = hf_write.write_config(from_args(family, args_of(family)), {}, "bfloat16")["rope_scaling"]
        assert again == CONFIGS[family]["rope_scaling"] | {"rope_type": "yarn"}


def test_constants_of_megatron_core() -> None:
    """Kimi-K2's beta_fast of 1 is in no arg: it is warned of at an import, and the manifest's at an export."""
    kimi = read("deepseek-v3", rope_scaling=scaled(beta_fast=1, mscale=1, mscale_all_dim=1, factor=32))
    (warning,) = core_args.training_warnings(kimi)
    assert "beta_fast 1" in warning
    stated = from_args(
        "deepseek-v3", args_of("deepseek-v3", rope_scaling=scaled(beta_fast=1, mscale=1, mscale_all_dim=1, factor=32))
    ).rope_scaling
    assert stated is not None
    assert stated.beta_fast == 32
    assert rope_core.completed(stated, kimi.rope_scaling, latent=True) == kimi.rope_scaling
    # trained on with another factor: that counts, and the import's constants still do
    longer = rope_core.completed(dataclasses.replace(stated, factor=64.0), kimi.rope_scaling, latent=True)
    assert longer is not None
    assert (longer.factor, longer.beta_fast) == (64.0, 1.0)
    # Megatron-Bridge states them
    bridge = dataclasses.replace(stated, beta_fast=16.0)
    assert rope_latent.completed(bridge, stated) == bridge


def test_yarn_of_factor_one_is_plain_rope() -> None:
    args = args_of("deepseek-v3", rope_scaling=None) | {"rope_type": "yarn"}
    assert from_args("deepseek-v3", args).rope_scaling is None


def test_flags_and_warnings() -> None:
    flags = core_args.training_flags(read("deepseek-v2"), torch.bfloat16)
    assert flags == [
        *("--norm-epsilon 1e-06", "--rotary-base 10000", "--multi-latent-attention", "--kv-lora-rank 28"),
        *("--qk-head-dim 16", "--qk-pos-emb-head-dim 8", "--v-head-dim 12", "--qk-layernorm", "--rope-type yarn"),
        *("--rotary-scaling-factor 40", "--mscale 0.707", "--mscale-all-dim 0.707"),
        *("--moe-router-dtype fp32", "--bf16"),
    ]
    plain = core_args.training_flags(read("deepseek-v3", rope_scaling=None), torch.bfloat16)
    assert {"--rope-type rope", "--q-lora-rank 40", "--mtp-num-layers 1"} <= set(plain)
    assert not any("mscale" in flag for flag in plain)
    (first,) = core_args.training_warnings(read("deepseek-v2"))
    assert "0.19" in first
    (second,) = core_args.training_warnings(read("deepseek-v3", rms_norm_eps=1e-5))
    assert "epsilon" in second


def test_transformers_reads_the_same(tmp_path: Path) -> None:
    import transformers

    for family in ("deepseek-v2", "deepseek-v3"):
        config = read(family)
        written = hf_write.write_config(config, {}, "bfloat16")
        assert hf_config.read_config(family, written, CORE, "config.json") == config
        (tmp_path / "config.json").write_text(json.dumps(written))
        stated = transformers.AutoConfig.from_pretrained(tmp_path)
        for key in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            assert getattr(stated, key) == CONFIGS[family][key]
        assert stated.num_key_value_heads == 4
        assert stated.rope_parameters["mscale_all_dim"] == CONFIGS[family]["rope_scaling"]["mscale_all_dim"]
