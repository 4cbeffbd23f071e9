"""--adapter of hf_to_megatron.py: PEFT's LoRA merged on the way in, bit for bit as peft merges it itself."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
from conftest import GOLDEN, Result
from safetensors.torch import load_file, save_file

CASE = GOLDEN / "core-llama3-lora"
Script = Callable[..., Result]


def same(folder: Path, wanted: dict[str, torch.Tensor]) -> bool:
    found = tm.read_huggingface(folder)
    return found.keys() == wanted.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )


def merged(to_megatron: Script, to_hf: Script, adapter: Path, out: Path, *options: Any) -> Path:
    """The merged model, by way of Megatron."""
    base = ("--model-path", CASE / "base", "--adapter", adapter)
    to_megatron("llama3", *base, "--out", out / "m", *options).succeeded()
    to_hf("--input_dir", out / "m", "--output_dir", out / "hf", "--no_tokenizer").succeeded()
    return out / "hf"


@pytest.mark.parametrize(
    "options",
    [
        ("--verify",),
        ("--ckpt-format", "torch", "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2),
    ],
    ids=["torch_dist", "TP 2 x PP 2"],
)
def test_peft_itself_merges_so(options: Any, tmp_path: Path, to_megatron: Script, to_hf: Script) -> None:
    out = merged(to_megatron, to_hf, CASE / "adapter", tmp_path, *options)
    assert same(out, tm.read_huggingface(CASE / "hf"))


def by_hand(config: dict[str, Any], adapter: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    result = {name: tensor.to(dtype) for name, tensor in tm.read_huggingface(CASE / "base").items()}
    for name, below in adapter.items():
        if ".lora_A." not in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank = below.shape[0]
        alpha = config["alphas"](module)
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        base = tm.read_huggingface(CASE / "base")[f"{module}.weight"].float()
        added = adapter[name.replace("lora_A", "lora_B")].float() @ below.float()
        result[f"{module}.weight"] = (base + scale * added).to(dtype)
    return result


def changed(tmp_path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> Path:
    out = Path(shutil.copytree(CASE / "adapter", tmp_path / "adapter"))
    config, tensors = tm.read_json(out / "adapter_config.json"), load_file(out / "adapter_model.safetensors")
    change(config, tensors)
    (out / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    return out


def other_ranks(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Some modules of rank 2 and other alphas, by patterns for the ends of names; the first that fits holds."""
    config |= {"use_rslora": True, "lora_alpha": 7,
               "rank_pattern": {"layers.1.self_attn.q_proj": 2, r"layers\.\d+\.mlp\.down_proj": 3},
               "alpha_pattern": {"down_proj": 5, "mlp.down_proj": 9}}  # fmt: skip
    for name in list(tensors):
        rank = 2 if "layers.1.self_attn.q_proj" in name else 3 if "down_proj" in name else None
        if rank is not None:
            part = tensors[name][:rank] if ".lora_A." in name else tensors[name][:, :rank]
            tensors[name] = part.contiguous()
        tensors[name] = tensors[name].to(torch.bfloat16)


@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_patterns_and_rslora(dtype: str, tmp_path: Path, to_megatron: Script, to_hf: Script) -> None:
    adapter = changed(tmp_path, other_ranks)
    out = merged(to_megatron, to_hf, adapter, tmp_path, "--dtype", dtype)
    settings = {"use_rslora": True, "alphas": lambda module: 5 if module.endswith("down_proj") else 7}
    wanted = by_hand(settings, load_file(adapter / "adapter_model.safetensors"),
                     torch.float32 if dtype == "float32" else torch.bfloat16)  # fmt: skip
    assert same(out, wanted)


def without_k(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """k is not adapted: it is fused with q and v, which are."""
    for name in [name for name in tensors if "k_proj" in name or "up_proj" in name]:
        del tensors[name]


def test_a_part_of_what_is_fused(tmp_path: Path, to_megatron: Script, to_hf: Script) -> None:
    adapter = changed(tmp_path, without_k)
    out = merged(to_megatron, to_hf, adapter, tmp_path)
    wanted = tm.read_huggingface(CASE / "hf")
    plain = tm.read_huggingface(CASE / "base")
    wanted |= {name: tensor for name, tensor in plain.items() if "k_proj" in name or "up_proj" in name}
    assert same(out, wanted)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c, t: c.update(use_dora=True), ("use_dora", "DoRA")),
        (lambda c, t: c.update(bias="all"), ("bias", "all")),
        (lambda c, t: c.update(modules_to_save=["lm_head"]), ("modules_to_save",)),
        (lambda c, t: c.update(peft_type="LOHA"), ("LOHA",)),
        (lambda c, t: c.update(init_lora_weights="pissa_niter_4"), ("pissa_niter_4", "base")),
        (lambda c, t: c.update(init_lora_weights="lora_ga"), ("lora_ga", "base")),
        (lambda c, t: c.update(r=8), ("rank 8", "more like it")),
        (lambda c, t: c.update(lora_alpha=math.inf), ("alpha inf",)),
        (lambda c, t: c.update(lora_alpha=math.nan), ("alpha nan",)),
        (lambda c, t: c.update(lora_alpha=10**400), ("alpha", "integer")),
        (lambda c, t: c.update(alpha_pattern={"q_proj": -math.inf}), ("alpha -inf", "q_proj")),
        (lambda c, t: c.update(rank_pattern={"(a+)+": 4}), ("pattern",)),
        (lambda c, t: c.update(lora_alpha="x"), ("alpha",)),
        (lambda c, t: t.pop(f"{Q}.lora_B.weight"), ("only one", "q_proj")),
        (lambda c, t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(4)}), ("lora_magnitude_vector",)),
        (
            lambda c, t: t.update({name.replace("layers.1.", "layers.7."): t.pop(name) for name in list(t)}),
            ("model.layers.7.", "does not have"),
        ),
        (
            lambda c, t: t.update({f"{Q}.lora_B.weight": torch.zeros(6, 4)}),
            ("q_proj", "[6, "),
        ),
    ],
)
def test_what_is_refused(change: Any, words: tuple[str, ...], tmp_path: Path, to_megatron: Script) -> None:
    adapter = changed(tmp_path, change)
    base = ("--model-path", CASE / "base", "--adapter", adapter)
    to_megatron("llama3", *base, "--out", tmp_path / "out").refused(*words)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_none(tmp_path: Path, to_megatron: Script) -> None:
    base = ("--model-path", CASE / "base", "--out", tmp_path / "out")
    to_megatron("llama3", *base, "--adapter", CASE / "base").refused("adapter_config.json", "no adapter of PEFT's")
    to_megatron("llama3", "--model-path", CASE / "adapter", "--out", tmp_path / "out").refused("--adapter")
    to_megatron("llama3", "--model-path", CASE / "megatron-torch_dist", "--out", tmp_path / "out",
                "--adapter", CASE / "adapter").refused("--adapter", "is for a Hugging Face model")  # fmt: skip


def test_a_head_that_is_tied(tmp_path: Path, to_megatron: Script) -> None:
    base = tmp_path / "base"
    shutil.copytree(CASE / "base", base)
    config = tm.read_json(base / "config.json") | {"tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    rows, hidden = tensors["lm_head.weight"].shape

    def head(_: Any, factors: dict[str, torch.Tensor]) -> None:
        factors["base_model.model.lm_head.lora_A.weight"] = torch.ones(4, hidden)
        factors["base_model.model.lm_head.lora_B.weight"] = torch.ones(rows, 4)

    adapter = changed(tmp_path, head)
    to_megatron("llama3", "--model-path", base, "--adapter", adapter, "--out", tmp_path / "out").refused("tied")
