"""GPT-OSS of other configs than the published ones, from other layouts, and what is refused."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dist_files
import gpt_oss_models as oss
import pytest
import torch
import yaml
from golden_core import read_torch_dist
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ABSENT = object()
WINDOW, FULL = "sliding_attention", "full_attention"
EACH = ["--ckpt-format", "torch", "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2,
        "--expert-model-parallel-size", 2, "--expert-tensor-parallel-size", 1]  # fmt: skip


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oss.write(tmp_path_factory.mktemp("gpt-oss") / "hf")


@pytest.fixture(scope="module")
def megatron(hf: Path, tmp_path_factory: pytest.TempPathFactory, to_megatron) -> Path:
    out = tmp_path_factory.mktemp("gpt-oss") / "mt"
    to_megatron("gpt-oss", "--model-path", hf, "--out", out).succeeded()
    return out


def changed(source: Path, to: Path, config: dict[str, Any]) -> Path:
    shutil.copytree(source, to)
    stated = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps({key: each for key, each in stated.items() if each is not ABSENT}))
    return to


def trained(source: Path, to: Path, **args: Any) -> Path:
    """A checkpoint whose args say otherwise, without its manifest."""
    shutil.copytree(source, to)
    common = torch.load(to / "release" / "common.pt", weights_only=False)
    vars(common["args"]).update(args)
    torch.save(common, to / "release" / "common.pt")
    (to / "conversion_manifest.json").unlink()
    return to


def same(one: Path, two: Path) -> bool:
    a, b = oss.stored(one), oss.stored(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], tensor) for name, tensor in b.items())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"attention_bias": False}, ("attention_bias False",)),
        ({"swiglu_alpha": 1.5}, ("swiglu_alpha 1.5",)),
        ({"swiglu_limit": 0}, ("swiglu_limit 0", "positive")),
        ({"hidden_act": "gelu"}, ("hidden_act 'gelu'",)),
        ({"rope_parameters": ABSENT, "rope_scaling": None}, ("rope_scaling null", "state rope_parameters")),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, ("'linear'",)),
        ({"layer_types": [FULL]}, ("layer_types", "4 layers")),
        ({"layer_types": ["chunked_attention"] * 4}, ("chunked_attention",)),
        ({"sliding_window": None}, ("no sliding_window",)),
        ({"sliding_window": 0}, ("sliding_window 0",)),
        ({"num_experts_per_tok": 5}, ("5 experts per token",)),
        ({"experts_per_token": 3}, ("two values of one field",)),
        ({"num_local_experts": 8}, ("[4, 32, 48]", "[8, 32, 48]")),
        ({"intermediate_size": 32}, ("[4, 32, 48]", "[4, 32, 64]")),
        ({"model_type": "gptoss"}, ("gptoss",)),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_configs_that_are_refused(config: dict[str, Any], words: tuple[str, ...], hf, to_megatron, tmp_path) -> None:
    source = changed(hf, tmp_path / "hf", config)
    to_megatron("gpt-oss", "--model-path", source, "--out", tmp_path / "mt").refused(*words)
    assert not (tmp_path / "mt").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": ABSENT, "rope_theta": 150000, "swiglu_limit": ABSENT, "layer_types": ABSENT},
        {"sliding_window": None, "layer_types": [FULL] * 4},
        {"layer_types": [WINDOW] * 4},
        {"layer_types": [WINDOW, WINDOW, FULL, FULL], "swiglu_limit": 5.0},
        {"layer_types": [WINDOW, WINDOW, WINDOW, FULL], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ],
    ids=["nothing said", "no window", "windows alone", "windows first", "each fourth without"],
)
def test_configs_survive(config: dict[str, Any], hf: Path, to_megatron, to_hf, tmp_path: Path) -> None:
    """Also where no manifest says what the source said; --verify compares with what transformers reads."""
    from transformers import AutoConfig

    source = changed(hf, tmp_path / "hf", config)
    to_megatron("gpt-oss", "--model-path", source, "--out", tmp_path / "mt", "--verify").succeeded()
    (tmp_path / "mt" / "conversion_manifest.json").unlink()
    result = to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
    assert ("clamp at 7 whatever" in result.text) is ("swiglu_limit" in config and config["swiglu_limit"] == 5.0)
    assert same(tmp_path / "out", source)
    found, wanted = (AutoConfig.from_pretrained(path) for path in (tmp_path / "out", source))
    for name in ("layer_types", "swiglu_limit", "num_experts_per_tok", "head_dim"):
        assert getattr(found, name) == getattr(wanted, name)
    found.rope_parameters.pop("type", None)
    assert found.rope_parameters == wanted.rope_parameters
    assert found.sliding_window == wanted.sliding_window or WINDOW not in wanted.layer_types


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"softmax_type": "vanilla"}, ("softmax_type 'vanilla'", "learnable")),
        ({"softmax_type": "off-by-one"}, ("softmax_type 'off-by-one'",)),
        ({"glu_linear_offset": 0.0}, ("glu_linear_offset 0.0",)),
        ({"activation_func_clamp_value": None}, ("without a clamped activation",)),
        ({"swiglu": True, "quick_geglu": False}, ("swiglu True", "quick_geglu False")),
        ({"window_attn_skip_freq": [1, 0]}, ("window_attn_skip_freq [1, 0]", "4 layers")),
        ({"window_attn_skip_freq": 0}, ("window_attn_skip_freq 0",)),
        ({"moe_router_pre_softmax": True}, ("moe_router_pre_softmax True",)),
        ({"moe_router_score_function": "sigmoid"}, ("sigmoid",)),
        ({"squared_relu": True}, ("squared ReLU",)),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_args_that_are_refused(args: dict[str, Any], words: tuple[str, ...], megatron, to_hf, tmp_path: Path) -> None:
    source = trained(megatron, tmp_path / "mt", **args)
    options = ("--model", "gpt-oss", "--input_dir", source, "--output_dir", tmp_path / "out", "--no_tokenizer")
    to_hf(*options).refused(*words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "kinds"),
    [
        ({"window_attn_skip_freq": 3}, [WINDOW, WINDOW, FULL, WINDOW]),
        ({"window_attn_skip_freq": None}, [WINDOW] * 4),
        ({"window_attn_skip_freq": 1}, [FULL] * 4),
        ({"window_size": None}, [FULL] * 4),
        ({"window_attn_skip_freq": [1, 1, 0, 0]}, [WINDOW, WINDOW, FULL, FULL]),
        ({"window_attn_skip_freq": "([0]*1+[1]*3)"}, [FULL, WINDOW, WINDOW, WINDOW]),
    ],
    ids=str,
)
def test_windows_that_were_trained(args: dict[str, Any], kinds: list[str], megatron, to_hf, tmp_path: Path) -> None:
    source = trained(megatron, tmp_path / "mt", **args)
    to_hf("--input_dir", source, "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == kinds
    assert config.get("sliding_window", 8) == 8


def test_other_families_have_none_of_it(megatron: Path, to_hf, tmp_path: Path) -> None:
    source = trained(megatron, tmp_path / "mt")
    to_hf("--model", "mixtral", "--input_dir", source, "--output_dir", tmp_path / "out", "--no_tokenizer").refused(
        "quick_geglu", "softmax_type", "mixtral"
    )


def test_layouts_from_layouts(hf: Path, megatron: Path, to_megatron, to_hf, tmp_path: Path) -> None:
    """One module for each expert, in ranks; torch_dist; the grouped kernels' names: each is verified."""
    here = megatron
    for number, options in enumerate((EACH, [], [*EACH, "--moe-grouped-gemm"])):
        out = tmp_path / str(number)
        to_megatron("gpt-oss", "--model-path", here, "--out", out, "--verify", *options).succeeded()
        here = out
    to_hf("--input_dir", here, "--output_dir", tmp_path / "out", "--no_tokenizer", "--verify",
          "--num_output_shards", 3).succeeded()  # fmt: skip
    assert same(tmp_path / "out", hf)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"tie_word_embeddings": True}, EACH),
        ({"num_local_experts": 3, "hidden_size": 36, "head_dim": 10, "intermediate_size": 7, "num_hidden_layers": 3},
         []),
        ({"num_local_experts": 2}, ["--ckpt-format", "torch", "--tensor-model-parallel-size", 4,
                                    "--expert-tensor-parallel-size", 1, "--moe-grouped-gemm"]),
    ],
    ids=["tied, in ranks", "odd sizes", "two experts, more ranks than groups"],
)  # fmt: skip
def test_other_sizes(sizes: dict[str, Any], options: list[Any], to_megatron, to_hf, tmp_path: Path) -> None:
    source = oss.write(tmp_path / "hf", oss.model(**sizes))
    to_megatron("gpt-oss", "--model-path", source, "--out", tmp_path / "mt", "--verify", *options).succeeded()
    out = ("--output_dir", tmp_path / "out", "--no_tokenizer", "--verify")
    to_hf("--input_dir", tmp_path / "mt", *out).succeeded()
    assert same(tmp_path / "out", source)


EXPERTS = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.layers.1.mlp.router.bias"), "has no tensor model.layers.1.mlp.router.bias"),
        (lambda t: t.pop(f"{EXPERTS}.down_proj_bias"), f"has no tensor {EXPERTS}.down_proj_bias"),
        (lambda t: t.pop("model.layers.1.self_attn.sinks"), "has no tensor model.layers.1.self_attn.sinks"),
        (lambda t: t.update({f"{EXPERTS}.gate_up_proj": t[f"{EXPERTS}.gate_up_proj"].transpose(1, 2).contiguous()}),
         "gate_up_proj has shape [4, 48, 32], but its config says [4, 32, 48]"),
        (lambda t: t.update({f"{EXPERTS}.gate_up_proj_bias": torch.zeros(4, 47)}), "has shape [4, 47]"),
        (lambda t: t.update({f"{EXPERTS}.more": torch.zeros(3)}), f"has a tensor {EXPERTS}.more"),
    ],
)  # fmt: skip
def test_files_that_are_refused(change: Callable[[Any], Any], said: str, hf, to_megatron, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    result = to_megatron("gpt-oss", "--model-path", tmp_path / "hf", "--out", tmp_path / "mt").refused(said)
    assert result.err.count("model.layers.1.") == 1  # each once, however many experts there are


def test_megatron_bridge(hf: Path, to_megatron, to_hf, tmp_path: Path) -> None:
    out = tmp_path / "mt"
    to_megatron("gpt-oss", "--model-path", hf, "--out", out, "--target", "megatron-bridge", "--verify").succeeded()
    said = yaml.safe_load((out / "iter_0000000" / "run_config.yaml").read_text())["model"]
    quick = "megatron.core.fusions.fused_bias_geglu.quick_gelu"
    assert said["activation_func"] == {"_call_": False, "_target_": quick}
    fields = {"add_bias_linear": True, "add_qkv_bias": True, "gated_linear_unit": True, "glu_linear_offset": 1.0,
              "activation_func_clamp_value": 7.0, "softmax_type": "learnable", "window_size": [7, 0],
              "window_attn_skip_freq": 2, "yarn_correction_range_round_to_int": False}  # fmt: skip
    assert {name: said[name] for name in fields} == fields
    (out / "conversion_manifest.json").unlink()
    to_hf("--input_dir", out, "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
    assert same(tmp_path / "out", hf)


def of_fsdp(hf: Path, megatron: Path, to: Path, cut: bool) -> Path:
    """As Megatron-FSDP writes it: live names, float32; linear_fc1 in one, or cut as of a SwiGLU."""
    tensors = {f"model.module.{name}": tensor.float() for name, tensor in oss.in_megatron(oss.stored(hf)).items()}
    if cut:
        for name in [name for name in tensors if ".experts.linear_fc1." in name]:
            tensors[f"{name}_w"], tensors[f"{name}_v"] = tensors.pop(name).chunk(2)
    _, args = read_torch_dist(megatron)
    stated = argparse.Namespace(**{**args, "ckpt_format": "fsdp_dtensor", "params_dtype": torch.bfloat16})
    dist_files.write(
        to / "iter_0000005", {name: dist_files.whole(tensor) for name, tensor in tensors.items()},
        {"args": stated, "iteration": 5, "checkpoint_version": 3.0},
    )  # fmt: skip
    (to / "iter_0000005" / "metadata.json").unlink()
    (to / "latest_checkpointed_iteration.txt").write_text("5")
    return to


@pytest.mark.parametrize("cut", [False, True], ids=["linear_fc1 in one", "linear_fc1 cut"])
def test_megatron_fsdp(cut: bool, hf: Path, megatron: Path, to_hf, tmp_path: Path) -> None:
    source = of_fsdp(hf, megatron, tmp_path / "mt", cut)
    to_hf("--input_dir", source, "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
    assert same(tmp_path / "out", hf)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ckpt-format", "torch", "--tensor-model-parallel-size", 2], ("add --expert-tensor-parallel-size 1",)),
        (["--hybrid-layer-pattern", "*E*E*E*E"], ("window on some layers",)),
        (["--target", "megatron-llm"], ("Megatron-LLM cannot express",)),
        (["--ckpt-format", "torch", "--expert-model-parallel-size", 3], ("4 experts",)),
    ],
    ids=lambda value: str(value[-1]),
)
def test_layouts_that_are_refused(options: list[Any], words: tuple[str, ...], hf, to_megatron, tmp_path: Path) -> None:
    to_megatron("gpt-oss", "--model-path", hf, "--out", tmp_path / "mt", *options).refused(*words)
    assert not (tmp_path / "mt").exists()


def test_a_hybrid_counts_its_own_layers(hf: Path, to_megatron, to_hf, tmp_path: Path) -> None:
    """Every layer is two in a HybridModel, so that 2 there means a window on each, and 4 layers need a list of 8."""
    source = changed(hf, tmp_path / "hf", {"layer_types": [FULL] * 4})
    options = ("--out", tmp_path / "mt", "--hybrid-layer-pattern", "*E*E*E*E")
    to_megatron("gpt-oss", "--model-path", source, *options).succeeded()
    for number, (freq, kinds) in enumerate(((2, [WINDOW] * 4), ([1, 0, 0, 1, 1, 1, 0, 1], [WINDOW, FULL, WINDOW, FULL]),
                                            (3, [WINDOW, FULL, WINDOW, WINDOW]))):  # fmt: skip
        made = trained(tmp_path / "mt", tmp_path / str(number), window_size=(7, 0), window_attn_skip_freq=freq)
        out = tmp_path / f"out-{number}"
        to_hf("--input_dir", made, "--output_dir", out, "--no_tokenizer").succeeded()
        assert json.loads((out / "config.json").read_text())["layer_types"] == kinds


def adapters_of(base: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A checkpoint with LoRA adapters of Megatron's beside its weights."""
    tensors, args = read_torch_dist(base)
    change(tensors)
    dist_files.write(to / "iter_0000005", {name: dist_files.whole(tensor) for name, tensor in tensors.items()})
    torch.save({"args": argparse.Namespace(**args), "iteration": 5, "checkpoint_version": 3.0},
               to / "iter_0000005" / "common.pt")  # fmt: skip
    (to / "latest_checkpointed_iteration.txt").write_text("5")
    return to


def test_adapters_of_experts(megatron: Path, to_hf, tmp_path: Path) -> None:
    below, above = torch.randn(4, 4, 2, 32), torch.randn(4, 4, 48, 2)
    name = "decoder.layers.mlp.experts.experts.linear_fc1.adapter.linear_"

    def with_adapters(tensors: dict[str, Any]) -> None:
        tensors |= {f"{name}in.weight": below, f"{name}out.weight": above}

    source = adapters_of(megatron, tmp_path / "mt", with_adapters)
    plain = ("--input_dir", source, "--no_tokenizer", "--adapter_alpha", 2)
    to_hf(*plain, "--output_dir", tmp_path / "peft", "--adapter_as", "peft").refused("adapters of experts", "merged")
    to_hf(*plain, "--output_dir", tmp_path / "out").succeeded()
    to_hf("--input_dir", megatron, "--output_dir", tmp_path / "base", "--no_tokenizer").succeeded()
    found, base = oss.stored(tmp_path / "out"), oss.stored(tmp_path / "base")
    for layer in range(4):
        matrix = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        added = above[layer] @ below[layer]  # experts, [gate; up], hidden
        turned = torch.stack([added[:, :24], added[:, 24:]], dim=2).flatten(1, 2).transpose(1, 2)
        assert torch.equal(found[matrix], (base[matrix].float() + turned).to(torch.bfloat16))
    assert all(torch.equal(found[key], tensor) for key, tensor in base.items() if not key.endswith("gate_up_proj"))


def test_packed_experts_that_are_rounded_are_proved(tmp_path: Path, to_megatron) -> None:
    made = oss.model(rope_parameters={"rope_type": "default", "rope_theta": 150000.0})
    made.float().save_pretrained(tmp_path / "hf")
    for path in (tmp_path / "hf").glob("*.safetensors"):
        save_file({name: tensor * 1.001 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    to_megatron(
        "gpt-oss", "--model-path", tmp_path / "hf", "--out", tmp_path / "mt", "--dtype", "bfloat16", "--verify"
    ).succeeded()
