"""What Megatron-LM itself wrote of Llama 3, Qwen2 and Qwen3, reproduced bit for bit in both directions, and verified.

tests/golden/README.md says how the cases were made.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
from conftest import GOLDEN, run
from golden_core import Tensors, read_ranks, read_torch_dist, root_of, unpickle
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDERS = sorted(f"{path.parent.name}/{path.name}" for path in GOLDEN.glob("core-*/megatron-*"))
# The formats that are written too
WRITTEN = [folder for folder in FOLDERS if not folder.endswith(("torch_dcp", "hybrid"))]
TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# Args that --use-checkpoint-args restores, and those that it does not but that decide the model.
RESTORED = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "group_query_attention",
    "kv_channels", "max_position_embeddings", "position_embedding_type", "rotary_base", "rotary_percent",
    "rotary_interleaved", "add_bias_linear", "add_qkv_bias", "squared_relu", "swiglu",
    "untie_embeddings_and_output_weights", "normalization", "apply_query_key_layer_scaling", "attention_dropout",
    "hidden_dropout",
)  # fmt: skip
DECIDING = (
    "norm_epsilon", "layernorm_epsilon", "qk_layernorm", "use_rope_scaling", "rope_scaling_factor",
    "rotary_scaling_factor", "yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow", "mscale",
    "rotary_seq_len_interpolation_factor",
)  # fmt: skip


def facts(folder: str) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """(the case's folder, case.json, the layout of this checkpoint)."""
    case, name = folder.split("/")
    content = tm.read_json(GOLDEN / case / "case.json")
    return GOLDEN / case, content, content["layouts"][name]


def read(folder: Path, layout: dict[str, Any]) -> tuple[dict[str, Tensors], dict[str, Any]]:
    if layout["format"] == "torch":
        return read_ranks(folder)
    tensors, args = read_torch_dist(folder)
    return {"": tensors}, args


def tokens_only(name: str, tensor: Tensor, rank: str, vocabulary: int) -> Tensor:
    """Padding rows are nobody's: Megatron-LM's are random, a conversion's are copies."""
    if name not in TABLES:
        return tensor
    first = int(rank.split("_")[2]) * tensor.shape[0] if rank else 0
    return tensor[: max(0, vocabulary - first)]


@pytest.mark.parametrize("folder", WRITTEN)
def test_import_is_what_training_wrote(folder: str, tmp_path: Path, to_megatron) -> None:
    case, content, layout = facts(folder)
    options: list[Any] = ["--make-vocab-size-divisible-by", content["make_vocab_size_divisible_by"]]
    if layout["format"] == "torch":
        options += ["--ckpt-format", "torch"]
        sizes = ["tensor_model_parallel_size", "pipeline_model_parallel_size"]
        if layout["experts"]:
            sizes += ["expert_model_parallel_size", "expert_tensor_parallel_size"]
            options += ["--moe-grouped-gemm"] if "TEGroupedMLP" in layout["experts"] else []
        for size in sizes:
            options += [f"--{size.replace('_', '-')}", layout[size]]
    to_megatron(content["family"], "--model-path", case / "hf", "--out", tmp_path / "out",
                "--target", "megatron-core", *options).succeeded()  # fmt: skip
    (wanted, wanted_args), (found, args) = read(GOLDEN / folder, layout), read(tmp_path / "out", layout)
    assert found.keys() == wanted.keys()
    for rank, tensors in wanted.items():
        extra = {name for name in found[rank].keys() - tensors.keys() if "norm" not in name}
        assert not extra
        for name, tensor in tensors.items():
            ours = found[rank][name]
            assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape), name
            one, two = (tokens_only(name, part, rank, content["vocab"]) for part in (ours, tensor))
            assert torch.equal(one, two), (rank, name)
    assert args_that_differ(wanted_args, args) == {}


def args_that_differ(wanted: dict[str, Any], found: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    idle = set() if wanted.get("use_rope_scaling") else {"rope_scaling_factor"}
    if wanted["position_embedding_type"] != "yarn":
        idle |= {name for name in DECIDING if name.startswith(("yarn_", "mscale", "rotary_scaling"))}
    different = {}
    for name in (*RESTORED, *DECIDING):
        one, two = wanted.get(name), found.get(name)
        silent = name in DECIDING and two is None
        if name in wanted and name not in idle and not silent and (one or None) != (two or None):
            different[name] = (one, two)
    return different


def logits(folder: Path, ids: Tensor, positions: Tensor) -> Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits[0]


@pytest.mark.parametrize("folder", FOLDERS)
def test_export_is_the_source(folder: str, tmp_path: Path, to_hf) -> None:
    case, content, _ = facts(folder)
    model = ("--model", content["family"], "--input_dir", GOLDEN / folder, "--output_dir", tmp_path / "out")
    to_hf(*model, "--no_tokenizer", "--true_vocab_size", content["vocab"]).succeeded()
    wanted, found = (tm.read_huggingface(where) for where in (case / "hf", tmp_path / "out"))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    ids = torch.tensor([json.loads((case / "ids.json").read_text())])
    near, far = torch.arange(ids.shape[1])[None], torch.arange(ids.shape[1])[None] * 61
    stored = load_file(case / "logits.safetensors")["logits"]
    torch.testing.assert_close(logits(tmp_path / "out", ids, near), stored, atol=1e-5, rtol=0)
    # A scaled rope is felt at far positions only.
    torch.testing.assert_close(logits(tmp_path / "out", ids, far), logits(case / "hf", ids, far), atol=1e-5, rtol=0)


def verified(source: Path, checkpoint: Path, report: Path) -> tuple[int, dict[str, Any]]:
    result = run("weights_conversion.verify", source, checkpoint, "--workers", 1, "--json", report)
    assert result.code in (0, 1), result.text
    return result.code, json.loads(report.read_text())


@pytest.mark.parametrize("folder", FOLDERS)
def test_verify_says_the_same(folder: str, tmp_path: Path) -> None:
    case, _, _ = facts(folder)
    code, found = verified(case / "hf", GOLDEN / folder, tmp_path / "found.json")
    assert code == 0
    assert (found["verdict"], found["numeric"]["same"], found["config"]["problems"]) == ("identical", True, [])


# ---- faults


def spoiled_ranks(tmp_path: Path, spoil: Callable[[Tensors], Any]) -> Path:
    """core-qwen3-tp2pp2 with `spoil` done to the last stage's ranks."""
    out = tmp_path / "spoiled"
    shutil.copytree(GOLDEN / "core-qwen3-tp2pp2" / "megatron-torch-tp2pp2", out)
    for path in sorted(root_of(out).glob("mp_rank_*_001/model_optim_rng.pt")):
        content = unpickle(path)
        spoil(content["model"])
        plain = (bool, int, float, str, list, tuple, type(None), torch.dtype)
        args = {name: value for name, value in vars(content["args"]).items() if isinstance(value, plain)}
        kept = {name: content[name] for name in ("model", "checkpoint_version", "iteration")}
        torch.save(kept | {"args": Namespace(**args)}, path)
    return out


def exchange_norms(model: Tensors) -> None:
    for q in [name for name in model if name.endswith("q_layernorm.weight")]:
        k = q.replace("q_layernorm", "k_layernorm")
        model[q], model[k] = model[k], model[q]


def exchange_gate_and_up(model: Tensors) -> None:
    for name in [name for name in model if name.endswith("linear_fc1.weight")]:
        model[name] = torch.cat(model[name].chunk(2)[::-1])


@pytest.mark.parametrize(
    ("spoil", "stage", "cause"),
    [
        (exchange_norms, "attention", "the norms of q and k are exchanged"),
        (exchange_gate_and_up, "mlp", "gate and up are swapped"),
    ],
)
def test_a_wrong_rank_file_is_found(spoil: Callable[[Tensors], Any], stage: str, cause: str, tmp_path: Path) -> None:
    checkpoint = spoiled_ranks(tmp_path, spoil)
    code, found = verified(GOLDEN / "core-qwen3-tp2pp2" / "hf", checkpoint, tmp_path / "found.json")
    assert code == 1
    assert found["exact"]["differences"]
    assert (found["numeric"]["stage"], found["numeric"]["layer"]) == (stage, 2)
    assert cause in found["numeric"]["cause"]


def test_biases_whose_groups_are_mixed_are_found(tmp_path: Path) -> None:
    """The source's q, k and v biases are rearranged, so that the checkpoint's are in the wrong groups."""
    source = tmp_path / "hf"
    shutil.copytree(GOLDEN / "core-qwen2" / "hf", source)
    config = tm.read_json(source / "config.json")
    groups = config["num_key_value_heads"]
    dim = config["hidden_size"] // config["num_attention_heads"]
    tensors = load_file(source / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        names = [f"model.layers.{layer}.self_attn.{name}_proj.bias" for name in "qkv"]
        parts = [tensors[name].view(groups, -1, dim) for name in names]
        fused = torch.cat(parts, dim=1).flatten()
        pieces = fused.split([part.numel() for part in parts])
        tensors |= {name: piece.clone() for name, piece in zip(names, pieces, strict=True)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    code, found = verified(source, GOLDEN / "core-qwen2" / "megatron-torch_dist", tmp_path / "found.json")
    assert code == 1
    assert (found["numeric"]["stage"], found["numeric"]["layer"]) == ("attention", 0)
    assert "the biases of q, k and v are not grouped" in found["numeric"]["cause"]


def zero_biases(model: Tensors) -> None:
    for name in [name for name in model if ".layers.1." in name and name.endswith("linear_qkv.bias")]:
        model[name] = torch.zeros_like(model[name])


def exchange_biases(model: Tensors) -> None:
    one, two = (f"decoder.layers.{layer}.self_attention.linear_qkv.bias" for layer in (1, 2))
    model[one], model[two] = model[two], model[one]


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (zero_biases, "all zeros: a bias that was never loaded"),
        (exchange_biases, "it holds the source's model.layers.2.self_attn.q_proj.bias"),
    ],
)
def test_the_cause_of_wrong_biases_is_named(
    spoil: Callable[[Tensors], Any], cause: str, tmp_path: Path, to_megatron
) -> None:
    source, out = GOLDEN / "core-qwen2" / "hf", tmp_path / "out"
    cut = ("--target", "megatron-core", "--ckpt-format", "torch", "--tensor-model-parallel-size", 2)
    to_megatron("qwen2", "--model-path", source, "--out", out, *cut).succeeded()
    for path in root_of(out).glob("mp_rank_*/model_optim_rng.pt"):
        content = unpickle(path)
        spoil(content["model"])
        torch.save(content, path)
    code, found = verified(source, out, tmp_path / "found.json")
    assert code == 1
    first = found["exact"]["differences"][0]
    assert (first["tensor"], first["cause"]) == ("model.layers.1.self_attn.q_proj.bias", cause)
    assert (found["numeric"]["stage"], found["numeric"]["layer"]) == ("attention", 1)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("core-llama3", {"rope_scaling": None}),
        ("core-llama3", {"factor": 32.0}),
        ("core-qwen3-yarn", {"rope_scaling": None}),
        ("core-qwen3-yarn", {"factor": 2.0}),
    ],
)
def test_a_lost_rope_scaling_is_found(case: str, change: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "hf"
    shutil.copytree(GOLDEN / case / "hf", source)
    config = tm.read_json(source / "config.json")
    if "factor" in change:
        config["rope_scaling"] |= change
    else:
        del config["rope_scaling"]
    (source / "config.json").write_text(json.dumps(config))
    code, found = verified(source, GOLDEN / case / "megatron-torch_dist", tmp_path / "found.json")
    assert code == 1
    assert any(problem.startswith("rope_scaling is ") for problem in found["config"]["problems"])
    assert (found["numeric"]["stage"], found["numeric"]["layer"]) == ("attention", 0)
    assert found["exact"]["differences"] == []
