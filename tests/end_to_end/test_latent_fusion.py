"""--mla-down-proj-fusion: rank files hold both down projections and the norm in front of them as one module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import latent_models as lm
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

RANKS = ("--ckpt-format", "torch", "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lm.write(tmp_path_factory.mktemp("latent") / "hf", mtp=1)


def ranks(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.parent.name: torch.load(path, weights_only=False)["model"] for path in sorted(folder.rglob("*_rng.pt"))
    }


def fused(tensors: dict[str, Tensor], layer: int, rank: int) -> Tensor:
    """Rows of a rank of two, as FusedMLASelfAttention splits them: q's, then kv's."""
    prefix = f"model.layers.{layer}.self_attn."
    return torch.cat(
        [tensors[prefix + name].chunk(2)[rank] for name in ("q_a_proj.weight", "kv_a_proj_with_mqa.weight")]
    )


def test_a_ranks_rows(source: Path, tmp_path: Path, to_megatron, to_hf) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    said = to_megatron(
        "deepseek-v3", "--model-path", source, "--out", out, *RANKS, "--mla-down-proj-fusion", "--verify"
    )
    assert "--use-mp-args-from-checkpoint-args --mla-down-proj-fusion" in said.succeeded().out
    assert "a run without --mla-down-proj-fusion" in said.err
    tensors, found = load_file(source / "model.safetensors"), ranks(out)
    for layer, (stage, name) in enumerate([*((stage, "decoder.layers.0") for stage in range(3)),
                                           (2, "mtp.layers.0.mtp_model_layer")]):  # fmt: skip
        for rank in range(2):
            held, prefix = found[f"mp_rank_{rank:02d}_{stage:03d}"], f"{name}.self_attention.linear_qkv_down_proj."
            assert torch.equal(held[f"{prefix}weight"], fused(tensors, layer, rank))
            norm = tensors[f"model.layers.{layer}.input_layernorm.weight"]
            assert torch.equal(held[f"{prefix}layer_norm_weight"], norm)
            apart = ("linear_q_down_proj", "linear_kv_down_proj", f"{name}.input_layernorm")
            assert not [other for other in held if any(part in other for part in apart)]
    to_hf("--input_dir", out, "--output_dir", back, "--no_tokenizer", "--verify").succeeded()
    exported = load_file(back / "model.safetensors")
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in tensors.items())


def test_from_one_form_into_the_other(source: Path, tmp_path: Path, to_megatron) -> None:
    names, forms = (
        ("apart", "fused", "again", "afresh"),
        ((), ("--mla-down-proj-fusion",), (), ("--mla-down-proj-fusion",)),
    )
    for number, (name, form) in enumerate(zip(names, forms, strict=True)):
        before = source if number in (0, 3) else tmp_path / names[number - 1]
        to_megatron(
            "deepseek-v3", "--model-path", before, "--out", tmp_path / name, *RANKS, *form, "--verify"
        ).succeeded()
    for one, two in (("apart", "again"), ("fused", "afresh")):
        first, second = ranks(tmp_path / one), ranks(tmp_path / two)
        for rank, held in first.items():
            assert held.keys() == second[rank].keys()
            assert all(torch.equal(second[rank][name], tensor) for name, tensor in held.items())


def test_torch_dist_is_the_same_for_both(source: Path, tmp_path: Path, to_megatron) -> None:
    for name, form in (("apart", ()), ("fused", ("--mla-down-proj-fusion",))):
        said = to_megatron("deepseek-v3", "--model-path", source, "--out", tmp_path / name, *form).succeeded()
        assert ("--mla-down-proj-fusion" in said.out) == bool(form)
    one, two = (tmp_path / name / "release/__0_1.distcp" for name in ("apart", "fused"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("changes", "tensor", "words"),
    [
        ({"q_lora_rank": None}, 1, "no q_lora_rank"),
        ({"kv_lora_rank": 21}, 2, "29 rows of linear_kv_down_proj"),
        ({"q_lora_rank": 23}, 2, "23 rows of linear_q_down_proj"),
    ],
)
def test_what_cannot_be_fused(changes: dict[str, Any], tensor: int, words: str, tmp_path: Path, to_megatron) -> None:
    folder = lm.write(tmp_path / "hf", **changes)
    to_megatron("deepseek-v3", "--model-path", folder, "--out", tmp_path / "out", "--ckpt-format", "torch",
                "--tensor-model-parallel-size", tensor, "--mla-down-proj-fusion").refused(words)  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_rows_joined_end_to_end_are_seen(source: Path, tmp_path: Path, to_megatron) -> None:
    """All of q, then all of kv, cut evenly: the right shape and the wrong order."""
    out = tmp_path / "out"
    to_megatron("deepseek-v3", "--model-path", source, "--out", out, *RANKS, "--mla-down-proj-fusion").succeeded()
    tensors = load_file(source / "model.safetensors")
    whole = torch.cat(
        [tensors[f"model.layers.1.self_attn.{name}.weight"] for name in ("q_a_proj", "kv_a_proj_with_mqa")]
    )
    for rank in range(2):
        path = out / f"release/mp_rank_{rank:02d}_001/model_optim_rng.pt"
        content = torch.load(path, weights_only=False)
        content["model"]["decoder.layers.0.self_attention.linear_qkv_down_proj.weight"] = whole.chunk(2)[rank].clone()
        torch.save(content, path)
    from conftest import run

    said = run("weights_conversion.verify", source, out)
    assert said.code == 1
    assert "model.layers.1.self_attn.q_a_proj.weight" in said.out
