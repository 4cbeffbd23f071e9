"""Verification: the same models are the same, and each of many seeded faults is found and named at the right place."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
from conftest import GOLDEN, REPOSITORY, Result, Script, run
from golden_llm import FOLDERS, Case
from megatron_files import load_rank, rank_of, save_rank
from safetensors.torch import load_file, save_file
from test_mutations import CUT, MUTATIONS

from weights_conversion.errors import ConversionError
from weights_conversion.verify import verify

TP2_PP2 = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
TP2 = ("--tensor-model-parallel-size", 2)
QKV, GLU = "layers.{}.self_attention.query_key_value.weight", "layers.{}.mlp.dense_h_to_4h.weight"
Ranks = dict[tuple[int, int], dict[str, Any]]


def check(source: Path, checkpoint: Path, *options: Any) -> Result:
    return run("weights_conversion.verify", source, checkpoint, "--workers", 2, *options)


def findings(result: Result, file: Path) -> dict[str, Any]:
    assert result.code in (0, 1), result.text
    return json.loads(file.read_text())


# --- no false alarm ---------------------------------------------------------------------------------------------------

LAYOUTS = [(), TP2, TP2_PP2]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["whole", "tp2", "tp2pp2"])
@pytest.mark.parametrize("name", tm.MODELS)
def test_conversions_are_the_same(name: str, layout: tuple[Any, ...], imported, sources, tmp_path: Path) -> None:
    model = tm.MODELS[name]
    if model.groups == 1:
        layout = layout[2:]
    checkpoint = imported(name, *layout)
    result = check(sources(name), checkpoint, "--json", tmp_path / "found.json")
    assert result.code == 0, result.text
    found = findings(result, tmp_path / "found.json")
    assert (found["same"], found["verdict"], found["causes"]) == (True, "identical", [])
    assert found["exact"]["tensors"] == len(model.tensors())
    assert found["exact"]["differences"] == found["exact"]["padding"] == found["exact"]["copies"] == []
    assert found["config"]["problems"] == []
    assert found["numeric"]["error"] < 2e-5
    assert "IDENTICAL" in result.out
    assert "differ" not in result.out


@pytest.mark.parametrize("name", tm.MODELS)
def test_exports_are_the_same(name: str, imported, sources, to_hf: Script, tmp_path: Path) -> None:
    model = tm.MODELS[name]
    checkpoint = imported(name, *(TP2_PP2[2:] if model.groups == 1 else TP2_PP2))
    to_hf(
        "--input_dir", checkpoint, "--output_dir", tmp_path / "hf", "--model", model.family, "--no_tokenizer",
        "--num_output_shards", 3,
    ).succeeded()  # fmt: skip
    for one, two in ((checkpoint, tmp_path / "hf"), (tmp_path / "hf", checkpoint), (sources(name), tmp_path / "hf")):
        result = check(one, two)
        assert result.code == 0, result.text


@pytest.mark.parametrize("folder", FOLDERS)
def test_golden_cases_are_the_same(folder: str, tmp_path: Path) -> None:
    case = Case(folder.split("/")[0])
    source = case.folder / ("meta" if case.meta else "hf")
    found = verify(source, GOLDEN / folder, case.family)
    assert found.exact is not None
    assert found.exact.same
    assert not found.exact.recast
    assert not found.causes
    if case.meta:
        # The original wrote its own epsilon over Meta's, which is a difference indeed, and the only one.
        assert found.config_problems == ["layernorm_epsilon is 1e-06 in the source and 1e-05 in the checkpoint"]
        assert found.numeric is not None
        assert "layernorm_epsilon" in (found.numeric.cause or "")
        return
    assert found.same, found.text()
    assert verify(GOLDEN / folder, source).same


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_recasts_are_the_same(
    stored: torch.dtype, dtype: str, to_megatron: Script, to_hf: Script, tmp_path: Path
) -> None:
    model = tm.with_dtype(tm.MODELS["llama2-gqa"], stored)
    source = tm.write_huggingface(tmp_path / "hf", model)
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "mt", "--dtype", dtype, *TP2_PP2).succeeded()
    exact = torch.finfo(getattr(torch, dtype)).eps <= torch.finfo(stored).eps and dtype != "float16"
    to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "back", "--no_tokenizer").succeeded()
    for one, two in ((source, tmp_path / "mt"), (tmp_path / "mt", source), (source, tmp_path / "back")):
        result = check(one, two, "--json", tmp_path / "found.json")
        found = findings(result, tmp_path / "found.json")
        assert result.code == 0, result.text
        if exact or stored == getattr(torch, dtype):
            assert found["verdict"] == "identical"
        elif stored is torch.float32:
            assert found["verdict"] == "equal after rounding"
            assert "equal after rounding" in result.out
            assert "largest error" in result.out
            worst = max(entry["largest_relative_error"] for entry in found["exact"]["recast"])
            normal = dtype == "bfloat16"
            assert 0 < worst <= (torch.finfo(getattr(torch, dtype)).eps if normal else 1)


def test_mean_rows_and_new_tokens(to_megatron: Script, sources, to_hf: Script, tmp_path: Path) -> None:
    for number, options in enumerate(
        (["--new-rows", "mean"], ["--true-vocab-size", 325], ["--true-vocab-size", 325, "--new-rows", "mean"])
    ):
        out = tmp_path / f"mt{number}"
        to_megatron("llama2", "--model-path", sources("llama2-gqa"), "--out", out, *TP2, *options).succeeded()
        result = check(sources("llama2-gqa"), out)
        assert result.code == 0, result.text
        assert ("the mean row" if "mean" in options else "the last row") in result.out
        to_hf("--input_dir", out, "--output_dir", tmp_path / f"hf{number}", "--no_tokenizer").succeeded()
        result = check(out, tmp_path / f"hf{number}")
        assert result.code == 0, result.text


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_meta(parts: int, to_megatron: Script, to_hf: Script, tmp_path: Path) -> None:
    tm.write_meta(tmp_path / "meta", tm.MODELS["llama2-gqa"], parts)
    to_megatron("llama2", "--cache-dir", tmp_path / "meta", "--out", tmp_path / "mt", *TP2_PP2).succeeded()
    to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "hf", "--no_tokenizer").succeeded()
    for one, two in (("meta", "mt"), ("meta", "hf"), ("hf", "meta"), ("mt", "hf")):
        result = check(tmp_path / one, tmp_path / two, "--model", "llama2")
        assert result.code == 0, result.text


def test_virtual_stages(imported, sources) -> None:
    layout = ["--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1]
    result = check(sources("llama2-gqa"), imported("llama2-gqa", *layout, *TP2))
    assert result.code == 0, result.text
    assert "TP 2 PP 2 VPP 2" in result.out


# --- seeded faults in a Megatron checkpoint ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """An edit of all ranks' contents, and what the report must say (regular expressions)."""

    edit: Callable[[Ranks], None]
    expected: tuple[str, ...]
    model: str = "llama2-gqa"
    layout: tuple[Any, ...] = TP2_PP2
    numeric: tuple[str, int | None, str | None] | None = None  # stage, layer, cause


def stack(ranks: Ranks, tp: int, pp: int) -> dict[str, torch.Tensor]:
    return ranks[tp, pp]["model"]["language_model"]["encoder"]


def each(ranks: Ranks, name: str, pp: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for tp, stage in ranks:
        if stage == pp:
            tensors = stack(ranks, tp, stage)
            tensors[name] = change(tensors[name]).contiguous()


def swap_gate_and_up(ranks: Ranks) -> None:
    each(ranks, GLU.format(1), 0, lambda t: t.roll(t.shape[0] // 2, 0))


def undo_rotary(head: slice) -> Callable[[Ranks], None]:
    """q or k of layer 2 (local 0 of stage 1) as Hugging Face has them: heads of 8 rows, groups of [q, q, k, v]."""

    def edit(ranks: Ranks) -> None:
        def change(t: torch.Tensor) -> torch.Tensor:
            groups = t.clone().unflatten(0, (-1, 4, 8))
            part = groups[:, head]
            groups[:, head] = part.unflatten(2, (4, 2)).transpose(2, 3).flatten(2, 3)
            return groups.flatten(0, 2)

        each(ranks, QKV.format(0), 1, change)

    return edit


def ungroup(ranks: Ranks) -> None:
    """[q .. q, k, v] of each group becomes all q, all k, all v."""

    def change(t: torch.Tensor) -> torch.Tensor:
        groups = t.unflatten(0, (-1, 4, 8))
        return torch.cat([groups[:, :2].flatten(0, 2), groups[:, 2].flatten(0, 1), groups[:, 3].flatten(0, 1)])

    each(ranks, QKV.format(0), 0, change)


def swap_groups(ranks: Ranks) -> None:
    each(ranks, QKV.format(1), 1, lambda t: t.unflatten(0, (2, -1)).flip(0).flatten(0, 1))


def exchange_ranks(ranks: Ranks) -> None:
    for pp in (0, 1):
        ranks[0, pp]["model"], ranks[1, pp]["model"] = ranks[1, pp]["model"], ranks[0, pp]["model"]


def exchange_ranks_of(name: str, pp: int) -> Callable[[Ranks], None]:
    def edit(ranks: Ranks) -> None:
        one, two = stack(ranks, 0, pp), stack(ranks, 1, pp)
        one[name], two[name] = two[name], one[name]

    return edit


def exchange_layers(ranks: Ranks) -> None:
    """Global layers 1 (local 1 of stage 0) and 2 (local 0 of stage 1)."""
    for tp in (0, 1):
        one, two = stack(ranks, tp, 0), stack(ranks, tp, 1)
        for name in [name for name in one if name.startswith("layers.1.")]:
            other = name.replace("layers.1.", "layers.0.")
            one[name], two[other] = two[other], one[name]


def flip_bit(ranks: Ranks) -> None:
    tensor = stack(ranks, 1, 1)["layers.1.mlp.dense_4h_to_h.weight"]  # columns 40 to 79 of layer 3
    tensor.view(torch.int16)[5, 7] ^= 1


def set_value(value: float) -> Callable[[Ranks], None]:
    def edit(ranks: Ranks) -> None:
        stack(ranks, 0, 0)["layers.1.self_attention.dense.weight"][9, 3] = value

    return edit


def shift_padding(ranks: Ranks) -> None:
    """512 rows for 320 tokens, 256 on each rank: row 320, the first of padding, is row 64 of rank 1."""
    for pp, name in ((0, "embedding"), (1, "lm_head")):
        part = ranks[1, pp]["model"]["language_model"]
        table = part["embedding"]["word_embeddings"]["weight"] if name == "embedding" else part["lm_head"]
        table[64] = table[62]


def shift_rows(ranks: Ranks) -> None:
    parts = [ranks[tp, 0]["model"]["language_model"]["embedding"]["word_embeddings"] for tp in (0, 1)]
    table = torch.cat([part["weight"] for part in parts])
    moved = torch.cat([table[:1], table[:-1]])
    for part, rows in zip(parts, moved.chunk(2), strict=True):
        part["weight"] = rows.clone()


def norm_of_ones(ranks: Ranks) -> None:
    each(ranks, "layers.1.post_attention_layernorm.weight", 0, torch.ones_like)


def final_norm_of_ones(ranks: Ranks) -> None:
    each(ranks, "final_layernorm.weight", 1, torch.ones_like)


def wrong_norm(ranks: Ranks) -> None:
    for tp in (0, 1):
        tensors = stack(ranks, tp, 1)
        tensors["layers.0.input_layernorm.weight"] = tensors["layers.0.post_attention_layernorm.weight"].clone()


def norm_of_one_rank(ranks: Ranks) -> None:
    stack(ranks, 1, 0)["layers.0.input_layernorm.weight"][3] += 1


def tie_head(ranks: Ranks) -> None:
    for tp in (0, 1):
        table = ranks[tp, 0]["model"]["language_model"]["embedding"]["word_embeddings"]["weight"]
        ranks[tp, 1]["model"]["language_model"]["lm_head"] = table.clone()


def stale_rank(ranks: Ranks) -> None:
    generator = torch.Generator().manual_seed(1)
    for tensor in stack(ranks, 1, 0).values():
        if tensor.dim() == 2:
            tensor += (0.01 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)


def cut_as_one_block(ranks: Ranks) -> None:
    """Rank 0 holds all of up, rank 1 all of gate: [up ; gate] cut in the middle."""
    one, two = stack(ranks, 0, 0), stack(ranks, 1, 0)
    name = GLU.format(0)
    (up_0, gate_0), (up_1, gate_1) = one[name].chunk(2), two[name].chunk(2)
    one[name], two[name] = torch.cat([up_0, up_1]), torch.cat([gate_0, gate_1])


def falcon_copy(ranks: Ranks) -> None:
    ranks[0, 1]["model"]["word_embeddings_for_head"]["weight"][11, 2] += 1


def falcon_bias(ranks: Ranks) -> None:
    each(ranks, "layers.1.input_layernorm.bias", 0, torch.zeros_like)


def falcon_norms(ranks: Ranks) -> None:
    tensors = stack(ranks, 0, 0)
    for kind in ("weight", "bias"):
        one, two = f"layers.0.input_layernorm.{kind}", f"layers.0.mlp_layernorm.{kind}"
        tensors[one], tensors[two] = tensors[two], tensors[one]


HF_LAYER = r"model\.layers\.{}\."
FAULTS: dict[str, Fault] = {
    "gate and up swapped": Fault(
        swap_gate_and_up,
        (r"layers\.1\.mlp\.gate_proj.*gate and up are swapped", r"mp_rank_00_000"),
        numeric=("mlp", 1, "gate and up are swapped"),
    ),
    "q not permuted": Fault(
        undo_rotary(slice(0, 2)),
        (r"layers\.2\.self_attn\.q_proj.*other rotary order", r"1 of 39 tensors"),
        numeric=("attention", 2, None),
    ),
    "k not permuted": Fault(
        undo_rotary(slice(2, 3)),
        (r"layers\.2\.self_attn\.k_proj.*other rotary order", r"1 of 39 tensors"),
        numeric=("attention", 2, None),
    ),
    "q and k not permuted": Fault(
        undo_rotary(slice(0, 3)),
        (r"layers\.2\.self_attn\.k_proj.*other rotary order", r"2 of 39 tensors"),
        numeric=("attention", 2, "rotary order"),
    ),
    "groups mixed": Fault(
        ungroup,
        (r"layers\.0\.self_attn\.v_proj.*query groups",),
        numeric=("attention", 0, None),
    ),
    "groups not grouped": Fault(
        ungroup,
        (r"layers\.0\.self_attn\.v_proj.*query groups",),
        layout=(),
        numeric=("attention", 0, "not grouped"),
    ),
    "groups exchanged": Fault(
        swap_groups,
        (r"layers\.3\.self_attn\.q_proj.*whole heads are in another order",),
        numeric=("attention", 3, None),
    ),
    "tensor ranks exchanged": Fault(
        exchange_ranks,
        (
            r"embed_tokens.*the parts of tensor ranks 0 and 1",
            r"layers\.0\.mlp\.down_proj.*the parts of tensor ranks 0 and 1",
        ),
        numeric=("embedding", None, "tensor ranks 0 and 1 are exchanged"),
    ),
    "a tensor's ranks exchanged by columns": Fault(
        exchange_ranks_of("layers.1.mlp.dense_4h_to_h.weight", 1),
        (r"layers\.3\.mlp\.down_proj.*the parts of tensor ranks 0 and 1",),
        numeric=("mlp", 3, "tensor ranks 0 and 1 are exchanged"),
    ),
    "layers exchanged": Fault(
        exchange_layers,
        (r"layers 1 and 2 are exchanged",),
        numeric=("attention_norm", 1, "stand at layer 2"),
    ),
    "one bit": Fault(
        flip_bit,
        (r"layers\.3\.mlp\.down_proj.*1 of 5,120 values.*row 5 column 47.*mp_rank_01_001.*one bit is flipped",),
    ),
    "a NaN": Fault(
        set_value(float("nan")),
        (
            r"layers\.1\.self_attn\.o_proj.*first at row 9 column 3.*mp_rank_00_000.*NaN",
            r"not finite  model\.layers\.1\.self_attn\.o_proj\.weight: 0 values in the source, 1 in the checkpoint",
        ),
        numeric=("attention", 1, None),
    ),
    "an infinity": Fault(
        set_value(float("inf")),
        (r"layers\.1\.self_attn\.o_proj.*row 9 column 3", r"not finite"),
        numeric=("attention", 1, None),
    ),
    "padding off by one": Fault(
        shift_padding,
        (
            r"padding .*embedding.word_embeddings.weight rows 320 to 511.*1 do not.*row 320 in release/mp_rank_01_000",
            r"padding .*lm_head rows 320 to 511",
        ),
    ),
    "vocabulary off by one": Fault(
        shift_rows,
        (r"embed_tokens.*rows are shifted by 1",),
        numeric=("embedding", None, None),
    ),
    "a norm of ones": Fault(
        norm_of_ones,
        (r"layers\.1\.post_attention_layernorm.*all ones",),
        numeric=("mlp_norm", 1, "all ones"),
    ),
    "the final norm of ones": Fault(
        final_norm_of_ones,
        (r"model\.norm\.weight.*all ones",),
        numeric=("final_norm", None, "all ones"),
    ),
    "the wrong norm": Fault(
        wrong_norm,
        (r"layers\.2\.input_layernorm.*it holds the source's model\.layers\.2\.post_attention_layernorm\.weight",),
        numeric=("attention_norm", 2, None),
    ),
    "one rank's norm": Fault(
        norm_of_one_rank,
        (r"copies .*layers\.0\.input_layernorm\.weight differs between .*mp_rank_00_000.*mp_rank_01_000",),
    ),
    "head tied by mistake": Fault(
        tie_head,
        (r"lm_head\.weight.*a head tied by mistake",),
        numeric=("logits", None, "tied by mistake"),
    ),
    "a stale rank": Fault(
        stale_rank,
        (r"all that differs stands in release/mp_rank_01_000, of 4.*may be stale",),
        numeric=("attention", 0, None),
    ),
    "GLU cut as one block": Fault(
        cut_as_one_block,
        (r"layers\.0\.mlp\.gate_proj.*cut among ranks as one block",),
        numeric=("mlp", 0, "as one block"),
    ),
    "the tied copy": Fault(
        falcon_copy,
        (r"copies .*embedding\.word_embeddings\.weight differs between .*mp_rank_00_000.*mp_rank_00_001",),
        model="falcon-7b",
        layout=TP2_PP2[2:],
        numeric=("logits", None, None),
    ),
    "a norm's bias": Fault(
        falcon_bias,
        (r"transformer\.h\.1\.input_layernorm\.bias.*all zeros",),
        model="falcon-7b",
        layout=(),
        numeric=("attention_norm", 1, None),
    ),
    "falcon's two norms exchanged": Fault(
        falcon_norms,
        (r"transformer\.h\.0\.ln_attn\.weight.*it holds the source's transformer\.h\.0\.ln_mlp\.weight",),
        model="falcon-40b",
        layout=(),
        numeric=("attention_norm", 0, None),
    ),
}


def edited(root: Path, out: Path, edit: Callable[[Ranks], None]) -> Path:
    """A copy of a checkpoint of ours, changed."""
    shutil.copytree(root, out)
    files = {rank_of(path.parent.name): path for path in out.glob("*/mp_rank_*/*.pt")}
    ranks = {rank: load_rank(path) for rank, path in files.items()}
    edit(ranks)
    for rank, path in files.items():
        save_rank(ranks[rank], path)
    return out


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str, imported, sources, tmp_path: Path) -> None:
    fault = FAULTS[name]
    broken = edited(imported(fault.model, *fault.layout), tmp_path / "broken", fault.edit)
    result = check(sources(fault.model), broken, "--json", tmp_path / "found.json")
    assert (result.code, result.err) == (1, ""), result.text
    assert "DIFFERENT" in result.out
    for pattern in fault.expected:
        assert re.search(pattern, result.out), f"{pattern}\n{result.out}"
    found = findings(result, tmp_path / "found.json")
    assert found["same"] is False
    numeric = found["numeric"]
    if fault.numeric is None:
        assert numeric["same"] or name == "one bit", "in a place that the forward pass does not reach"
        return
    stage, layer, cause = fault.numeric
    assert (numeric["stage"], numeric["layer"]) == (stage, layer), result.out
    if cause is not None:
        assert cause in (numeric["cause"] or ""), result.out


def test_editing_alone_is_no_fault(imported, sources, tmp_path: Path) -> None:
    same = edited(imported("llama2-gqa", *TP2_PP2), tmp_path / "same", lambda ranks: None)
    assert check(sources("llama2-gqa"), same).code == 0


# --- Megatron-Core ----------------------------------------------------------------------------------------------------

CORE = {
    "torch_dist": ("--target", "megatron-core"),
    "torch": ("--target", "megatron-core", "--ckpt-format", "torch", *TP2_PP2),
}


@pytest.mark.parametrize("kind", CORE)
@pytest.mark.parametrize("name", ["llama", "llama2-gqa", "codellama-34b", "mistral-v0.1", "llama2-linear"])
def test_megatron_core_is_the_same(name: str, kind: str, imported, sources, to_hf: Script, tmp_path: Path) -> None:
    core, family = imported(name, *CORE[kind]), tm.MODELS[name].family
    to_hf("--input_dir", core, "--output_dir", tmp_path / "hf", "--model", family, "--no_tokenizer").succeeded()
    pairs = [(sources(name), core), (imported(name, *TP2), core), (core, imported(name)), (core, tmp_path / "hf")]
    for one, two in pairs:
        result = check(one, two)
        assert result.code == 0, result.text
        assert "IDENTICAL" in result.out
    assert "Megatron-Core" in result.out


def core_gate_and_up(tensors: dict[str, torch.Tensor]) -> None:
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    tensors[name] = tensors[name].roll(tensors[name].shape[0] // 2, 0)


def core_rotary(tensors: dict[str, torch.Tensor]) -> None:
    """As Megatron-LLM has them: neighbouring rows are pairs."""
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    groups = tensors[name].clone().unflatten(0, (-1, 4, 8))
    groups[:, :3] = groups[:, :3].unflatten(2, (2, 4)).transpose(2, 3).flatten(2, 3)
    tensors[name] = groups.flatten(0, 2)


def core_spelling(tensors: dict[str, torch.Tensor]) -> None:
    """The spelling of the local layer spec."""
    for name in tensors:
        if name.endswith("layers.1.pre_mlp_layernorm.weight"):
            tensors[name] += 1


@pytest.mark.parametrize(
    ("edit", "expected", "numeric"),
    [
        (
            core_gate_and_up,
            r"layers\.1\.mlp\.gate_proj.*gate and up are swapped",
            ("mlp", 1, "gate and up are swapped"),
        ),
        (core_rotary, r"layers\.1\.self_attn\.q_proj.*other rotary order", ("attention", 1, "rotary order")),
        (core_spelling, r"copies .*linear_fc1.layer_norm_weight.*pre_mlp_layernorm", None),
    ],
)
def test_megatron_core_fault(edit: Any, expected: str, numeric: Any, imported, sources, tmp_path: Path) -> None:
    def change(ranks: Ranks) -> None:
        for (_, stage), content in ranks.items():
            if stage == 0:
                edit(content["model"])

    broken = edited(imported("llama2-gqa", *CORE["torch"]), tmp_path / "broken", change)
    result = check(sources("llama2-gqa"), broken, "--json", tmp_path / "found.json")
    assert result.code == 1, result.text
    assert re.search(expected, result.out), result.out
    found = findings(result, tmp_path / "found.json")["numeric"]
    assert found["same"] is (numeric is None)
    if numeric is not None:
        stage, layer, cause = numeric
        assert (found["stage"], found["layer"]) == (stage, layer)
        assert cause in found["cause"]


@pytest.mark.parametrize("name", ["gate and up swapped", "rotary permutation dropped", "groups mixed"])
def test_forward_is_independent_of_the_mapping_to_core(
    name: str, sources, to_megatron: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron-Core has Hugging Face's rotary order, so nothing is permuted and nothing can be dropped."""
    MUTATIONS[name](monkeypatch)
    out = tmp_path / "mt"
    to_megatron("llama2", "--model-path", sources("llama2-gqa"), "--out", out, *CORE["torch_dist"]).succeeded()
    result = check(sources("llama2-gqa"), out)
    assert result.code == (0 if name == "rotary permutation dropped" else 1), result.text
    if result.code:
        assert "the sides part at layer 0" in result.out


def test_whatever_training_loads_is_there(imported, sources, tmp_path: Path) -> None:
    """Files that hold Transformer Engine's states alone too: no conversion reads them, and training stops at them."""
    whole = imported("llama2-gqa", *CORE["torch_dist"])
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.suffix in (".distcp", ".pt")]
    assert len(files) > 2
    for file in files:
        for lost in (1, None):
            broken = tmp_path / f"{file.name}-{lost}"
            shutil.copytree(whole, broken)
            if lost is None:
                (broken / file).unlink()
            else:
                os.truncate(broken / file, (broken / file).stat().st_size - lost)
            check(sources("llama2-gqa"), broken).refused(file.name, code=2)
            shutil.rmtree(broken)


def test_a_proof_of_an_export_needs_what_was_read(imported, to_hf: Script, tmp_path: Path) -> None:
    """Its source may lack Transformer Engine's states: the export is made of none, and would be refused when written.

    Where the source is compared on its own, they are told.
    """
    source, out = tmp_path / "mt", tmp_path / "hf"
    shutil.copytree(imported("llama2-gqa", *CORE["torch_dist"]), source)
    (source / "release/__0_0.distcp").unlink()
    to_hf("--input_dir", source, "--output_dir", out, "--no_tokenizer", "--verify").succeeded()
    check(source, out).refused("__0_0.distcp", "is not there", "states of Transformer Engine", code=2)


# --- configs ----------------------------------------------------------------------------------------------------------

CONFIG_FAULTS: dict[str, tuple[str, dict[str, Any], str, str | None]] = {
    # model, change of manifest and args, what the report says, whose stage parts
    "theta": ("codellama", {"rope_theta": 10000.0}, "rope_theta is 1000000.0 in the source and 10000.0", "attention"),
    "eps": (
        "llama2-gqa",
        {"layernorm_epsilon": 1e-3},
        "layernorm_epsilon is 1e-05 in the source and 0.001",
        "attention_norm",
    ),
    "scaling": (
        "llama2-linear",
        {"rope_scaling_factor": 1.0},
        "rope_scaling_factor is 4.0 in the source and 1.0",
        "attention",
    ),
    "window": ("mistral-v0.1", {"sliding_window": 16}, "sliding_window is 4096 in the source and 16", "attention"),
    "context": (
        "llama2",
        {"max_position_embeddings": 2048},
        "max_position_embeddings is 4096 in the source and 2048",
        None,
    ),
}
ARGS = {"sliding_window": "sliding_window_size"}


@pytest.mark.parametrize("both", [True, False], ids=["manifest and args", "args alone"])
@pytest.mark.parametrize("name", CONFIG_FAULTS)
def test_config_fault_is_found(name: str, both: bool, imported, sources, tmp_path: Path) -> None:
    model, change, sentence, stage = CONFIG_FAULTS[name]

    def edit(ranks: Ranks) -> None:
        for content in ranks.values():
            for field, value in change.items():
                setattr(content["args"], ARGS.get(field, field), value)

    broken = edited(imported(model), tmp_path / "broken", edit)
    if both:
        manifest = tm.read_json(broken / "conversion_manifest.json")
        manifest["model"] |= change
        tm.write_json(broken / "conversion_manifest.json", manifest)
    result = check(sources(model), broken, "--json", tmp_path / "found.json")
    assert result.code == 1, result.text
    found = findings(result, tmp_path / "found.json")
    assert found["exact"]["same"] is True
    (field,) = change
    if not both:
        assert re.search(f"contradicts itself: {field} is .* in its manifest and .* in its args", result.out), (
            result.out
        )
        return
    assert sentence in result.out
    assert found["config"]["fields"][field]["same"] is False
    numeric = found["numeric"]
    assert (numeric["stage"] if not numeric["same"] else None) == stage, result.out
    if stage:
        assert field in numeric["cause"]


def test_config_of_an_export(imported, sources, to_hf: Script, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    to_hf(
        "--input_dir", imported("mistral-v0.1"), "--output_dir", out, "--model", "mistral", "--no_tokenizer"
    ).succeeded()
    config = tm.read_json(out / "config.json")
    tm.write_json(out / "config.json", config | {"sliding_window": None})
    result = check(imported("mistral-v0.1"), out)
    assert result.code == 1
    assert "sliding_window is 4096 in the source and None in the checkpoint" in result.out


def test_tied_head_by_config(imported, sources, to_hf: Script, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    to_hf("--input_dir", imported("llama2"), "--output_dir", out, "--no_tokenizer").succeeded()
    config = tm.read_json(out / "config.json") | {"tie_word_embeddings": True}
    tm.write_json(out / "config.json", config)
    result = check(sources("llama2"), out)
    assert result.code == 1
    assert "tie_word_embeddings is False in the source and True in the checkpoint" in result.out
    assert re.search(r"copies .*embed_tokens.weight differs between .*lm_head.weight", result.out), result.out


def test_other_shapes(imported, sources) -> None:
    result = check(sources("llama2"), imported("llama2-gqa"), "--model", "llama2")
    assert result.code == 1
    assert "num_layers is 2 in the source and 4 in the checkpoint" in result.out
    assert "not compared" in result.out


def test_vocabulary_that_lost_a_row(imported, sources, to_hf: Script, tmp_path: Path) -> None:
    cut = ["--true_vocab_size", 319, "--no_tokenizer"]
    to_hf("--input_dir", imported("llama2-gqa"), "--output_dir", tmp_path / "hf", *cut).succeeded()
    for source in (sources("llama2-gqa"), imported("llama2-gqa")):
        result = check(source, tmp_path / "hf")
        assert result.code == 1
        assert "vocab_size is 320 in the source and 319 in the checkpoint" in result.out


# --- faults in a Hugging Face folder ----------------------------------------------------------------------------------


def hf_fault(change: Callable[[tm.Tensors], None], name: str, to_hf: Script, imported, tmp_path: Path) -> Result:
    out = tmp_path / "hf"
    model = tm.MODELS[name]
    to_hf("--input_dir", imported(name), "--output_dir", out, "--model", model.family, "--no_tokenizer").succeeded()
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, out / "model.safetensors")
    return check(imported(name), out)


def test_export_without_permutation(to_hf: Script, imported, tmp_path: Path) -> None:
    def change(tensors: tm.Tensors) -> None:
        for part in "qk":
            name = f"model.layers.0.self_attn.{part}_proj.weight"
            tensors[name] = tensors[name].unflatten(0, (-1, 2, 4)).transpose(1, 2).flatten(0, 2)

    result = hf_fault(change, "llama2-gqa", to_hf, imported, tmp_path)
    assert result.code == 1
    assert re.search(r"layers\.0\.self_attn\.q_proj.*other rotary order", result.out), result.out
    assert re.search(r"part at layer 0 attention.*\n.*rotary order", result.out), result.out


def test_export_with_gate_and_up_swapped(to_hf: Script, imported, tmp_path: Path) -> None:
    def change(tensors: tm.Tensors) -> None:
        one, two = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
        tensors[one], tensors[two] = tensors[two], tensors[one]

    result = hf_fault(change, "llama2", to_hf, imported, tmp_path)
    assert result.code == 1
    assert re.search(r"part at layer 1 mlp.*\n.*gate and up are swapped", result.out), result.out


def test_half_precision_overflow(tmp_path: Path, to_megatron: Script) -> None:
    model = tm.with_dtype(tm.MODELS["llama2"], torch.float32)
    tensors = dict(model.tensors())
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1e6
    source = tm.write_huggingface(tmp_path / "hf", model, tensors=tensors)
    half = ["--dtype", "float16"]
    refused = to_megatron("llama2", "--model-path", source, "--out", tmp_path / "refused", *half)
    refused.refused("final_layernorm", "too large for torch.float16")
    assert not (tmp_path / "refused").exists()
    small = tm.write_huggingface(tmp_path / "small", model)
    to_megatron("llama2", "--model-path", small, "--out", tmp_path / "mt", *half).succeeded()

    def edit(ranks: Ranks) -> None:
        stack(ranks, 0, 0)["final_layernorm.weight"].fill_(float("inf"))

    result = check(source, edited(tmp_path / "mt", tmp_path / "infinite", edit))
    assert result.code == 1
    assert re.search(r"model\.norm\.weight.*NaN or infinite on one side", result.out), result.out
    assert "not finite  model.norm.weight: 0 values in the source, 64 in the checkpoint" in result.out


def test_recast_that_is_wrong_in_one_place(imported, sources, to_megatron: Script, tmp_path: Path) -> None:
    """A value one rounding step away from the right one."""
    to_megatron(
        "llama2", "--model-path", sources("llama2"), "--out", tmp_path / "mt", "--dtype", "bfloat16"
    ).succeeded()

    def edit(ranks: Ranks) -> None:
        stack(ranks, 0, 0)["layers.1.self_attention.dense.weight"].view(torch.int16)[8, 4] += 1

    result = check(sources("llama2"), edited(tmp_path / "mt", tmp_path / "broken", edit))
    assert result.code == 1
    pattern = r"layers\.1\.self_attn\.o_proj\.weight \(float32 and bfloat16\): 1 of .* differ, first at row 8 column 4"
    assert re.search(pattern, result.out), result.out


@pytest.mark.parametrize(("stored", "wide"), [(torch.bfloat16, "float32"), (torch.bfloat16, "float16")])
def test_damage_to_a_widened_checkpoint(stored: torch.dtype, wide: str, to_megatron: Script, tmp_path: Path) -> None:
    """The lowest bit, which rounding back to the source's dtype would hide."""
    source = tm.write_huggingface(tmp_path / "hf", tm.with_dtype(tm.MODELS["llama2"], stored))
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "mt", "--dtype", wide).succeeded()

    def edit(ranks: Ranks) -> None:
        tensor = stack(ranks, 0, 0)["layers.1.self_attention.dense.weight"]
        tensor.view(torch.int32 if wide == "float32" else torch.int16)[8, 4] ^= 1

    result = check(source, edited(tmp_path / "mt", tmp_path / "broken", edit))
    assert result.code == 1, result.text
    assert re.search(r"layers\.1\.self_attn\.o_proj\.weight.*: 1 of .* differ, first at row 8 column 4", result.out)


def test_not_a_number_on_both_sides(tmp_path: Path, to_megatron: Script) -> None:
    model = tm.MODELS["llama2-gqa"]
    tensors = {name: tensor.clone() for name, tensor in model.tensors().items()}
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    source = tm.write_huggingface(tmp_path / "hf", model, tensors=tensors)
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "mt", *TP2).succeeded()
    result = check(source, tmp_path / "mt")
    assert result.code == 0, result.text
    assert "not finite  model.layers.2.mlp.up_proj.weight: 1 values in the source, 1 in the checkpoint" in result.out


# --- mistakes of the converter itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MUTATIONS)
def test_forward_is_independent_of_the_mapping(
    name: str, sources, to_megatron: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same mistake in writing and in reading is invisible to the comparison of weights, but not to the forward."""
    MUTATIONS[name](monkeypatch)
    to_megatron("llama2", "--model-path", sources("llama2-gqa"), "--out", tmp_path / "mt", *CUT).succeeded()
    result = check(sources("llama2-gqa"), tmp_path / "mt", "--json", tmp_path / "found.json")
    found = findings(result, tmp_path / "found.json")
    assert result.code == 1, result.text
    if name != "groups mixed":  # this one only changes the way there
        assert found["exact"]["same"] is True
        assert "that mapping is wrong" in result.out or found["numeric"]["cause"], result.out
    assert found["numeric"]["same"] is False
    cause = {
        "gate and up swapped": "gate and up are swapped",
        "rotary permutation dropped": "rotary order",
        "GLU cut as one block": "one block",
    }.get(name, "")
    assert cause in (found["numeric"]["cause"] or ""), result.out


# --- files, command line ----------------------------------------------------------------------------------------------


def test_checksums(imported, sources, tmp_path: Path) -> None:
    import hashlib

    out = tmp_path / "mt"
    shutil.copytree(imported("llama2"), out)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(out)}" for path in files]
    (out / "checksums.sha256").write_text("\n".join(lines) + "\n")
    result = check(sources("llama2"), out)
    assert result.code == 0, result.text
    assert "checksums.sha256 agrees" in result.out
    tracker = out / "latest_checkpointed_iteration.txt"
    tracker.write_text("release ")
    result = check(sources("llama2"), out)
    assert result.code == 1, result.text
    assert tracker.name in result.out
    (out / "checksums.sha256").write_text(f"{'0' * 64}  ../x\n{'0' * 64}  missing.txt\nnonsense\n")
    result = check(sources("llama2"), out)
    assert result.code == 1
    assert "line 1" in result.out
    assert "missing.txt" in result.out
    assert "line 3" in result.out


def test_stale_iteration_is_refused(imported, sources, tmp_path: Path) -> None:
    def edit(ranks: Ranks) -> None:
        ranks[1, 0]["iteration"] = 400

    result = check(sources("llama2-gqa"), edited(imported("llama2-gqa", *TP2_PP2), tmp_path / "mt", edit))
    result.refused("mp_rank_01_000", "iteration 400", code=2)


def test_unreadable_sides(imported, sources, tmp_path: Path) -> None:
    check(tmp_path / "nowhere", imported("llama2")).refused("nowhere", code=2)
    check(tmp_path, imported("llama2")).refused("is no checkpoint", code=2)
    check(sources("mistral-v0.1"), imported("llama2")).refused("mistral", "llama2", code=2)
    cut = tmp_path / "cut"
    shutil.copytree(imported("llama2"), cut)
    file = next(cut.glob("*/*/*.pt"))
    file.write_bytes(file.read_bytes()[:5000])
    check(sources("llama2"), cut).refused("model_optim_rng.pt", code=2)
    with pytest.raises(ConversionError):
        verify(sources("llama2"), tmp_path)


def test_inconsistent_source(imported, to_hf: Script, tmp_path: Path) -> None:
    source = edited(imported("llama2-gqa", *TP2_PP2), tmp_path / "mt", norm_of_one_rank)
    options = ["--no_tokenizer", "--allow-inconsistent"]
    to_hf("--input_dir", source, "--output_dir", tmp_path / "hf", *options).succeeded()
    result = check(source, tmp_path / "hf")
    assert result.code == 1, result.text
    assert "copies" in result.out
    assert check(source, tmp_path / "hf", "--allow-inconsistent").code == 0


def test_exact_only(imported, sources, tmp_path: Path) -> None:
    result = check(sources("llama2"), imported("llama2"), "--exact-only", "--json", tmp_path / "found.json")
    assert result.code == 0
    assert findings(result, tmp_path / "found.json")["numeric"] is None
    assert "forward" not in result.out


def test_json_keys(imported, sources, tmp_path: Path) -> None:
    result = check(sources("llama2"), imported("llama2"), "--json", tmp_path / "found.json")
    found = findings(result, tmp_path / "found.json")
    assert " ".join(sorted(found)) == (
        "causes checkpoint checksums config exact family notes numeric same seconds source verdict"
    )
    assert sorted(found["source"]) == ["dtype", "kind", "layout", "path"]


def test_wrong_arguments(tmp_path: Path) -> None:
    assert run("weights_conversion.verify").code == 2
    assert run("weights_conversion.verify", "a", "b", "--model", "gpt2").code == 2
    assert run("weights_conversion.verify", "a", "b", "--workers", "0").code == 2
    assert run("weights_conversion.verify", "a", "b", "--json", tmp_path / "no" / "x.json").code == 2


def test_help_without_torch() -> None:
    code = (
        "import sys; from weights_conversion.verify import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "sys.exit(1 if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "SOURCE" in done.stdout


def test_as_a_process(imported, sources, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "weights_conversion.verify", sources("llama2"), imported("llama2", *TP2)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "IDENTICAL" in done.stdout


def test_many_chunks(imported, sources, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one unit, and blocks of one row, find the same."""
    from weights_conversion.verification import causes, differences, exact

    for module in (exact, causes, differences):
        monkeypatch.setattr(module, "BLOCK_VALUES", 100)
    monkeypatch.setattr(exact, "CHUNK_BYTES", 1)
    assert check(sources("llama2-gqa"), imported("llama2-gqa", *TP2_PP2)).code == 0


def test_small_model_has_no_blind_spot(imported, sources, tmp_path: Path) -> None:
    """Every tensor of every rank: one changed value is found, at its place."""
    root = imported("llama2-gqa", *TP2_PP2)
    source = sources("llama2-gqa")
    ranks = {rank_of(path.parent.name): load_rank(path) for path in root.glob("*/mp_rank_*/*.pt")}
    names = sorted((rank, name) for rank in ranks for name in stack(ranks, *rank))
    for number, (rank, name) in enumerate(names[:: max(len(names) // 12, 1)]):

        def edit(ranks: Ranks, rank: tuple[int, int] = rank, name: str = name) -> None:
            tensor = stack(ranks, *rank)[name]
            tensor.view(-1)[tensor.numel() // 3] *= 1.5

        broken = edited(root, tmp_path / str(number), edit)
        result = check(source, broken, "--exact-only")
        assert result.code == 1, (rank, name)
        assert f"mp_rank_{rank[0]:02d}_{rank[1]:03d}" in result.out, (name, result.out)
        shutil.rmtree(broken)


def test_models_that_differ_a_little(imported, tmp_path: Path) -> None:
    """Another seed of the same shape: all tensors differ, and no common mistake is blamed."""
    other = replace(tm.MODELS["llama2-gqa"], name="another seed")
    source = tm.write_huggingface(tmp_path / "hf", other)
    result = check(source, imported("llama2-gqa"))
    assert result.code == 1
    assert "39 of 39 tensors" in result.out
    assert "cause" not in result.out.replace("no common mistake", ""), result.out
