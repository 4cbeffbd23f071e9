"""Args that the tensors contradict: what is missing is refused with its arg, what is there is believed."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch

from weights_conversion.config import Moe
from weights_conversion.configs import core_foreign

Made = Callable[..., Path]


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory, to_megatron) -> Callable[[str, str], Path]:
    root = tmp_path_factory.mktemp("args")

    def imported(name: str, form: str) -> Path:
        out = root / f"{name}-{form}"
        if not out.exists():
            source = tm.write_huggingface(root / f"{name}-{form}-hf", tm.DENSE[name], tokenizer=False, spelling=4)
            options = ("--target", "megatron-core", "--ckpt-format", form)
            to_megatron(tm.DENSE[name].family, "--model-path", source, "--out", out, *options).succeeded()
        return out

    return imported


@pytest.fixture
def saying(imports, tmp_path: Path) -> Made:
    """An import of a model, whose args are changed (None: taken out)."""

    def make(name: str, form: str, **changes: Any) -> Path:
        root = Path(shutil.copytree(imports(name, form), tmp_path / "mt"))
        (root / "conversion_manifest.json").unlink()
        (path,) = [*root.glob("*/common.pt"), *root.glob("*/mp_rank_00/model_optim_rng.pt")]
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, weights_only=True)
        args = vars(content["args"])
        args.update(changes)
        content["args"] = argparse.Namespace(**{name: value for name, value in args.items() if value is not None})
        torch.save(content, path)
        return root

    return make


def export(to_hf, root: Path, out: Path, *options: Any):
    return to_hf("--input_dir", root, "--output_dir", out, "--no_tokenizer", *options)


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
@pytest.mark.parametrize(
    ("model", "arg", "end"),
    [
        ("qwen3", "qk_layernorm", "self_attention.q_layernorm.weight"),
        ("qwen2", "add_qkv_bias", "self_attention.linear_qkv.bias"),
    ],
)
def test_tensors_that_args_deny_are_believed(
    model: str, arg: str, end: str, form: str, saying: Made, to_hf, tmp_path: Path
) -> None:
    root = saying(model, form, **{arg: False})
    said = export(to_hf, root, tmp_path / "out", "--verify").succeeded().text
    assert f"the args say {arg} False, but there is " in said
    assert f"{end}: the tensors are believed" in said
    assert tm.read_json(tmp_path / "out" / "config.json")["model_type"] == model
    shutil.rmtree(root)
    unsaid = export(to_hf, saying(model, form, **{arg: None}), tmp_path / "unsaid").succeeded().text
    assert arg not in unsaid  # not every wrapper stores every arg


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
@pytest.mark.parametrize(
    ("arg", "end"), [("qk_layernorm", ".q_layernorm.weight"), ("add_qkv_bias", ".linear_qkv.bias")]
)
@pytest.mark.parametrize("model", ["llama3.1", None])
def test_tensors_that_args_ask_for_and_are_not_there(
    model: str | None, arg: str, end: str, form: str, saying: Made, to_hf, to_megatron, tmp_path: Path
) -> None:
    name = next(name for name, tiny in tm.DENSE.items() if tiny.family == "llama3")
    root = saying(name, form, **{arg: True})
    options = ("--model", "llama3") if model else ()
    words = (f"{arg} True", f"no tensor *{end}", "copy complete", f"set {arg} to False")
    export(to_hf, root, tmp_path / "out", *options).refused(*words)
    to_megatron("llama3", "--model-path", root, "--out", tmp_path / "to").refused(*words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arg", ["moe_router_enable_expert_bias", "moe_shared_expert_gate"])
def test_args_of_experts_mean_nothing_without_them(arg: str, saying: Made, to_hf, tmp_path: Path) -> None:
    export(to_hf, saying("qwen3", "torch_dist", **{arg: True}), tmp_path / "out").succeeded()


def test_a_gate_means_nothing_without_shared_experts() -> None:
    moe = Moe(num_experts=4, ffn_hidden_size=8, topk=2, layers=(True,))
    names, args = {"decoder.layers.0.mlp.router.weight"}, {"moe": moe, "moe_shared_expert_gate": True}
    assert core_foreign.contradicted(names, args, Path("x")) == ([], [])
    args["moe"] = dataclasses.replace(moe, shared_ffn_hidden_size=8)
    (problem,), _ = core_foreign.contradicted(names, args, Path("x"))
    assert "moe_shared_expert_gate True, but it holds no tensor *.shared_experts.gate_weight" in problem


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_a_head_that_args_deny(form: str, saying: Made, to_hf, tmp_path: Path) -> None:
    """A head of its own beside untie_embeddings_and_output_weights False: the tensor is named, with the arg."""
    name = next(name for name, tiny in tm.DENSE.items() if tiny.family == "llama3" and not tiny.tied)
    root = saying(name, form, untie_embeddings_and_output_weights=False)
    export(to_hf, root, tmp_path / "out").refused("output_layer.weight", "untie_embeddings_and_output_weights")


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_a_head_that_args_ask_for(form: str, saying: Made, to_hf, tmp_path: Path) -> None:
    name = next(name for name, tiny in tm.DENSE.items() if tiny.tied)
    root = saying(name, form, untie_embeddings_and_output_weights=True)
    export(to_hf, root, tmp_path / "out").refused("no output layer", "untie_embeddings_and_output_weights True")
