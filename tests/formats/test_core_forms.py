"""Forms of a torch_dist output: of a release of Megatron-Core, of Megatron-Bridge, of a HybridModel; integrity.json.

Megatron-Bridge 0.6.2's own load_megatron_model and megatron-core 0.19.2's own load_common_state_dict and
verify_integrity_manifest were run on such outputs by hand: logits within 2.1e-6 of transformers', those of experts,
of yarn and of DeepSeek-V3's latent attention too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import latent_models as lm
import pytest
import tiny_models as tm
import torch
import yaml
from conftest import GOLDEN, Result
from golden_core import COMMON, Reader, read_torch_dist, root_of
from torch.distributed.checkpoint.filesystem import FileSystemReader

HYBRID = ("--hybrid-layer-pattern", "*-*-", "--spec", "megatron.core.models.hybrid.hybrid_layer_specs",
          "hybrid_stack_spec")  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def place(case: str) -> Path:
    return GOLDEN / case if (GOLDEN / case).is_dir() else SHARED / case


def write(to_megatron, case: str, out: Path, *options: Any) -> Result:
    family = tm.read_json(place(case) / "case.json")["family"]
    return to_megatron(family, "--model-path", place(case) / "hf", "--out", out, *options)


def comes_back(to_hf, case: str, out: Path, to: Path) -> None:
    to_hf("--input_dir", out, "--output_dir", to, "--no_tokenizer", "--verify").succeeded()
    found, expected = tm.read_huggingface(to), tm.read_huggingface(place(case) / "hf")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for key in ("rms_norm_eps", "max_position_embeddings", "num_hidden_layers", "tie_word_embeddings"):
        assert tm.read_json(to / "config.json")[key] == tm.read_json(place(case) / "hf" / "config.json")[key]


# ---- a HybridModel


def test_a_hybrid_model_as_megatron_wrote_it(to_megatron, to_hf, tmp_path: Path) -> None:
    case = "core-llama3-hybrid"
    sizes = ("--make-vocab-size-divisible-by", 32)
    said = write(to_megatron, case, tmp_path / "out", *HYBRID, *sizes, "--verify").succeeded()
    assert "--hybrid-layer-pattern '*-*-'" in said.out
    (wanted, wanted_args), (found, args) = (
        read_torch_dist(root) for root in (GOLDEN / case / "megatron-hybrid", tmp_path / "out")
    )
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        rows = 232 if name in ("embedding.word_embeddings.weight", "output_layer.weight") else len(tensor)
        assert torch.equal(found[name][:rows], tensor[:rows]), name
    for name in ("num_layers", "encoder_num_layers", "hybrid_layer_pattern", "moe_layer_freq", "mamba_state_dim"):
        assert args[name] == wanted_args[name]
    assert list(args["spec"]) == list(wanted_args["spec"])
    entries = [Reader(root_of(root)).read_metadata().state_dict_metadata
               for root in (GOLDEN / case / "megatron-hybrid", tmp_path / "out")]  # fmt: skip
    states = [{key for key in each if "_extra_state" in key} for each in entries]
    assert states[0] <= states[1]
    comes_back(to_hf, case, tmp_path / "out", tmp_path / "hf")


def test_a_scaling_is_warned_of(to_megatron, tmp_path: Path) -> None:
    said = write(to_megatron, "core-llama3", tmp_path / "out", "--hybrid-layer-pattern", "*-*-|*-").succeeded()
    assert "HybridModel ignores --use-rope-scaling" in said.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--hybrid-layer-pattern", "*-*-*-"), ("is not this model's", "*-*-")),
        (("--hybrid-layer-pattern", "*E*E"), ("is not this model's",)),
        (("--hybrid-layer-pattern", "M-*-"), ("is not this model's", "*-*-")),
        (("--hybrid-layer-pattern", "G-*-"), ("is not this model's", "*-*-")),
        (("--hybrid-layer-pattern", "*-*-", "--spec", "a", "b"), ("--spec a b",)),
        (("--hybrid-layer-pattern", "*-*-", "--target", "megatron-bridge"), ("megatron-bridge",)),
        (("--target", "megatron-bridge", "--ckpt-format", "torch"), ("torch_dist",)),
        (("--core-release", "0.19", "--ckpt-format", "torch"), ("torch_dist",)),
    ],
)
def test_forms_that_are_refused(options: Any, words: Any, to_megatron, tmp_path: Path) -> None:
    write(to_megatron, "core-llama3-hybrid", tmp_path / "out", *options).refused(*words)
    assert not (tmp_path / "out").exists()


def test_what_megatron_llm_has_no_form_of(to_megatron, imported, sources, tmp_path: Path) -> None:
    to_megatron("llama2", "--model-path", sources("llama2"), "--out", tmp_path / "out",
                "--core-release", "0.19").refused("torch_dist")  # fmt: skip


# ---- releases


@pytest.mark.parametrize(("release", "apart"), [("auto", True), ("before-0.19", True), ("0.19", False)])
def test_where_the_common_state_is(release: str, apart: bool, to_megatron, to_hf, tmp_path: Path) -> None:
    write(to_megatron, "core-qwen3", tmp_path / "out", "--core-release", release).succeeded()
    folder = tmp_path / "out" / "release"
    assert (folder / "common.pt").is_file() == apart
    assert (COMMON in Reader(folder).read_metadata().state_dict_metadata) == (not apart)
    assert ("common_backend" in tm.read_json(folder / "metadata.json")) == apart
    assert read_torch_dist(tmp_path / "out")[1]["num_layers"] == 3
    comes_back(to_hf, "core-qwen3", tmp_path / "out", tmp_path / "hf")


@pytest.mark.parametrize("target", ["megatron-core", "megatron-bridge"])
def test_megatron_cores_own_sums(target: str, to_megatron, tmp_path: Path) -> None:
    options = ("--checksums", "--target", target)
    write(to_megatron, "core-qwen3", tmp_path / "out", *options, "--verify").succeeded()
    folder = root_of(tmp_path / "out")
    said = json.loads((folder / "integrity.json").read_text())
    inside = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    del inside["integrity.json"]
    assert said == {"algorithm": "sha256", "files": inside}
    assert "already" in write(to_megatron, "core-qwen3", tmp_path / "out", *options, "--verify").succeeded().text


# ---- Megatron-Bridge


# What a clone has, and more cases where they lie beside it.
SHARED = GOLDEN.parents[2] / "shared" / "golden"
BRIDGED = ["core-llama3", "core-qwen2", "core-qwen3", "core-qwen3-yarn", "core-qwen3-moe-tp2ep2"]
BRIDGED += [
    case for case in ("core-mixtral", "core-qwen2-moe", "core-deepseek-v2-lite", "core-deepseek-v3-fused")
    if (SHARED / case).is_dir()
]  # fmt: skip


@pytest.mark.parametrize("case", BRIDGED)
def test_bridge(case: str, to_megatron, to_hf, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(to_megatron, case, out, "--target", "megatron-bridge", "--make-vocab-size-divisible-by", 64).succeeded()
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "0"
    run_config = yaml.safe_load((out / "iter_0000000" / "run_config.yaml").read_text())
    model, config = run_config["model"], tm.read_json(place(case) / "hf" / "config.json")
    assert (model["layernorm_epsilon"], model["vocab_size"]) == (config["rms_norm_eps"], config["vocab_size"])
    assert model["should_pad_vocab"] == (config["vocab_size"] % 64 != 0)
    assert run_config["checkpoint"]["save_optim"] is False
    for path in (out / "latest_train_state.pt", out / "iter_0000000" / "train_state.pt"):
        assert torch.load(path, weights_only=True)["step"] == 0
    comes_back(to_hf, case, out, tmp_path / "hf")
    (out / "conversion_manifest.json").unlink()  # what is stated in run_config.yaml is enough
    shutil.rmtree(tmp_path / "hf")
    comes_back(to_hf, case, out, tmp_path / "hf")
    first, again = config, tm.read_json(tmp_path / "hf" / "config.json")
    same = ("num_experts_per_tok", "norm_topk_prob", "kv_lora_rank", "first_k_dense_replace", "n_group", "topk_method")
    assert {key: again[key] for key in same if key in first} == {key: first[key] for key in same if key in first}


LAYER_BY_LAYER = "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec"


def test_what_bridge_builds_experts_and_latent_attention_with(to_megatron, tmp_path: Path) -> None:
    """Fields of its provider, as AutoBridge sets them for a Qwen3-MoE, and as a DeepSeek-V3 needs them."""
    write(to_megatron, "core-qwen3-moe-tp2ep2", tmp_path / "moe", "--target", "megatron-bridge").succeeded()
    model = yaml.safe_load((tmp_path / "moe" / "iter_0000000" / "run_config.yaml").read_text())["model"]
    assert model["_target_"] == "megatron.bridge.models.gpt_provider.GPTModelProvider"
    assert "transformer_layer_spec" not in model
    config = tm.read_json(GOLDEN / "core-qwen3-moe-tp2ep2" / "hf" / "config.json")
    assert (model["num_moe_experts"], model["moe_router_topk"], model["moe_ffn_hidden_size"]) == (
        config["num_experts"], config["num_experts_per_tok"], config["moe_intermediate_size"]
    )  # fmt: skip
    assert (model["moe_grouped_gemm"], model["moe_layer_freq"], model["moe_router_pre_softmax"]) == (True, 1, False)
    if (SHARED / "core-deepseek-v3-fused").is_dir():
        write(to_megatron, "core-deepseek-v3-fused", tmp_path / "mla", "--target", "megatron-bridge").succeeded()
        model = yaml.safe_load((tmp_path / "mla" / "iter_0000000" / "run_config.yaml").read_text())["model"]
        assert model["_target_"] == "megatron.bridge.models.mla_provider.MLAModelProvider"
        assert model["transformer_layer_spec"]["_target_"] == LAYER_BY_LAYER
        assert (model["multi_latent_attention"], model["qk_layernorm"], model["rope_type"]) == (True, True, "yarn")


def test_bridge_alone_without_our_manifest(to_megatron, to_hf, tmp_path: Path) -> None:
    """What is stated in run_config.yaml is enough."""
    out = tmp_path / "out"
    write(to_megatron, "core-llama3", out, "--target", "megatron-bridge").succeeded()
    (out / "conversion_manifest.json").unlink()
    said = to_hf("--input_dir", out, "--output_dir", tmp_path / "hf", "--no_tokenizer").succeeded()
    assert "run_config.yaml" in said.out
    one, two = (tm.read_json(p / "config.json") for p in (GOLDEN / "core-llama3" / "hf", tmp_path / "hf"))
    assert two["rope_scaling"].items() >= one["rope_scaling"].items()
    assert (two["rope_theta"], two["rms_norm_eps"]) == (one["rope_theta"], one["rms_norm_eps"])


def test_fused_down_projections_are_saved_as_those_that_are_not(to_megatron, tmp_path: Path) -> None:
    """As FusedMLASelfAttention.sharded_state_dict (megatron-core 0.19) does, with the states of its modules too."""
    hf = lm.write(tmp_path / "hf", "deepseek-v3")
    keys = []
    for name, options in (("apart", ()), ("fused", ("--mla-down-proj-fusion",))):
        out = ("--model-path", hf, "--out", tmp_path / name, "--target", "megatron-core")
        to_megatron("deepseek-v3", *out, *options).succeeded()
        (metadata,) = (tmp_path / name).rglob(".metadata")
        keys.append(FileSystemReader(metadata.parent).read_metadata().state_dict_metadata.keys())
    assert keys[0] == keys[1]
    assert "decoder.layers.0.self_attention.linear_kv_down_proj._extra_state/shard_0_1" in keys[1]
