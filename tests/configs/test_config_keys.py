"""What a config.json and a params.json state, leave out, state twice, or ask for beyond what is known."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
from megatron_files import read_checkpoint
from test_config_round_trip import auto_meaning

from weights_conversion.configs import foreign_keys
from weights_conversion.configs.hf_keys import CONFIG_CLASSES, GENERIC

LLAMA = replace(tm.MODELS["llama2"], name="keys", eps=1e-6, max_positions=2048)
SPELLED_OTHERWISE = {"rope_theta", "rope_scaling", "rope_parameters"}  # read by configs/rope.py


@pytest.mark.parametrize("name", CONFIG_CLASSES)
def test_defaults_are_those_of_transformers(name: str) -> None:
    """Every parameter of the installed release's class is known here, with the same default."""
    import transformers

    stem = name.removesuffix("ForCausalLM")  # beside which a repository with vision may have a class of its own
    kind = getattr(transformers, stem + "TextConfig", None) or getattr(transformers, stem + "Config")
    parameters = inspect.signature(kind.__init__).parameters
    known = CONFIG_CLASSES[name]
    assert [
        key
        for key in parameters
        if not known.knows(key) and key not in GENERIC | SPELLED_OTHERWISE | {"self", "kwargs", "layer_types"}
    ] == []
    for key, value in known.defaults.items():
        if key == "rope_theta":
            assert getattr(kind, "default_theta", None) or parameters[key].default == value
        elif key == "tie_word_embeddings" and key not in parameters:
            assert kind().tie_word_embeddings == value
        elif key == "sliding_window_pattern":  # of older releases, as the next one: an echo of the first is left
            assert kind()._sliding_window_pattern == value
        elif key == "rope_local_base_freq":
            assert kind().rope_parameters["sliding_attention"]["rope_theta"] == value
        elif (name, key) != ("Qwen2ForCausalLM", "head_dim"):
            assert parameters[key].default == value, key


def args_of(out: Path) -> Any:
    return vars(read_checkpoint(out).args)


@pytest.mark.parametrize(
    ("name", "absent", "found"),
    [
        ("llama", ["max_position_embeddings"], {"max_position_embeddings": 2048}),
        ("llama", ["rms_norm_eps", "rope_theta"], {"layernorm_epsilon": 1e-6, "rope_theta": 10000.0}),
        ("mistral-v0.1", ["sliding_window"], {"sliding_window_size": 4096}),
        ("mistral-v0.2", ["max_position_embeddings"], {"max_position_embeddings": 131072}),
        ("mistral-8", ["num_key_value_heads"], {"num_attention_heads_kv": 8}),
        ("falcon-7b", ["max_position_embeddings", "layer_norm_epsilon"], {"layernorm_epsilon": 1e-5}),
    ],
)
def test_absent_keys(name, absent, found, to_megatron, to_hf, tmp_path: Path) -> None:
    """What transformers takes is what the model is: the export, read back, says the same as the source."""
    extra = {"mistral-8": replace(tm.MODELS["mistral-v0.1"], name="mistral-8", heads=16, groups=8, head_dim=4)}
    model = (tm.MODELS | extra)[name]
    source = tm.write_huggingface(tmp_path / "hf", model, spelling=4, changes=dict.fromkeys(absent, ...))
    to_megatron(model.family, "--model-path", source, "--out", tmp_path / "mt", "--verify").succeeded()
    args = args_of(tmp_path / "mt")
    assert {key: args[key] for key in found} == found
    to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "out", "--model", model.family).succeeded()
    assert auto_meaning(tmp_path / "out") == auto_meaning(source)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}, "rope_theta": ...},
        {"rope_scaling": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": ...},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": ...},
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
    ],
)
def test_theta_is_read_wherever_it_stands(changes, to_megatron, tmp_path: Path) -> None:
    source = tm.write_huggingface(tmp_path / "hf", LLAMA, spelling=4, changes=changes)
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "mt", "--verify").succeeded()
    args = args_of(tmp_path / "mt")
    assert args["rope_theta"] == 5e5
    scaling = changes.get("rope_scaling") or {}
    assert args["rope_scaling_factor"] == scaling.get("factor", 1.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_theta": 5e5, "type": "linear", "factor": 2.0}}, ["rope_theta", "500000.0"]),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, ["rope_theta", "500000.0"]),
        ({"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}, ["rope_type 'default'"]),
        ({"rope_scaling": {"factor": 2.0}}, ["factor 2.0", "default"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "low_freq_factor": 4.0}}, ["low_freq_factor"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["full_attention"]),
        ({"sliding_window": 4096}, ["sliding_window 4096"]),
        ({"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping 50.0"]),
        ({"use_qk_norm": True}, ["use_qk_norm True"]),
        ({"residual_multiplier": 0.22}, ["residual_multiplier 0.22"]),
        ({"no_rope_layers": [1, 1, 1, 0]}, ["no_rope_layers"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ({"rotary_pct": 0.25}, ["rotary_pct 0.25"]),
        ({"use_scaled_rope": True}, ["use_scaled_rope"]),
        ({"clip_qkv": 8}, ["clip_qkv 8"]),
        ({"norm_type": "layernorm"}, ["norm_type"]),
        ({"num_local_experts": 8}, ["num_local_experts 8"]),
        ({"transformers_weights": "other.safetensors"}, ["other.safetensors"]),
        ({"max_position_embeddings": None}, ["max_position_embeddings None"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings 'no'"]),
    ],
)
def test_refused_by_name(changes, words, to_megatron, tmp_path: Path) -> None:
    source = tm.write_huggingface(tmp_path / "hf", LLAMA, spelling=4, changes=changes)
    result = to_megatron("llama2", "--model-path", source, "--out", tmp_path / "mt")
    result.refused("config.json", *words)
    assert not (tmp_path / "mt").exists()


def test_quantised_weights_are_refused(to_megatron, tmp_path: Path) -> None:
    changes = {"quantization_config": {"quant_method": "gptq"}}
    source = tm.write_huggingface(tmp_path / "hf", LLAMA, spelling=4, changes=changes)
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "mt").refused("quantised", "gptq")


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("mistral-v0.1", {"sliding_window": 0}, "sliding_window 0"),
        ("mistral-v0.1", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ("falcon-7b", {"n_embed": 4544}, "two values"),
        ("falcon-7b", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ],
)
def test_refused_by_name_in_other_families(name, changes, word, to_megatron, tmp_path: Path) -> None:
    model = tm.MODELS[name]
    source = tm.write_huggingface(tmp_path / "hf", model, spelling=4, changes=changes)
    to_megatron(model.family, "--model-path", source, "--out", tmp_path / "mt").refused("config.json", word)


def test_values_that_ask_for_nothing(to_megatron, to_hf, tmp_path: Path) -> None:
    """Features of other models, switched off, and how attention is computed; a key that nobody knows is reported."""
    changes = {
        "sliding_window": None, "attn_logit_softcapping": None, "qk_norm": False, "residual_multiplier": 1.0,
        "logit_scale": 1, "no_rope_layers": [1, 1], "rotary_pct": 1.0, "partial_rotary_factor": 1.0, "attn_scale": [],
        "hidden_act": "swish", "layer_types": ["full_attention"] * 2, "use_flash_attention_2": True,
        "attention_softmax_in_fp32": True, "rope_interleaved": False, "position_embedding_type": "rope",
        "neftune_noise_alpha": 5, "my_own_key": 3,
    }  # fmt: skip
    source = tm.write_huggingface(tmp_path / "hf", LLAMA, spelling=4, changes=changes)
    result = to_megatron("llama2", "--model-path", source, "--out", tmp_path / "mt", "--verify").succeeded()
    assert "'my_own_key'" in result.text
    to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "out", "--model", "llama2").succeeded()
    assert auto_meaning(tmp_path / "out") == auto_meaning(source)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"use_scaled_rope": True}, "use_scaled_rope True"),
        ({"rope_scaling_factor": 32}, "rope_scaling_factor 32"),
        ({"moe": {"num_experts": 8}}, "moe"),
        ({"sliding_window": 4096}, "sliding_window 4096"),
        ({"qk_norm": True}, "qk_norm True"),
        ({"head_dim": 32}, "head_dim 32"),
        ({"n_layers": -60}, "n_layers -60"),
        ({"n_layers": 0}, "n_layers 0"),
        ({"n_heads": -8}, "n_heads -8"),
        ({"n_kv_heads": -4}, "n_kv_heads -4"),
        ({"norm_eps": -1e-5}, "norm_eps -1e-05"),
        ({"rope_theta": -1.0}, "rope_theta -1.0"),
        ({"quantization_args": {"group_size": 32}}, "quantization_args"),
    ],
)
def test_params_refused_by_name(changes, word, to_megatron, tmp_path: Path) -> None:
    tm.write_meta(tmp_path / "meta", LLAMA, 1)
    params = tm.read_json(tmp_path / "meta" / "params.json")
    tm.write_json(tmp_path / "meta" / "params.json", params | changes)
    to_megatron("llama2", "--model-path", tmp_path / "meta", "--out", tmp_path / "mt").refused("params.json", word)


def test_verify_takes_an_absent_key_as_its_default(to_megatron, to_hf, tmp_path: Path) -> None:
    """Absent is 2048 to transformers: a checkpoint of 4096 positions is another model."""
    from conftest import run

    source = tm.write_huggingface(tmp_path / "hf", replace(LLAMA, max_positions=4096), spelling=4)
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "mt").succeeded()
    config = tm.read_json(source / "config.json")
    del config["max_position_embeddings"]
    tm.write_json(source / "config.json", config)
    result = run("weights_conversion.verify", source, tmp_path / "mt", "--model", "llama2")
    assert result.code == 1
    assert "max_position_embeddings" in result.text
    assert "2048" in result.text


def test_params_that_ask_for_nothing(to_megatron, tmp_path: Path) -> None:
    tm.write_meta(tmp_path / "meta", LLAMA, 1)
    params = tm.read_json(tmp_path / "meta" / "params.json")
    changes = {
        "use_scaled_rope": False,
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 256,
        "head_dim": 16,
        "max_seq_len": 8,
    }
    tm.write_json(tmp_path / "meta" / "params.json", params | changes)
    to_megatron("llama2", "--model-path", tmp_path / "meta", "--out", tmp_path / "mt").succeeded()


def test_manifest_with_a_foreign_key_is_refused(imported, to_hf, tmp_path: Path) -> None:
    """An import of an earlier release let it pass; the export must not carry it on."""
    import shutil

    root = shutil.copytree(imported("llama2"), tmp_path / "mt")
    manifest = tm.read_json(root / "conversion_manifest.json")
    manifest["config"]["attn_logit_softcapping"] = 30.0
    tm.write_json(root / "conversion_manifest.json", manifest)
    result = to_hf("--input_dir", root, "--output_dir", tmp_path / "out", "--model", "llama2")
    result.refused("conversion_manifest.json", "attn_logit_softcapping 30.0")


@pytest.mark.parametrize(
    ("key", "value", "changes"),
    [
        ("logit_scale", 1, False),
        ("logit_scale", 0.0625, True),
        ("qk_norm", True, True),
        ("qk_norm", 0, False),
        ("final_logit_softcapping", 1.0, True),
        ("sliding_window", 0, False),
        ("attention_dropout", 0.1, False),
        ("max_grad_norm", 1.0, False),
        ("property", 3, False),
        ("code_revision", "main", False),
        ("rope_theta_by_layer", {"0": 1e4}, True),
        ("activation_fn", "gelu", True),
        ("act", "gelu", True),
        ("compact", 3, False),
        ("use_rope", True, False),
        ("use_rope", False, True),
        ("use_rms_norm", True, False),
        ("rope_condense_ratio", 8, True),
        ("rope_condense_ratio", 1, False),
        ("ff_factor", 4, False),
    ],
)
def test_names_that_tell(key: str, value: Any, changes: bool) -> None:
    assert foreign_keys.changes_model(key, value) is changes
