"""Experts and router between config.json, ModelConfig and Megatron-Core's args."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_families import CONFIGS, CORE, NAMES, families, from_args, read

from weights_conversion.config import Moe, Parallelism
from weights_conversion.configs import (
    core_args,
    core_foreign,
    hf_config,
    hf_parts,
    hf_write,
    manifest,
    megatron_args,
    moe,
    moe_layers,
)
from weights_conversion.errors import ConversionError
from weights_conversion.formats.stored_args import plain_args

__all__ = ["families"]
SPELLED_TWICE = {"rope_theta", "rope_scaling", "rope_parameters", "dtype"}


def written(family: str, base: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return hf_write.write_config(read(family, **changes), base or {}, "bfloat16")


def args_of(family: str, layer_freq: int | list[int] | None = None, **changes: Any) -> dict[str, Any]:
    """Args as Megatron-LM gives them back: plain."""
    config = read(family, **changes)
    args = core_args.write_args(
        config, Parallelism(), dtype=torch.bfloat16, divisible_by=1, ckpt_format="torch_dist", vocabulary=None,
        layer_freq=layer_freq,
    )  # fmt: skip
    return plain_args(argparse.Namespace(**args), Path("ckpt"))


EXPECTED = {
    "mixtral": Moe(4, 56, 2, (True, True)),
    "qwen2-moe": Moe(6, 20, 3, (True,) * 4, pre_softmax=True, shared_ffn_hidden_size=44, shared_gate=True),
    "qwen3-moe": Moe(4, 28, 2, (True,) * 4),
    "glm4-moe": Moe(
        4, 20, 2, (False, True, True), score_function="sigmoid", scaling_factor=2.5, expert_bias=True,
        shared_ffn_hidden_size=20,
    ),
    "deepseek-v2": Moe(6, 20, 3, (False, True, True), pre_softmax=True, shared_ffn_hidden_size=40),
    "deepseek-v3": Moe(
        6, 20, 2, (False, True, True), score_function="sigmoid", scaling_factor=2.5, expert_bias=True, num_groups=3,
        group_topk=1, shared_ffn_hidden_size=40,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", NAMES)
def test_the_experts_of_a_config(family: str) -> None:
    assert read(family).moe == EXPECTED[family]


@pytest.mark.parametrize("family", NAMES)
def test_written_as_the_source_had_it(family: str) -> None:
    source = CONFIGS[family]
    found = written(family, source)
    assert {key: found[key] for key in source.keys() - SPELLED_TWICE} == {
        key: value for key, value in source.items() if key not in SPELLED_TWICE
    }
    assert hf_config.read_config(family, found, CORE, "config.json") == read(family)


@pytest.mark.parametrize("family", NAMES)
def test_written_from_nothing(family: str) -> None:
    """What the class would take by default is stated, and what the source's own code wants."""
    found = written(family)
    assert hf_config.read_config(family, found, CORE, "config.json") == read(family)
    keys = ("scoring_func", "topk_method", "moe_layer_freq", "n_group", "topk_group", "norm_topk_prob")
    for key in CONFIGS[family].keys() & set(keys):
        assert found[key] == CONFIGS[family][key]
    assert ("num_experts" in found, "num_local_experts" in found) == {
        "mixtral": (False, True),
        "qwen2-moe": (True, False),
        "qwen3-moe": (True, True),  # transformers 5 writes the second, 4 reads the first
    }.get(family, (False, False))


@pytest.mark.parametrize("family", NAMES)
def test_transformers_reads_the_same(family: str, tmp_path: Path) -> None:
    """Every value, of a config that was made from nothing: a key that is missing or misspelled is its default there."""
    import transformers

    (tmp_path / "config.json").write_text(json.dumps(written(family)))
    stated = transformers.AutoConfig.from_pretrained(tmp_path)
    experts = EXPECTED[family]
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    assert {getattr(stated, name) for name in names if hasattr(stated, name)} == {experts.num_experts}
    assert stated.num_experts_per_tok == experts.topk
    normed = getattr(stated, "norm_topk_prob", True)
    assert normed != experts.pre_softmax
    for name, value in (
        ("routed_scaling_factor", experts.scaling_factor or 1.0),
        ("n_group", experts.num_groups or 1),
        ("topk_group", experts.group_topk or 1),
        ("first_k_dense_replace", experts.layers.index(True)),
        ("shared_expert_intermediate_size", experts.shared_ffn_hidden_size),
        ("num_mtp_layers", CONFIGS[family].get("num_nextn_predict_layers", 0)),
    ):
        assert getattr(stated, name, value) == value, name


@pytest.mark.parametrize("family", NAMES)
def test_through_args(family: str) -> None:
    assert from_args(family, args_of(family)) == read(family)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("qwen3-moe", {"num_experts": ..., "num_local_experts": 4}, {}),
        ("qwen3-moe", {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}, {}),  # Coder's
        ("mixtral", {"num_experts": 4, "num_local_experts": ...}, {}),
        ("glm4-moe", {"n_routed_experts": ..., "num_local_experts": 4}, {}),
        ("qwen3-moe", {"norm_topk_prob": ...}, {"pre_softmax": True}),
        ("qwen3-moe", {"decoder_sparse_step": 2}, {"layers": (False, True, False, True)}),
        ("qwen2-moe", {"mlp_only_layers": [0, 3]}, {"layers": (False, True, True, False)}),
        (
            "qwen3-moe",
            {"mlp_only_layers": [-1, 9]},
            {},
        ),  # layers that are not there, to transformers too
        ("deepseek-v3", {"n_group": 1}, {"num_groups": None, "group_topk": None}),
        ("deepseek-v3", {"first_k_dense_replace": 0}, {"layers": (True, True, True)}),
        ("deepseek-v2", {"n_group": 3}, {}),  # topk_method greedy: groups mean nothing
        (
            "deepseek-v2",
            {"n_group": 3, "topk_group": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16},
            {"num_groups": 3, "group_topk": 2, "scaling_factor": 16.0},
        ),
        ("mixtral", {"num_experts_per_tok": ...}, {}),  # two by default
    ],
)
def test_keys_of_other_models(family: str, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    """Read, and written back: over the source's config unchanged, and from nothing with the same meaning."""
    config = read(family, **changes)
    assert config.moe == dataclasses.replace(EXPECTED[family], **expected)
    source = {key: value for key, value in (CONFIGS[family] | changes).items() if value is not ...}
    again = hf_write.write_config(config, source, "bfloat16")
    assert {key: again[key] for key in source.keys() - SPELLED_TWICE} == {
        key: source[key] for key in source.keys() - SPELLED_TWICE
    }
    for found in (again, hf_write.write_config(config, {}, "bfloat16")):
        assert hf_config.read_config(family, found, CORE, "config.json") == config
    assert from_args(family, args_of(family, **changes)) == config


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen3-moe", {"num_local_experts": 8}, ["two values", "num_local_experts"]),
        ("qwen3-moe", {"num_experts": 0}, ["num_experts 0"]),
        ("qwen3-moe", {"num_experts_per_tok": 5}, ["5 experts per token"]),
        ("qwen3-moe", {"num_experts_per_tok": 1}, ["1 expert per token"]),
        ("qwen3-moe", {"use_qk_norm": False}, ["use_qk_norm False", "qwen3-moe models have True"]),
        ("qwen3-moe", {"attention_bias": True}, ["attention_bias True", "output a bias", "add_bias_linear"]),
        ("qwen2-moe", {"use_sliding_window": True}, ["use_sliding_window", "releases of transformers differ"]),
        ("qwen3-moe", {"use_sliding_window": 1.5, "sliding_window": 16}, ["use_sliding_window 1.5"]),
        ("qwen3-moe", {"use_sliding_window": True, "sliding_window": -1}, ["sliding_window -1"]),
        ("qwen2-moe", {"use_sliding_window": True, "max_window_layers": 9}, ["use_sliding_window"]),  # below, not above
        ("qwen3-moe", {"moe_intermediate_size": 28.0}, ["moe_intermediate_size 28.0"]),
        ("qwen3-moe", {"decoder_sparse_step": 0}, ["decoder_sparse_step 0"]),
        ("qwen3-moe", {"decoder_sparse_step": 8}, ["no layer with experts"]),
        ("qwen3-moe", {"mlp_only_layers": "0"}, ["mlp_only_layers '0'"]),
        ("qwen3-moe", {"hidden_act": "gelu"}, ["hidden_act 'gelu'"]),
        ("qwen3-moe", {"n_shared_experts": 1}, ["n_shared_experts 1"]),
        ("qwen2-moe", {"qkv_bias": "no"}, ["qkv_bias 'no'"]),
        ("mixtral", {"sliding_window": 0}, ["sliding_window 0"]),
        ("deepseek-v3", {"topk_method": "greedy"}, ["topk_method 'greedy'"]),
        ("deepseek-v2", {"topk_method": "noaux_tc"}, ["topk_method 'noaux_tc'"]),
        ("deepseek-v3", {"scoring_func": "softmax"}, ["scoring_func 'softmax'"]),
        ("deepseek-v3", {"norm_topk_prob": False}, ["norm_topk_prob False"]),
        ("deepseek-v2", {"norm_topk_prob": True}, ["norm_topk_prob True"]),
        ("deepseek-v3", {"n_group": 4}, ["6 experts", "4 groups"]),
        ("deepseek-v3", {"topk_group": 4}, ["4 groups per token"]),
        ("deepseek-v3", {"n_group": 1, "topk_group": 2}, ["2 groups per token", "1 group (n_group)"]),
        ("glm4-moe", {"n_group": 1, "topk_group": 2}, ["2 groups per token", "1 group (n_group)"]),
        ("deepseek-v3", {"n_group": 6, "topk_group": 2}, ["groups of 1 expert", "best 2"]),
        ("deepseek-v3", {"num_experts_per_tok": 3}, ["more than 1 groups hold"]),
        ("deepseek-v3", {"n_group": "3"}, ["n_group '3'"]),
        ("deepseek-v3", {"moe_layer_freq": 2}, ["moe_layer_freq 2"]),
        ("deepseek-v3", {"n_shared_experts": None}, ["n_shared_experts None"]),
        ("deepseek-v3", {"routed_scaling_factor": -1}, ["routed_scaling_factor -1"]),
        ("deepseek-v3", {"num_nextn_predict_layers": -1}, ["num_nextn_predict_layers"]),
        ("glm4-moe", {"first_k_dense_replace": 3}, ["no layer with experts"]),
        ("glm4-moe", {"partial_rotary_factor": 2}, ["partial_rotary_factor 2"]),
        ("glm4-moe", {"rope_parameters": {"partial_rotary_factor": 1.0}}, ["two values of partial_rotary_factor"]),
        ("qwen3-moe", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    ],
)
def test_refused_by_name(family: str, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConversionError) as caught:
        read(family, **changes)
    assert all(word in str(caught.value) for word in ["config.json", *words]), caught.value


def test_a_head_that_turns_in_part() -> None:
    """GLM's class turns half of each head where nothing says how much; both spellings are written."""
    assert read("glm4-moe", partial_rotary_factor=...).rotary_percent == 0.5
    whole = read("glm4-moe", partial_rotary_factor=..., rope_parameters={"partial_rotary_factor": 1.0})
    assert whole.rotary_percent == 1.0
    found = written("glm4-moe")
    assert (found["partial_rotary_factor"], found["rope_parameters"]["partial_rotary_factor"]) == (0.5, 0.5)
    assert args_of("glm4-moe")["rotary_percent"] == 0.5


def test_switches_that_a_config_decides() -> None:
    """GLM-4.5-Air has no norms of q and k, the large one has."""
    assert read("glm4-moe").qk_layernorm
    air = read("glm4-moe", use_qk_norm=False)
    assert (air.qk_layernorm, air.add_qkv_bias) == (False, True)
    assert hf_write.write_config(air, {}, "bfloat16")["use_qk_norm"] is False
    assert from_args("glm4-moe", args_of("glm4-moe", use_qk_norm=False)) == air
    assert read("qwen2-moe").add_qkv_bias  # by default
    assert hf_write.write_config(read("qwen2-moe", qkv_bias=False), {}, "bfloat16")["qkv_bias"] is False


LATENT = {
    **{"multi_latent_attention": True, "kv_lora_rank": 32, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64},
    **{"v_head_dim": 128, "group_query_attention": False},
}

# --- args -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen3-moe", {"moe_router_score_function": "sigmoid"}, ["moe_router_score_function"]),
        ("qwen3-moe", {"moe_router_score_function": "sqrtsoftplus"}, ["sqrtsoftplus"]),
        ("qwen3-moe", {"moe_router_topk_scaling_factor": 2.5}, ["moe_router_topk_scaling_factor 2.5"]),
        ("qwen3-moe", {"moe_router_num_groups": 2, "moe_router_group_topk": 1}, ["moe_router_num_groups"]),
        ("qwen3-moe", {"moe_router_enable_expert_bias": True}, ["moe_router_enable_expert_bias"]),
        ("qwen3-moe", {"moe_shared_expert_intermediate_size": 28}, ["moe_shared_expert_intermediate_size"]),
        ("qwen3-moe", {"moe_router_load_balancing_type": "sinkhorn"}, ["moe_router_load_balancing_type"]),
        ("qwen3-moe", {"moe_latent_size": 16}, ["moe_latent_size"]),
        ("qwen3-moe", {"moe_mlp_glu_interleave_size": 32}, ["moe_mlp_glu_interleave_size"]),
        ("qwen3-moe", {"moe_layer_freq": [1, 1]}, ["moe_layer_freq of 2 layers"]),
        ("qwen3-moe", {"moe_layer_freq": [1, 1, 2, 1]}, ["moe_layer_freq"]),
        ("qwen3-moe", {"moe_router_topk": 5}, ["5 experts per token"]),
        ("qwen3-moe", {"moe_router_topk": 1}, ["1 expert per token"]),
        ("qwen3-moe", {"moe_ffn_hidden_size": "28"}, ["moe_ffn_hidden_size '28'"]),
        ("qwen3-moe", {"num_experts": None}, ["without a mixture of experts"]),
        ("qwen3-moe", LATENT, ["multi_latent_attention is True"]),
        ("qwen3-moe", {"mtp_num_layers": 1}, ["mtp_num_layers"]),
        ("qwen3-moe", {"rotary_percent": 0.5}, ["rotary_percent"]),
        ("qwen3", {"num_experts": 4}, ["num_experts"]),
        ("qwen2-moe", {"moe_shared_expert_gate": False}, ["without a gate", "moe_shared_expert_gate"]),
        ("mixtral", {"moe_layer_freq": 2}, ["dense layers", "moe_layer_freq"]),
        ("mixtral", {"moe_router_pre_softmax": True}, ["moe_router_pre_softmax True"]),
        ("deepseek-v2", {"moe_router_pre_softmax": False}, ["moe_router_pre_softmax False"]),
        ("deepseek-v3", {"moe_layer_freq": [0, 1, 0]}, ["dense layers behind"]),
        ("deepseek-v3", {"moe_shared_expert_intermediate_size": 30}, ["size 30", "20"]),
        ("deepseek-v3", {"mtp_use_repeated_layer": True}, ["mtp_use_repeated_layer"]),
    ],
)
def test_args_refused_by_name(family: str, changes: dict[str, Any], words: list[str]) -> None:
    args = args_of("qwen3-moe" if family == "qwen3" else family) | changes
    with pytest.raises(ConversionError) as caught:
        from_args(family, args)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3-moe", {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [1, 2]}),
        ("qwen3-moe", {"moe_router_dtype": "fp64", "moe_z_loss_coeff": 1e-3, "moe_token_dispatcher_type": "alltoall"}),
        ("qwen3-moe", {"moe_expert_capacity_factor": 1.0, "moe_grouped_gemm": False}),
        ("qwen3-moe", {"moe_layer_freq": "([1]*4)"}),
        ("qwen3-moe", {"moe_router_topk_scaling_factor": 1.0, "moe_router_num_groups": 1, "moe_router_group_topk": 1}),
        ("qwen3-moe", {"num_experts": None, "num_moe_experts": 4}),  # Megatron-Bridge's name
        ("mixtral", {"ffn_hidden_size": 9}),  # no layer has it
        ("mixtral", {"moe_ffn_hidden_size": None}),  # Megatron-LM takes ffn_hidden_size
        ("deepseek-v3", {"moe_router_pre_softmax": True}),  # of a sigmoid it means nothing
        ("deepseek-v3", {"mtp_loss_scaling_factor": 0.3}),
    ],
)
def test_args_that_say_the_same(family: str, changes: dict[str, Any]) -> None:
    assert from_args(family, args_of(family) | changes) == read(family)


def test_scores_of_a_run_of_an_old_release() -> None:
    """Releases before 0.16 have no args for what they did not have."""
    new = ("moe_router_score_function", "moe_shared_expert_gate", "moe_router_topk_scaling_factor", "moe_layer_freq")
    args = {name: value for name, value in args_of("qwen3-moe").items() if name not in new}
    assert from_args("qwen3-moe", args) == read("qwen3-moe")


# --- the form of torch_dist's keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "override", "freq"),
    [
        ("qwen3-moe", None, 1),
        ("qwen3-moe", [1, 1, 1, 1], [1, 1, 1, 1]),
        ("qwen3-moe", 1, 1),
        ("deepseek-v3", None, [0, 1, 1]),
        ("deepseek-v3", [0, 1, 1], [0, 1, 1]),
    ],
)
def test_layer_freq_as_written(family: str, override: Any, freq: Any) -> None:
    assert moe_layers.core_layer_freq(read(family), override) == freq
    assert args_of(family, override)["moe_layer_freq"] == freq


def test_layers_of_another_model() -> None:
    """Qwen's sparse step of 2 is another set of layers than Megatron-Core's integer 2."""
    config = read("qwen3-moe", decoder_sparse_step=2)
    assert moe_layers.core_layer_freq(config) == [0, 1, 0, 1]
    with pytest.raises(ConversionError, match=r"--moe-layer-freq 2 says .*\[1\]\*1\+\[0\]\*1"):
        moe_layers.core_layer_freq(config, 2)
    with pytest.raises(ConversionError, match="of 3 layers"):
        moe_layers.core_layer_freq(config, [0, 1, 0])
    with pytest.raises(ConversionError, match="for models with experts"):
        moe_layers.core_layer_freq(dataclasses.replace(config, moe=None), 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("2", 2),
        ("[1,0,1]", [1, 0, 1]),
        ("([0]*1+[1]*2)", [0, 1, 1]),
        ("([1]*3+[0]*1)*2", [1, 1, 1, 0, 1, 1, 1, 0]),
        ("2*[0]+[1]", [0, 0, 1]),
        ("[0] * 3 + [1] * 1", [0, 0, 0, 1]),
        ("([0]+[1]*23)", [0] + [1] * 23),
    ],
)
def test_layer_freq_of_the_command_line(text: str, value: Any) -> None:
    assert moe_layers.parse_freq(text) == value
    if isinstance(value, list):
        assert moe_layers.parse_freq(moe_layers.pattern(value)) == value


@pytest.mark.parametrize(
    "text", ["", "one", "[1", "1]", "[1]*", "[1]+1", "[1]*[1]", "__import__('os')", "[1]*99999999", "(" * 5000 + "[1]",
             "-1", "1.5", "[[1]]", "[1][0]", "2+2"]
)  # fmt: skip
def test_malformed_layer_freq(text: str) -> None:
    with pytest.raises(ConversionError, match="--moe-layer-freq"):
        moe_layers.parse_freq(text)


# --- layers that predict further tokens, which the files decide -------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "stated", "held", "expected"),
    [
        ("glm4-moe", 1, 1, 1),
        ("glm4-moe", 1, 0, 0),  # as transformers writes a model that it has made: it saves no such layer
        ("glm4-moe", ..., 1, 1),
        ("deepseek-v3", 0, 0, 0),
        ("qwen3-moe", ..., 1, 0),  # the class knows none; the tensor is refused where rows are looked for
    ],
)
def test_further_layers_are_those_of_the_files(family: str, stated: Any, held: int, expected: int) -> None:
    config = read(family, num_nextn_predict_layers=stated)
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(config.num_layers + held)]
    found, notes = hf_parts.with_further_layers(hf_config.class_of(family), config, names)
    assert found.mtp_num_layers == expected
    assert bool(notes) == (stated == 1 and not held)


def test_further_layers_of_a_wrapper_that_stores_no_such_arg() -> None:
    names = ["mtp.layers.0.enorm.weight", "mtp.layers.1.enorm.weight", "decoder.layers.0.mlp.router.weight"]
    assert core_foreign.shown(names, {})["mtp_num_layers"] == 2
    assert core_foreign.shown([f"model.{name}" for name in names], {})["mtp_num_layers"] == 2
    assert "mtp_num_layers" not in core_foreign.shown(names, {"mtp_num_layers": 2})


# --- what training must be given --------------------------------------------------------------------------------------


def flags(family: str, **changes: Any) -> list[str]:
    return core_args.training_flags(read(family, **changes), torch.bfloat16)


def test_flags_that_are_not_restored() -> None:
    assert flags("mixtral") == ["--norm-epsilon 1e-05", "--rotary-base 1000000", "--moe-router-dtype fp32", "--bf16"]
    assert "--moe-shared-expert-gate" in flags("qwen2-moe")
    assert "--qk-layernorm" in flags("qwen3-moe")
    glm = flags("glm4-moe")
    assert {"--qk-layernorm", "--rotary-percent 0.5", "--mtp-num-layers 1"} <= set(glm)
    assert "--moe-router-num-groups 3 --moe-router-group-topk 1" in flags("deepseek-v3")


def test_groups_that_megatron_core_scores_otherwise() -> None:
    """Experts per token by groups per token are 2 in DeepSeek-V3, as they must be; in V2 too, where it must be 1."""
    assert core_args.training_warnings(read("deepseek-v3")) == []
    (other,) = core_args.training_warnings(read("deepseek-v3", topk_group=2, num_experts_per_tok=3))
    assert "its best 2 experts" in other
    grouped = {"topk_method": "group_limited_greedy", "n_group": 3, "q_lora_rank": 40}
    (v2,) = core_args.training_warnings(read("deepseek-v2", topk_group=1, num_experts_per_tok=2, **grouped))
    assert "its best expert" in v2
    assert core_args.training_warnings(read("deepseek-v2", topk_group=3, num_experts_per_tok=3, **grouped)) == []
    assert core_args.training_warnings(read("deepseek-v2", topk_group=2, num_experts_per_tok=2, **grouped)) == []


# --- the manifest -----------------------------------------------------------------------------------------------------


def stored(family: str, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """An import's manifest, with other values of its experts."""
    text = manifest.build(
        read(family), true_vocab_size=181, repository=None, revision=None, source_config=CONFIGS[family],
        generation_config=None, tokenizer=[],
    )  # fmt: skip
    content = json.loads(text)
    content["model"]["moe"] |= changes
    (tmp_path / manifest.NAME).write_text(json.dumps(content))
    found = manifest.find([tmp_path])
    assert found is not None
    return manifest.model_fields(found[1])


@pytest.mark.parametrize("family", NAMES)
def test_through_the_manifest(family: str, tmp_path: Path) -> None:
    fields = stored(family, tmp_path)
    assert {name: getattr(read(family), name) for name in fields if name != "vocab_size"} == fields


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"layers": 5}, "layers 5"), ({"topk": "2"}, "topk '2'"), ({"layers": ["x"]}, "layers"), ({"new": 1}, "moe")],
)
def test_a_manifest_that_was_edited(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=word):
        stored("qwen3-moe", tmp_path, **changes)


def resolved(family: str, args: dict[str, Any], imported: dict[str, Any]) -> megatron_args.Resolved:
    return megatron_args.resolve(family, core_args.normalise(args, Path("ckpt")), imported, {}, 181)


def test_training_outranks_the_import(tmp_path: Path) -> None:
    """Of a router's numbers it is warned; other experts are another model."""
    imported, args = stored("qwen3-moe", tmp_path), args_of("qwen3-moe")
    found = resolved("qwen3-moe", args | {"moe_router_topk": 3}, imported)
    assert found.config.moe == dataclasses.replace(EXPECTED["qwen3-moe"], topk=3)
    (warning,) = found.warnings
    assert "moe_router_topk 3 in the args and moe_router_topk 2 in the manifest" in warning
    with pytest.raises(ConversionError, match=r"num_experts 8 .* belongs to another model"):
        resolved("qwen3-moe", args | {"num_experts": 8}, imported)


def test_what_args_have_no_place_for_is_the_imports(tmp_path: Path) -> None:
    imported, args = stored("deepseek-v3", tmp_path), args_of("deepseek-v3")
    for name in ("moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor"):
        del args[name]
    found = resolved("deepseek-v3", args, imported)
    assert (found.config.moe, found.warnings) == (EXPECTED["deepseek-v3"], ())


def test_tokens_that_were_left_out_are_told() -> None:
    args = core_args.normalise(args_of("qwen3-moe") | {"moe_expert_capacity_factor": 1.25}, Path("ckpt"))
    assert "moe_expert_capacity_factor 1.25" in moe.trained_warnings(args)[0]
    assert moe.trained_warnings(core_args.normalise(args_of("qwen3-moe"), Path("ckpt"))) == []
