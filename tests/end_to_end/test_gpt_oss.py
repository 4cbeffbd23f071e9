"""GPT-OSS in both directions: bit for bit what transformers has, put where Megatron-Core has it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gpt_oss_models as oss
import pytest
import torch
from golden_core import read_ranks, read_torch_dist
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
CASES = sorted(f"{path.parent.name}/{path.name}" for path in oss.SHARED.glob("core-gpt-oss*/megatron-*"))
FORMS: dict[str, list[Any]] = {
    "stacked": [],
    "per layer": ["--moe-layer-freq", "[1]*4"],
    "rank files, TP 2 PP 2 EP 2": [
        "--ckpt-format", "torch", "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2,
        "--expert-model-parallel-size", 2, "--expert-tensor-parallel-size", 1, "--moe-grouped-gemm",
    ],
    "rank files, one module for each expert": ["--ckpt-format", "torch", "--expert-model-parallel-size", 2],
}  # fmt: skip


# Args that decide the model, or how it is computed.
DECIDING = (
    "add_bias_linear", "add_qkv_bias", "swiglu", "quick_geglu", "glu_linear_offset", "activation_func_clamp_value",
    "softmax_type", "window_size", "window_attn_skip_freq", "moe_router_dtype", "moe_router_pre_softmax",
    "moe_router_score_function", "moe_router_topk", "position_embedding_type", "rotary_scaling_factor", "mscale",
    "yarn_original_max_position_embeddings", "yarn_correction_range_round_to_int", "layernorm_epsilon",
)  # fmt: skip


def read(folder: Path, ckpt_format: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    if ckpt_format == "torch":
        return read_ranks(folder)
    tensors, args = read_torch_dist(folder)
    return {"": tensors}, args


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A torch_dist checkpoint's tensors as oss.in_megatron names them."""
    found = {}
    for key, tensor in tensors.items():
        stacked = re.match(r"decoder\.layers\.\D", key)
        layers = {key.replace("layers.", f"layers.{n}.", 1): part for n, part in enumerate(tensor)} if stacked else {}
        for name, part in (layers or {key: tensor}).items():
            experts = enumerate(part) if ".experts.experts." in name else ()
            own = {f"{name.replace('.experts.experts.', '.experts.')}{n}": one for n, one in experts}
            found |= own or {name: part}
    return found


@pytest.mark.parametrize(
    ("form", "ffn"),
    [*((form, 24) for form in FORMS), pytest.param("stacked", 32, id="square down_proj"),
     pytest.param("stacked", 16, id="square gate_up_proj")],
)  # fmt: skip
def test_both_ways(form: str, ffn: int, to_megatron, to_hf, tmp_path: Path) -> None:
    hf = oss.write(tmp_path / "hf", oss.model(intermediate_size=ffn))
    to_megatron("gpt-oss", "--model-path", hf, "--out", tmp_path / "mt", *FORMS[form]).succeeded()
    if "--ckpt-format" not in FORMS[form]:
        found, _ = read_torch_dist(tmp_path / "mt")
        wanted, ours = oss.in_megatron(oss.stored(hf)), apart(found)
        assert all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())
        assert {name for name in ours.keys() - wanted.keys() if not name.endswith("fc1.layer_norm_weight")} == set()
    to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
    back, source = oss.stored(tmp_path / "out"), oss.stored(hf)
    assert back.keys() == source.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in source.items())


def test_rank_files_hold_their_parts(to_megatron, tmp_path: Path) -> None:
    hf = oss.write(tmp_path / "hf")
    options = FORMS["rank files, TP 2 PP 2 EP 2"]
    to_megatron("gpt-oss", "--model-path", hf, "--out", tmp_path / "mt", *options).succeeded()
    ranks, args = read_ranks(tmp_path / "mt")
    wanted = oss.in_megatron(oss.stored(hf))
    assert sorted(ranks) == [f"mp_rank_{tp:02d}_{pp:03d}_{tp:03d}" for tp in (0, 1) for pp in (0, 1)]
    for folder, tensors in ranks.items():
        tp, pp = (int(part) for part in folder.split("_")[2:4])
        for name, tensor in tensors.items():
            if not name.startswith("decoder.layers.") or name.endswith(".input_layernorm.weight"):
                continue
            _, _, layer, rest = name.split(".", 3)
            expert = re.search(r"\d+$", rest)
            rest = rest if expert is None else rest[: expert.start()] + str(int(expert[0]) + 2 * tp)
            full = wanted[f"decoder.layers.{int(layer) + 2 * pp}.{rest}"]
            cut = {"softmax_offset": 0, "linear_qkv.weight": 0, "linear_qkv.bias": 0, "linear_proj.weight": 1}
            dim = next((dim for end, dim in cut.items() if rest.endswith(end)), None)
            assert torch.equal(tensor, full if dim is None else full.chunk(2, dim)[tp]), name
    assert (args["add_bias_linear"], args["swiglu"], args["window_attn_skip_freq"]) == (True, False, 2)


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str, to_megatron, to_hf, tmp_path: Path) -> None:
    folder = oss.SHARED / case
    facts = json.loads((folder.parent / "case.json").read_text())
    layout = facts["layouts"][folder.name]
    to_hf("--input_dir", folder, "--output_dir", tmp_path / "out", "--no_tokenizer", "--true_vocab_size",
          facts["vocab"]).succeeded()  # fmt: skip
    back, source = oss.stored(tmp_path / "out"), oss.stored(folder.parent / "hf")
    assert back.keys() == source.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in source.items())
    hf = folder.parent / "hf"
    config, stated = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", hf))
    idle = {"transformers_version", "initializer_range", "router_aux_loss_coef", "use_cache", "eos_token_id",
            "pad_token_id", "output_router_logits", "attention_dropout", "rope_scaling"}  # fmt: skip
    assert {key: config.get(key) for key in stated.keys() - idle} == {key: stated[key] for key in stated.keys() - idle}
    assert config["rope_scaling"].items() >= stated["rope_scaling"].items()
    if layout.get("export_only") or "fsdp" in folder.name:
        return
    options: list[Any] = ["--make-vocab-size-divisible-by", layout["padded_vocab"], "--true-vocab-size", facts["vocab"]]
    if layout["format"] == "torch":
        options = ["--ckpt-format", "torch", "--make-vocab-size-divisible-by", facts["make_vocab_size_divisible_by"]]
        for size in ("tensor_model", "pipeline_model", "expert_model", "expert_tensor"):
            options += [f"--{size.replace('_', '-')}-parallel-size", layout[f"{size}_parallel_size"]]
        options += layout["import_flags"]
    to_megatron("gpt-oss", "--model-path", folder.parent / "hf", "--out", tmp_path / "mt", *options).succeeded()
    (wanted, said), (found, args) = (read(path, layout["format"]) for path in (folder, tmp_path / "mt"))
    for name in DECIDING:  # nothing else is said; what no run takes from a checkpoint may be left out
        assert args.get(name) in (None, said[name], list(said[name]) if isinstance(said[name], tuple) else None), name
    assert found.keys() == wanted.keys()
    for rank, tensors in wanted.items():
        for name, tensor in tensors.items():
            ours = found[rank][name]
            assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape), name
            padded = name in ("embedding.word_embeddings.weight", "output_layer.weight")  # training's rows are random
            first = int(rank.split("_")[2]) * len(tensor) if rank else 0
            rows = max(0, facts["vocab"] - first) if padded else None
            assert torch.equal(ours[:rows], tensor[:rows]), (rank, name)
