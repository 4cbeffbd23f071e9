"""Qwen3-Next, Qwen3.5 and 3.6: what Megatron-LM wrote of them, bit for bit; every form of tiny ones, there and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import delta_models
import pytest
import torch
from delta_models import DELTAS, Delta
from golden_core import Tensors, read_ranks, read_torch_dist
from safetensors.torch import load_file, save_file
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SHARED = Path(__file__).parents[3] / "shared" / "golden"  # more than a clone has, where it lies beside one
CASES = {name: SHARED / name for name in ("core-qwen3-next", "core-qwen35") if (SHARED / name / "case.json").is_file()}
LAYOUTS = [f"{name}/{path.name}" for name, case in CASES.items() for path in sorted(case.glob("megatron-*"))]
WRITTEN = [layout for layout in LAYOUTS if not layout.endswith(("fsdp_dtensor", "bridge-vl"))]
TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")
if not LAYOUTS:
    LAYOUTS = WRITTEN = [pytest.param("", marks=pytest.mark.skip("the golden cases are not beside this clone"))]


def hf(folder: Path) -> Tensors:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(wanted: Tensors, found: Tensors) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def read(folder: Path) -> dict[str, Tensors]:
    """By rank; of torch_dist one."""
    dist = any(folder.glob("*/.metadata"))
    return {"": read_torch_dist(folder)[0]} if dist else read_ranks(folder)[0]


def layout_of(layout: str) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    case = SHARED / layout.split("/")[0]
    content = json.loads((case / "case.json").read_text())
    return case, content, content["layouts"][layout.split("/")[1]]


@pytest.mark.parametrize("layout", WRITTEN)
def test_import_is_what_training_wrote(layout: str, to_megatron, tmp_path: Path) -> None:
    case, content, stated = layout_of(layout)
    options: list[Any] = ["--make-vocab-size-divisible-by", content["make_vocab_size_divisible_by"]]
    if stated["format"] == "torch":
        options += ["--ckpt-format", "torch", *stated["import_flags"]]
        sizes = ["tensor", "pipeline", *(("expert", "expert_tensor") if stated["experts"] else ())]
        for size in sizes:
            key = "expert_tensor_parallel_size" if size == "expert_tensor" else f"{size}_model_parallel_size"
            options += [f"--{key.replace('_', '-')}", stated[key]]
    to_megatron(
        content["family"], "--model-path", case / "hf", "--out", tmp_path / "out", *options, "--verify"
    ).succeeded()  # fmt: skip
    wanted, found = read(SHARED / layout), read(tmp_path / "out")
    assert set(found) == set(wanted)
    for rank, tensors in wanted.items():
        assert not {name for name in found[rank].keys() - tensors.keys() if "norm" not in name}
        for name, tensor in tensors.items():
            ours = found[rank][name]
            assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape), name
            first = int(rank.split("_")[2]) * tensor.shape[0] if rank else 0
            rows = max(0, content["vocab"] - first) if name in TABLES else None  # padding is nobody's
            assert torch.equal(ours[:rows], tensor[:rows]), (rank, name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_is_what_it_came_from(layout: str, to_hf, tmp_path: Path) -> None:
    case, content, _ = layout_of(layout)
    to_hf(
        "--model", content["family"], "--input_dir", SHARED / layout, "--output_dir", tmp_path / "out",
        "--no_tokenizer", "--true_vocab_size", content["vocab"], "--verify",
    ).succeeded()  # fmt: skip
    same(hf(case / "hf"), hf(tmp_path / "out"))


def there_and_back(model: Delta, options: list[Any], to_megatron, to_hf, tmp_path: Path) -> Path:
    source = delta_models.write(tmp_path / "hf", model)
    to_megatron(model.family, "--model-path", source, "--out", tmp_path / "mt", *options).succeeded()
    options = ["--reference", source] if model.vision else []
    to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "out", "--no_tokenizer", *options).succeeded()
    return tmp_path / "out"


RANKS = ["--ckpt-format", "torch", "--tensor-model-parallel-size", "2"]


@pytest.mark.parametrize("form", ["torch_dist", "ranks"])
@pytest.mark.parametrize("name", DELTAS)
def test_every_form_there_and_back(name: str, form: str, to_megatron, to_hf, tmp_path: Path) -> None:
    """Names, packing, types and what is around the text are as they were; the config says the same model."""
    model = DELTAS[name]
    out = there_and_back(model, RANKS if form == "ranks" else [], to_megatron, to_hf, tmp_path)
    if model.exact:
        same(model.tensors(), hf(out))
    source, found = model.config(), json.loads((out / "config.json").read_text())
    assert found["model_type"] == source["model_type"]
    assert found["architectures"] == source["architectures"]
    source, found = source.get("text_config", source), found.get("text_config", found)
    kept = set(source) - {"architectures", "rope_parameters"}
    assert {key: found[key] for key in kept} == {key: source[key] for key in kept}


def projections(model: Delta, tensors: Tensors, layer: int) -> dict[str, list[Tensor]]:
    """Head by head, as transformers takes the projections apart: q, k by key heads, the others by value heads."""
    place = f"{model.root}.layers.{layer}.linear_attn."
    ratio = model.value_heads // model.key_heads
    found: dict[str, list[Tensor]] = {part: [] for part in ("q", "k", "v", "z", "b", "a")}
    if model.flat:
        qkv = tensors[f"{place}in_proj_qkv.weight"]
        keys = model.key_heads * model.key_dim
        found["q"] = list(qkv[:keys].split(model.key_dim))
        found["k"] = list(qkv[keys : 2 * keys].split(model.key_dim))
        found["v"] = list(qkv[2 * keys :].split(model.value_dim))
        found["z"] = list(tensors[f"{place}in_proj_z.weight"].split(model.value_dim))
        found["b"] = list(tensors[f"{place}in_proj_b.weight"].split(1))
        found["a"] = list(tensors[f"{place}in_proj_a.weight"].split(1))
        return found
    for head in tensors[f"{place}in_proj_qkvz.weight"].chunk(model.key_heads):
        sizes = [model.key_dim, model.key_dim, ratio * model.value_dim, ratio * model.value_dim]
        q, k, v, z = head.split(sizes)
        found["q"].append(q)
        found["k"].append(k)
        found["v"] += v.split(model.value_dim)
        found["z"] += z.split(model.value_dim)
    for head in tensors[f"{place}in_proj_ba.weight"].chunk(model.key_heads):
        found["b"] += head[:ratio].split(1)
        found["a"] += head[ratio:].split(1)
    return found


@pytest.mark.parametrize("name", ["next", "3.5", "3.5-tied"])
def test_literal_rows_of_each_rank(name: str, to_megatron, tmp_path: Path) -> None:
    """in_proj of rank r is its heads of q, of k, of v, of z, of b and of a; the norm is one less, in float32."""
    model = DELTAS[name]
    source = delta_models.write(tmp_path / "hf", model)
    to_megatron(model.family, "--model-path", source, "--out", tmp_path / "mt", *RANKS).succeeded()
    tensors = model.tensors()
    heads = projections(model, tensors, 0)
    conv = tensors[f"{model.root}.layers.0.linear_attn.conv1d.weight"]
    keys, values = model.key_heads * model.key_dim, model.value_heads * model.value_dim
    for rank, (folder, found) in enumerate(sorted(read(tmp_path / "mt").items())):
        assert folder == f"mp_rank_{rank:02d}"
        here = "decoder.layers.0.self_attention."
        mine = {part: of[rank * len(of) // 2 : (rank + 1) * len(of) // 2] for part, of in heads.items()}
        assert torch.equal(found[f"{here}in_proj.weight"], torch.cat([row for part in mine.values() for row in part]))
        parts = conv.split([keys, keys, values])
        assert torch.equal(found[f"{here}conv1d.weight"], torch.cat([part.chunk(2)[rank] for part in parts]))
        norm = tensors[f"{model.root}.layers.0.linear_attn.norm.weight"].to(torch.float32) - 1
        assert torch.equal(found[f"{here}out_norm.weight"], norm.to(torch.bfloat16))
        assert {found[f"{here}{name}"].dtype for name in ("A_log", "dt_bias")} == {torch.bfloat16}
        last = len(model.layers) - 1
        q = tensors[f"{model.root}.layers.{last}.self_attn.q_proj.weight"].split(model.head_dim)  # q, gate, q, gate
        k = tensors[f"{model.root}.layers.{last}.self_attn.k_proj.weight"].split(model.head_dim)
        v = tensors[f"{model.root}.layers.{last}.self_attn.v_proj.weight"].split(model.head_dim)
        first = rank * 4
        group = [q[first], q[first + 2], q[first + 1], q[first + 3], k[rank], v[rank]]
        full = found[f"decoder.layers.{last}.self_attention.linear_qkv.weight"]
        assert torch.equal(full, torch.cat(group))


def test_the_vision_part_stays_behind_by_name(to_megatron, to_hf, tmp_path: Path) -> None:
    """It is counted on the way there; without a reference the way back warns; a reference makes it whole."""
    model = DELTAS["3.5-vision"]
    source = delta_models.write(tmp_path / "hf", model)
    (source / "preprocessor_config.json").write_text("{}")
    said = to_megatron(model.family, "--model-path", source, "--out", tmp_path / "mt").succeeded()
    assert "2 tensors that are not the text model's stay behind (model.visual." in said.text
    said = to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "text", "--no_tokenizer").succeeded()
    assert "vision tensors" in said.err
    same({k: v for k, v in model.tensors().items() if "visual" not in k}, hf(tmp_path / "text"))
    to_hf(
        "--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "whole", "--no_tokenizer", "--reference", source,
        "--num_output_shards", "3",
    ).succeeded()  # fmt: skip
    same(model.tensors(), hf(tmp_path / "whole"))
    assert (tmp_path / "whole" / "preprocessor_config.json").is_file()
    written = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (written["image_token_id"], written["vision_config"]) == (61, {"depth": 1})


def test_norms_that_do_not_come_back_are_counted(to_megatron, tmp_path: Path) -> None:
    model = DELTAS["3.6"]
    source = delta_models.write(tmp_path / "hf", model)
    said = to_megatron(model.family, "--model-path", source, "--out", tmp_path / "mt").succeeded()
    values = model.tensors()[f"{model.root}.layers.0.linear_attn.norm.weight"]
    back = ((values.float() - 1).to(torch.bfloat16).float() + 1).to(torch.bfloat16)
    lost = 2 * int((back != values).sum())
    assert lost
    assert f"{lost} of 12 values of decoder.layers.N.self_attention.out_norm.weight do not come back" in said.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key_heads": 3, "value_heads": 3}, ("3 key heads of the linear attention", "3 value heads")),
        ({"key_heads": 1, "value_heads": 2}, ("1 key heads",)),
    ],
)
def test_heads_that_ranks_cannot_share(changes: dict[str, int], words: tuple[str, ...], to_megatron, tmp_path) -> None:
    source = delta_models.write(tmp_path / "hf", Delta(**changes))
    to_megatron("qwen3.5", "--model-path", source, "--out", tmp_path / "mt", *RANKS).refused(*words)
    assert not (tmp_path / "mt").exists()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"layer_types": ["linear_attention", "sliding_attention", "full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"linear_num_value_heads": 5}, "linear_num_value_heads"),
        ({"linear_num_key_heads": None}, "linear_num_key_heads"),
        ({"linear_key_head_dim": "8"}, "linear_key_head_dim"),
        ({"attn_output_gate": False}, "attn_output_gate"),
        ({"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)
def test_configs_that_are_wrong(changes: dict[str, Any], word: str, to_megatron, tmp_path: Path) -> None:
    source = delta_models.write(tmp_path / "hf", Delta())
    raw = json.loads((source / "config.json").read_text())
    raw["text_config"] |= changes
    (source / "config.json").write_text(json.dumps(raw))
    to_megatron("qwen3.5", "--model-path", source, "--out", tmp_path / "mt").refused(word)


def test_prediction_behind_a_linear_layer(to_megatron, tmp_path: Path) -> None:
    """Megatron-Core makes its prediction layer as the last one is; Hugging Face's has full attention."""
    source = delta_models.write(tmp_path / "hf", Delta(layers=(False, True)))
    to_megatron("qwen3.5", "--model-path", source, "--out", tmp_path / "mt").refused("mtp.", "linear attention")


@pytest.mark.parametrize("name", ["next-uneven", "3.5-moe"])
def test_from_layout_to_layout(name: str, to_megatron, to_hf, tmp_path: Path) -> None:
    """Ranks of two sizes, torch_dist between them: the last is as if it were made at once, and the form is kept."""
    model = DELTAS[name]
    source = delta_models.write(tmp_path / "hf", model)
    steps = [[], RANKS, ["--ckpt-format", "torch"], [], [*RANKS, "--expert-model-parallel-size", "2"]]
    place = source
    for number, options in enumerate(steps):
        out = tmp_path / f"mt{number}"
        to_megatron(model.family, "--model-path", place, "--out", out, *options).succeeded()
        place = out
    to_hf("--input_dir", place, "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
    same(model.tensors(), hf(tmp_path / "out"))


def test_the_family_is_known_by_what_it_shows(to_megatron, to_hf, tmp_path: Path) -> None:
    for name in ("next", "3.5"):
        model = DELTAS[name]
        source = delta_models.write(tmp_path / name / "hf", model)
        out = tmp_path / name / "mt"
        to_megatron(model.family, "--model-path", source, "--out", out).succeeded()
        (out / "conversion_manifest.json").unlink()
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        asked = ["--input_dir", out, "--output_dir", tmp_path / "x", "--no_tokenizer", "--true_vocab_size", 64]
        if name == "3.5":
            to_hf(*asked).succeeded()
            continue
        to_hf(*asked).refused("qwen3-next", "qwen3.5-moe", "--model")  # which differ in how Hugging Face spells them


def test_as_a_hybrid_model(to_megatron, to_hf, tmp_path: Path) -> None:
    """G is linear attention; the pattern alone says which layers have it. Another pattern is refused."""
    model = DELTAS["next-uneven"]
    source = delta_models.write(tmp_path / "hf", model)
    asked = [model.family, "--model-path", source, "--out", tmp_path / "mt"]
    to_megatron(*asked, "--hybrid-layer-pattern", "*E*E*E*E").refused("*EGEGE*E")
    said = to_megatron(*asked, "--hybrid-layer-pattern", "*EGEGE*E", "--verify").succeeded()
    assert "--linear-attention-freq" not in said.text
    tensors, args = read_torch_dist(tmp_path / "mt")
    assert (args["hybrid_layer_pattern"], args["linear_attention_freq"]) == ("*EGEGE*E", None)
    literal = {"decoder.layers.2.self_attention.in_proj.weight.z", "decoder.layers.3.mlp.router.weight"}
    assert literal <= tensors.keys()
    to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "out", "--no_tokenizer", "--verify").succeeded()
    same(model.tensors(), hf(tmp_path / "out"))


def test_flags_that_a_run_needs(to_megatron, tmp_path: Path) -> None:
    """None of them is restored from the checkpoint; without most of them a run is silently another model."""
    model = DELTAS["next"]
    source = delta_models.write(tmp_path / "hf", model)
    said = to_megatron(model.family, "--model-path", source, "--out", tmp_path / "mt").succeeded().text
    for flag in (
        "--experimental-attention-variant gated_delta_net", "--linear-attention-freq 3", "--linear-num-key-heads 2",
        "--linear-num-value-heads 6", "--linear-key-head-dim 4", "--linear-value-head-dim 6",
        "--linear-conv-kernel-dim 4", "--attention-output-gate", "--apply-layernorm-1p", "--qk-layernorm",
        "--norm-epsilon 1e-06", "--rotary-percent 0.25", "--moe-shared-expert-gate", "--moe-router-dtype fp32",
        "--mtp-num-layers 1",
    ):  # fmt: skip
        assert flag in said, flag


def test_layers_that_no_number_says(to_megatron, tmp_path: Path) -> None:
    """Megatron-LM's parser takes a list as digits and signs alone: no spaces (_eval_pattern of its arguments.py)."""
    source = delta_models.write(tmp_path / "hf", DELTAS["next-uneven"])
    said = to_megatron("qwen3-next", "--model-path", source, "--out", tmp_path / "mt").succeeded().text
    assert "--linear-attention-freq '([0]*1+[1]*2+[0]*1)' " in said


@pytest.mark.parametrize("name", ["3.5-moe", "3.5-alone"])
def test_float32_values_that_no_narrower_type_holds_are_proved(name: str, to_megatron, to_hf, tmp_path: Path) -> None:
    """Decay and norm, which the hub has in float32 and a bfloat16 run does not: rounded once, and no failed proof."""
    model, random = DELTAS[name], torch.Generator().manual_seed(1)
    folder = delta_models.write(tmp_path / "hf", model)
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in tensors.items():
        if key.endswith(("A_log", "linear_attn.norm.weight")):
            assert tensor.dtype == torch.float32
            tensors[key] = tensor + 0.003 * torch.randn(tensor.shape, generator=random)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    to_megatron(model.family, "--model-path", folder, "--out", tmp_path / "mt", "--verify").succeeded()
    out = ("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "out", "--no_tokenizer", "--verify")
    to_hf(*out).succeeded()
    found = hf(tmp_path / "out")
    for key, tensor in tensors.items():
        wanted = tensor
        if tensor.dtype == torch.float32:
            by = 0 if key.endswith("A_log") else 1  # Megatron stores the norm minus one
            wanted = (tensor - by).to(torch.bfloat16).float() + by
        assert torch.equal(found[key], wanted), key


@pytest.mark.parametrize("name", ["next", "3.5-tied"])
def test_weights_that_are_rounded_are_proved(name: str, to_megatron, to_hf, tmp_path: Path) -> None:
    """Tensors of several parts in float32, to bfloat16 and back; norms stored minus one round as there."""
    model, random = DELTAS[name], torch.Generator().manual_seed(1)
    folder = delta_models.write(tmp_path / "hf", model)
    tensors = load_file(folder / "model.safetensors")
    noise = {key: 0.01 * torch.randn(tensor.shape, generator=random) for key, tensor in tensors.items()}
    save_file({key: tensor.float() + noise[key] for key, tensor in tensors.items()}, folder / "model.safetensors")
    narrow = (model.family, "--model-path", folder, "--verify", "--out")
    to_megatron(*narrow, tmp_path / "mt", "--dtype", "bfloat16").succeeded()
    layout = ("--ckpt-format", "torch", "--pipeline-model-parallel-size", len(model.layers))
    to_megatron(*narrow, tmp_path / "wide", *layout).succeeded()
    for root, options in (("mt", ()), ("wide", ("--dtype", "bfloat16"))):
        out = ("--input_dir", tmp_path / root, "--output_dir", tmp_path / f"{root}-out", "--no_tokenizer", "--verify")
        to_hf(*out, *options).succeeded()
