"""Mistakes with Gemma 3 that a round trip cannot see, made on purpose: Bridge's own files show each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
import yaml
from conftest import GOLDEN
from golden_core import read_torch_dist

from weights_conversion.architectures import FAMILIES
from weights_conversion.formats import bridge_gemma
from weights_conversion.mapping import ops

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
CASE = GOLDEN / "bridge-gemma3"
SAID = ("rotary_base", "rope_scaling_factor", "window_size", "interleaved_attn_pattern", "softmax_scale",
        "layernorm_epsilon", "layernorm_zero_centered_gamma", "kv_channels")  # fmt: skip
STATED = ("rope_parameters", "layer_types", "sliding_window", "query_pre_attn_scalar", "rms_norm_eps", "head_dim")
Mutation = Callable[[pytest.MonkeyPatch], None]


def of_rows(change: Callable[[Any], Any]) -> Mutation:
    """The family has other rows."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        family = FAMILIES["gemma3"]
        rows = tuple(map(change, family.rows))
        assert rows != family.rows
        patch.setitem(FAMILIES, "gemma3", replace(family, rows=rows))

    return mutate


def shifted(end: str) -> Mutation:
    """A norm is stored less one."""
    return of_rows(lambda row: replace(row, centred=True) if row.megatron.endswith(end) else row)


def exchanged(one: str, two: str) -> Mutation:
    """What Hugging Face calls `one` and `two` are each other's."""
    other = {one: two, two: one}

    def change(row: Any) -> Any:
        end = next((end for end in other if row.hf[0].endswith(f".{end}.weight")), None)
        return row if end is None else replace(row, hf=(row.hf[0].replace(end, other[end]),))

    return of_rows(change)


def bridge_says(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Mutation:
    """What Bridge is told, and what is taken from it, are wrong in the same way, so that a round trip is none the
    wiser."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        section, read = bridge_gemma.section, bridge_gemma.in_core_words
        patch.setattr(bridge_gemma, "section", lambda config: change(section(config)))
        patch.setattr(bridge_gemma, "in_core_words", lambda args, where: read(change(dict(args)), where))

    return mutate


def up_first(patch: pytest.MonkeyPatch) -> None:
    right = ops.FuseGLU.megatron_rows
    patch.setattr(ops.FuseGLU, "megatron_rows", lambda *arguments: right(*arguments)[::-1])


def _thetas(section: dict[str, Any]) -> dict[str, Any]:
    return section | {"rotary_base": section["rotary_base"][::-1]}


NORMS = ("linear_qkv.layer_norm_weight", "q_layernorm.weight", "linear_proj.post_layernorm.weight",
         "linear_fc1.layer_norm_weight", "linear_fc2.post_layernorm.weight", "final_layernorm.weight")  # fmt: skip
MUTATIONS: dict[str, Mutation] = {
    **{f"{norm} stored less one": shifted(norm) for norm in NORMS},
    "norms behind attention and in front of the MLP": exchanged(
        "post_attention_layernorm", "pre_feedforward_layernorm"
    ),
    "norms in front of the MLP and behind it": exchanged("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "norms in front of attention and behind it": exchanged("input_layernorm", "post_attention_layernorm"),
    "norms of q and k": exchanged("self_attn.q_norm", "self_attn.k_norm"),
    "up in front of the gate": up_first,
    "thetas of layers with a window and of the others": bridge_says(_thetas),
    "full attention in another layer": bridge_says(lambda section: section | {"interleaved_attn_pattern": [4, 1]}),
    "a window of one token more": bridge_says(
        lambda section: section | {"window_size": section["window_size"] + 1}
    ),
    "scores scaled by the head's size": bridge_says(lambda section: section | {"softmax_scale": 0.5}),
    "no scaled rope": bridge_says(lambda section: section | {"rope_scaling_factor": 1.0}),
}  # fmt: skip


def import_is_right(to_megatron, out: Path) -> bool:
    line = ("gemma3", "--model-path", CASE / "hf", "--make-vocab-size-divisible-by", 1, "--out", out)
    if to_megatron(*line).code:
        return False
    (ours, _), (theirs, _) = (read_torch_dist(root) for root in (out, CASE / "megatron-bridge"))
    one, two = (
        yaml.safe_load((root / "iter_0000000" / "run_config.yaml").read_text())["model"]
        for root in (out, CASE / "megatron-bridge")
    )
    return all(torch.equal(ours[name], each) for name, each in theirs.items()) and all(
        one[key] == two[key] for key in SAID
    )


def export_is_right(to_hf, out: Path) -> bool:
    line = ("--input_dir", CASE / "megatron-bridge", "--output_dir", out, "--no_tokenizer")
    if to_hf(*line).code:
        return False
    found, wanted = tm.read_huggingface(out), tm.read_huggingface(CASE / "hf")
    one, two = (tm.read_json(folder / "config.json") for folder in (out, CASE / "hf"))
    same = found.keys() == wanted.keys() and all(torch.equal(found[name], each) for name, each in wanted.items())
    return same and all(one[key] == two[key] for key in STATED)


def test_without_a_mistake(to_megatron, to_hf, tmp_path: Path) -> None:
    assert import_is_right(to_megatron, tmp_path / "mt")
    assert export_is_right(to_hf, tmp_path / "hf")


@pytest.mark.parametrize("name", MUTATIONS)
def test_bridges_files_show_it(name: str, to_megatron, to_hf, tmp_path: Path, monkeypatch) -> None:
    MUTATIONS[name](monkeypatch)
    assert not import_is_right(to_megatron, tmp_path / "mt")
    assert not export_is_right(to_hf, tmp_path / "hf")


@pytest.mark.parametrize("name", [name for name in MUTATIONS if "norm" in name])
def test_verify_shows_it(name: str, to_megatron, tmp_path: Path, monkeypatch) -> None:
    """Its forward pass has the names of norms, and what they are stored as, from nowhere else."""
    MUTATIONS[name](monkeypatch)
    line = ("gemma3", "--model-path", CASE / "hf", "--out", tmp_path / "mt")
    to_megatron(*line, "--verify").refused("part", code=1)
