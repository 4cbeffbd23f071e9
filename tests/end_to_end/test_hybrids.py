"""Nemotron-H both ways, in every layout: state spaces, attention, MLPs and experts, each a layer of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hybrid_models as hm
import pytest
import torch
from conftest import REPOSITORY
from golden_core import read_ranks, read_torch_dist
from safetensors.torch import load_file, save_file

MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": hm.EXPERTS,
    "latent experts": hm.LATENT,
    "tied": {"tie_word_embeddings": True},
    "state spaces alone": {"hybrid_override_pattern": "MMM"},
    "no state space": {"hybrid_override_pattern": "*-*-"},
    "no attention": {"hybrid_override_pattern": "M-ME", **{k: v for k, v in hm.EXPERTS.items() if "pattern" not in k}},
    "experts alone": {**hm.EXPERTS, "hybrid_override_pattern": "EE"},
    "as many groups as heads": {"n_groups": 8},
    "one group": {"n_groups": 1},
    "groups of experts": {**hm.EXPERTS, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
    "float32": {"dtype": torch.float32},
    "rows in float32": {"float32": hm.FLOAT32},
}
RANKS = ("--ckpt-format", "torch")
LAYOUTS: dict[str, tuple[Any, ...]] = {
    "torch_dist": (),
    "0.19": ("--core-release", "0.19"),
    "tp2": (*RANKS, "--tensor-model-parallel-size", 2),
    "pp2": (*RANKS, "--pipeline-model-parallel-size", 2),
    "tp4pp3": (*RANKS, "--tensor-model-parallel-size", 4, "--pipeline-model-parallel-size", 3),
}
EP = (*RANKS, "--tensor-model-parallel-size", 2, "--expert-model-parallel-size", 2, "--pipeline-model-parallel-size", 3)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def same(folder: Path, other: Path) -> None:
    found, wanted = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        *((model, layout) for model in ("dense", "float32") for layout in LAYOUTS.values()),
        *((model, layout) for model in ("experts", "latent experts") for layout in (*LAYOUTS.values(), EP)),
        *((model, ()) for model in MODELS if model not in ("dense", "float32", "experts", "latent experts")),
        ("tied", LAYOUTS["tp4pp3"]),
        ("as many groups as heads", (*RANKS, "--tensor-model-parallel-size", 4)),
        ("state spaces alone", (*RANKS, "--pipeline-model-parallel-size", 3)),
        ("experts alone", (*RANKS, "--expert-model-parallel-size", 4)),
    ],
    ids=str,
)
def test_both_ways(model: str, layout: tuple[Any, ...], to_megatron, to_hf, tmp_path: Path) -> None:
    source, out, back = hm.write(tmp_path / "hf", **MODELS[model]), tmp_path / "mt", tmp_path / "back"
    to_megatron("nemotron-h", "--model-path", source, "--out", out, "--verify", *layout).succeeded()
    to_hf("--input_dir", out, "--output_dir", back, "--no_tokenizer", "--verify").succeeded()
    same(back, source)
    said, stated = (json.loads((folder / "config.json").read_text()) for folder in (back, source))
    assert {key: said.get(key) for key in stated} == stated
    assert "rope_theta" not in said


@pytest.mark.parametrize("model", ["dense", "experts", "latent experts", "tied"])
def test_without_a_manifest(model: str, to_megatron, to_hf, tmp_path: Path) -> None:
    """What args say alone: the family is known, and transformers computes the same."""
    source, out, back = hm.write(tmp_path / "hf", **MODELS[model]), tmp_path / "mt", tmp_path / "back"
    to_megatron("nemotron-h", "--model-path", source, "--out", out, *LAYOUTS["tp2"]).succeeded()
    (out / "conversion_manifest.json").unlink()
    to_hf("--input_dir", out, "--output_dir", back, "--no_tokenizer", "--true_vocab_size", 96).succeeded()
    same(back, source)
    ids = torch.arange(24)[None]
    assert torch.equal(hm.logits(back, ids), hm.logits(source, ids))


def test_a_rank_has_its_share_of_every_part(to_megatron, tmp_path: Path) -> None:
    """Written down by hand, apart from the rows: in_proj [z x B C dt] and conv1d [x B C] of each rank."""
    source, out = hm.write(tmp_path / "hf"), tmp_path / "mt"
    to_megatron("nemotron-h", "--model-path", source, "--out", out, *LAYOUTS["tp2"]).succeeded()
    ranks, args = read_ranks(out)
    hf = load_file(source / "model.safetensors")
    inner, states, heads = 8 * 6, 4 * 10, 8
    for end, live, sizes in (
        ("in_proj.weight", "in_proj.weight", [inner, inner, states, states, heads]),
        ("conv1d.weight", "conv1d_weight", [inner, states, states]),
        ("conv1d.bias", "conv1d_bias", [inner, states, states]),
    ):
        parts = hf[f"backbone.layers.2.mixer.{end}"].split(sizes)
        for number in range(2):
            wanted = torch.cat([part.chunk(2)[number] for part in parts])
            assert torch.equal(ranks[f"mp_rank_0{number}"][f"decoder.layers.2.mixer.{live}"], wanted), end
    assert args["spec"] == ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]
    stated = {"hybrid_layer_pattern": "M-M*-M", "squared_relu": True, "swiglu": False,
              "position_embedding_type": "none",
              "mamba_state_dim": 10, "mamba_head_dim": 6, "mamba_num_groups": 4, "mamba_num_heads": 8}  # fmt: skip
    assert {name: args[name] for name in stated} == stated


def test_keys_of_torch_dist(to_megatron, tmp_path: Path) -> None:
    source, out = hm.write(tmp_path / "hf", **hm.LATENT, float32=hm.FLOAT32), tmp_path / "mt"
    to_megatron("nemotron-h", "--model-path", source, "--out", out).succeeded()
    tensors, _ = read_torch_dist(out)
    hf = load_file(source / "model.safetensors")
    assert torch.equal(tensors["decoder.final_norm.weight"], hf["backbone.norm_f.weight"])
    parts = hf["backbone.layers.0.mixer.conv1d.weight"].split([48, 40, 40])
    for name, part in zip("xBC", parts, strict=True):
        assert torch.equal(tensors[f"decoder.layers.0.mixer.conv1d.weight.{name}"], part)
    assert tensors["decoder.layers.0.mixer.A_log"].dtype == torch.float32
    assert tensors["decoder.layers.1.mlp.router.expert_bias"].dtype == torch.float32
    assert tensors["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"].shape == (4, 16, 20)
    assert tensors["decoder.layers.1.mlp.fc1_latent_proj.weight"].shape == (20, 32)
    assert tensors["decoder.layers.3.mlp.linear_fc1.weight"].shape == (48, 32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"conv_kernel": 3}, ("conv_kernel 3", "4")),
        ({"layer_norm_epsilon": 1e-6, "rms_norm_eps": 1e-6}, ("1e-06", "1e-05", "constant")),
        ({"rms_norm_eps": 1e-6}, ("two values", "rms_norm_eps")),
        ({"use_bias": True}, ("use_bias",)),
        ({"use_conv_bias": False}, ("use_conv_bias",)),
        ({"attention_bias": True}, ("attention_bias",)),
        ({"mlp_bias": True}, ("mlp_bias",)),
        ({"mlp_hidden_act": "silu"}, ("mlp_hidden_act", "relu2")),
        ({"time_step_limit": [0.01, 0.1]}, ("time_step_limit",)),
        ({"sliding_window": 64}, ("sliding_window",)),
        ({"n_groups": 3}, ("8 heads", "3 groups")),
        ({"hybrid_override_pattern": "M-X"}, ("M-X", "symbol")),
        ({"hybrid_override_pattern": None}, ("hybrid_override_pattern",)),
        ({"num_hidden_layers": 5}, ("num_hidden_layers 5", "6 layers")),
        ({"layers_block_type": ["mlp"] * 6}, ("two values", "layers_block_type")),
        ({"hybrid_override_pattern": "M-MEEM"}, ("no tensor", "mixer.gate")),
        ({"hybrid_override_pattern": "-M-M*-", "num_hidden_layers": 6}, ("no tensor",)),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: tuple[str, ...], to_megatron, tmp_path: Path) -> None:
    source = hm.write(tmp_path / "hf")
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    to_megatron("nemotron-h", "--model-path", source, "--out", tmp_path / "mt").refused(*words)
    assert not (tmp_path / "mt").exists()


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((*RANKS, "--tensor-model-parallel-size", 8), ("4 groups of its state space", "4 attention heads")),
        ((*RANKS, "--pipeline-model-parallel-size", 4), ("6 layers", "4")),
        (("--target", "megatron-llm"), ("hybrid", "megatron-llm")),
        (("--target", "megatron-bridge"), ("sub blocks", "megatron-core")),
    ],
)
def test_layouts_that_are_refused(sizes: tuple[Any, ...], words: tuple[str, ...], to_megatron, tmp_path: Path) -> None:
    source = hm.write(tmp_path / "hf")
    to_megatron("nemotron-h", "--model-path", source, "--out", tmp_path / "mt", *sizes).refused(*words)
    assert not (tmp_path / "mt").exists()


@pytest.mark.parametrize("pattern", ["M-M*|-M", "M|-M*|-|M"])
def test_cuts_of_the_pipeline(pattern: str, to_megatron, to_hf, tmp_path: Path) -> None:
    """Stages of any length, and virtual ones, as | says."""
    source, out, back = hm.write(tmp_path / "hf"), tmp_path / "mt", tmp_path / "back"
    to_megatron("nemotron-h", "--model-path", source, "--out", out, "--verify", "--hybrid-layer-pattern", pattern,
                *LAYOUTS["pp2"]).succeeded()  # fmt: skip
    ranks, args = read_ranks(out) if pattern.count("|") == 1 else ({}, {})
    if ranks:
        assert args["hybrid_layer_pattern"] == pattern
        assert "decoder.layers.1.mixer.conv1d_weight" in ranks["mp_rank_00_001"]
    to_hf("--input_dir", out, "--output_dir", back, "--no_tokenizer").succeeded()
    same(back, source)


def test_what_transformers_saves(to_megatron, to_hf, tmp_path: Path) -> None:
    """Its own spelling of the config: kinds of layers by name, no number of them, infinity as an object."""
    from transformers import NemotronHForCausalLM

    made, source = hm.write(tmp_path / "made", **hm.LATENT), tmp_path / "hf"
    NemotronHForCausalLM.from_pretrained(made, dtype=torch.bfloat16).save_pretrained(source)
    out, back = tmp_path / "mt", tmp_path / "back"
    to_megatron("nemotron-h", "--model-path", source, "--out", out, "--verify").succeeded()
    to_hf("--input_dir", out, "--output_dir", back, "--no_tokenizer", "--verify").succeeded()
    same(back, source)
    said = json.loads((back / "config.json").read_text())
    assert said["hybrid_override_pattern"] == "ME*-ME"
    assert said["layers_block_type"] == json.loads((source / "config.json").read_text())["layers_block_type"]


def test_prediction_layers_are_named(to_megatron, tmp_path: Path) -> None:
    source = hm.write(tmp_path / "hf", **hm.EXPERTS, num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E")
    tensors = load_file(source / "model.safetensors")
    tensors["mtp.layers.0.enorm.weight"] = torch.ones(32)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    to_megatron("nemotron-h", "--model-path", source, "--out", tmp_path / "mt").refused("--mtp drop", "enorm")
    to_megatron("nemotron-h", "--model-path", source, "--out", tmp_path / "mt", "--mtp", "drop").succeeded()


@pytest.mark.parametrize("key", ["attention_head_dim", None])
def test_other_spellings_of_keys(key: str | None, to_megatron, to_hf, tmp_path: Path) -> None:
    """The size of a head by its older name, and no number of layers."""
    source, out, back = hm.write(tmp_path / "hf"), tmp_path / "mt", tmp_path / "back"
    config = json.loads((source / "config.json").read_text())
    if key:
        config[key] = config.pop("head_dim")
    config.pop("num_hidden_layers")
    (source / "config.json").write_text(json.dumps(config))
    to_megatron("nemotron-h", "--model-path", source, "--out", out).succeeded()
    to_hf("--input_dir", out, "--output_dir", back, "--no_tokenizer").succeeded()
    same(back, source)
    said = json.loads((back / "config.json").read_text())
    assert (said["head_dim"], said["num_hidden_layers"]) == (12, 6)


def test_from_one_layout_to_another(to_megatron, to_hf, tmp_path: Path) -> None:
    source, options = hm.write(tmp_path / "hf", **hm.LATENT, float32=hm.FLOAT32), [LAYOUTS["tp4pp3"], (), EP]
    last = source
    for number, layout in enumerate(options):
        out = tmp_path / f"mt{number}"
        to_megatron("nemotron-h", "--model-path", last, "--out", out, "--verify", *layout).succeeded()
        last = out
    to_hf("--input_dir", last, "--output_dir", tmp_path / "back", "--no_tokenizer").succeeded()
    same(tmp_path / "back", source)


def test_experts_packed_by_transformers(to_megatron, to_hf, tmp_path: Path) -> None:
    """transformers may save all experts of a layer in one tensor each."""
    source = hm.write(tmp_path / "hf", **hm.EXPERTS)
    tensors = load_file(source / "model.safetensors")
    for layer in (1, 5):
        for kind in ("up", "down"):
            name = f"backbone.layers.{layer}.mixer.experts"
            each = [tensors.pop(f"{name}.{expert}.{kind}_proj.weight") for expert in range(4)]
            tensors[f"{name}.{kind}_proj"] = torch.stack(each)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    out, back = tmp_path / "mt", tmp_path / "back"
    to_megatron("nemotron-h", "--model-path", source, "--out", out, "--verify").succeeded()
    to_hf("--input_dir", out, "--output_dir", back, "--no_tokenizer").succeeded()
    same(back, source)


GOLDEN = REPOSITORY.parent / "shared" / "golden" / "core-nemotron-h"
STORED = json.loads((GOLDEN / "case.json").read_text())["layouts"] if GOLDEN.is_dir() else {}
TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")


@pytest.mark.skipif(not STORED, reason="the golden cases do not lie beside this clone")
@pytest.mark.parametrize("folder", STORED or ["none"])
def test_what_megatron_lm_wrote(folder: str, to_megatron, to_hf, tmp_path: Path) -> None:
    """Its files are exported bit for bit, and ours are the same, padding apart."""
    layout, back, out = STORED[folder], tmp_path / "back", tmp_path / "mt"
    to_hf("--input_dir", GOLDEN / folder, "--output_dir", back, "--no_tokenizer", "--true_vocab_size", 119).succeeded()
    same(back, GOLDEN / "hf")
    if layout.get("export_only"):
        return
    options: list[Any] = ["--make-vocab-size-divisible-by", 16]
    if layout["format"] == "torch":
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
        options += [*RANKS, *(part for size in sizes for part in (f"--{size.replace('_', '-')}", layout[size]))]
    to_megatron("nemotron-h", "--model-path", GOLDEN / "hf", "--out", out, *options).succeeded()
    read = read_ranks if layout["format"] == "torch" else read_torch_dist
    (wanted, _), (found, _) = read(GOLDEN / folder), read(out)
    if read is read_torch_dist:
        wanted, found = {"": wanted}, {"": found}
    for rank, tensors in wanted.items():
        rows = 119 - 64 * int(rank.split("_")[2]) if "tp2" in folder and rank else 119
        for name, tensor in tensors.items():
            kept = slice(None, rows) if name in TABLES else slice(None)
            assert torch.equal(found[rank][name][kept], tensor[kept]), (rank, name)
