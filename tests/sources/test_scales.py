"""Scales that are no positive numbers: refused by name before the first byte, or while read; nothing appears."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import latent_models as lm
import pytest
import torch
from mxfp4_files import quantised_folder
from safetensors.torch import load_file, save_file

from weights_conversion.layouts.decoding import BlockScaled
from weights_conversion.sources import scales

O_PROJ = "model.layers.0.self_attn.o_proj.weight_scale_inv"
WRONG = {"nan": float("nan"), "0": 0.0, "-1": -1.0, "inf": float("inf"), "-inf": float("-inf")}


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("latent")
    plain = lm.write(
        root / "hf", hidden_size=132, intermediate_size=64, kv_lora_rank=32, q_lora_rank=32, num_hidden_layers=2,
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, num_attention_heads=2,
        num_key_value_heads=2, qk_nope_head_dim=48, v_head_dim=44,
    )  # fmt: skip
    return lm.write_fp8(plain, root / "fp8")


def spoil(path: Path, name: str, value: float) -> None:
    """Sets the last scale, in place: the rest of the file stays."""
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("early", [True, False], ids=["before the first byte", "in the stream"])
@pytest.mark.parametrize("kind", WRONG)
def test_refused(kind: str, early: bool, fp8: Path, tmp_path: Path, to_megatron, monkeypatch) -> None:
    path = next(path for path in fp8.glob("*.safetensors") if O_PROJ in load_file(path))
    before = path.read_bytes()
    if not early:
        monkeypatch.setattr(scales, "_MOST", 0)
    try:
        spoil(path, O_PROJ, WRONG[kind])
        options = ("--dry-run",) if early else ()
        said = to_megatron("deepseek-v3", "--model-path", fp8, "--out", tmp_path / "out", *options)
    finally:
        path.write_bytes(before)
    said.refused(O_PROJ, f"a scale of {kind}", "positive number", "damaged")
    assert not (tmp_path / "out").exists()
    assert early == (not list(tmp_path.iterdir()))  # what was begun says so by its name


@pytest.mark.parametrize("early", [True, False], ids=["before the first byte", "in the stream"])
def test_an_exponent_that_is_none(early: bool, tmp_path: Path, to_megatron, monkeypatch) -> None:
    small, _ = quantised_folder(tmp_path)
    if not early:
        monkeypatch.setattr(scales, "_MOST", 0)
    name = "model.layers.0.mlp.experts.down_proj_scales"
    spoil(small / "model.safetensors", name, 255)
    to_megatron("gpt-oss", "--model-path", small, "--out", tmp_path / "out").refused(name, "exponent 255", "damaged")
    assert not (tmp_path / "out").exists()


def edit(folder: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    path = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("early", [True, False], ids=["before the first byte", "in the stream"])
def test_zeros_with_a_scale_of_0(early: bool, fp8: Path, tmp_path: Path, to_megatron, monkeypatch) -> None:
    """Some programs quantise a block of zeros so: it is read. One value in it that is not 0, and it is damage."""
    folder, values = tmp_path / "hf", O_PROJ.removesuffix("_scale_inv")
    shutil.copytree(fp8, folder)
    if not early:
        monkeypatch.setattr(scales, "_MOST", 0)
    edit(folder, values, lambda tensor: tensor[128:].zero_())
    edit(folder, O_PROJ, lambda tensor: tensor[-1].zero_())
    to_megatron("deepseek-v3", "--model-path", folder, "--out", tmp_path / "out", "--verify").succeeded()
    edit(folder, values, lambda tensor: tensor[-1:, -1:].copy_(torch.ones(1, 1)))
    said = to_megatron("deepseek-v3", "--model-path", folder, "--out", tmp_path / "other")
    said.refused(O_PROJ, "a scale of 0", "values of 0", "damaged")
    assert not (tmp_path / "other").exists()


def test_extremes_that_are_numbers(tmp_path: Path) -> None:
    """The least and the greatest of each type are read."""
    from weights_conversion.formats import huggingface
    from weights_conversion.sources import quantised

    tensors = {}
    for index, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        limits = torch.finfo(dtype)
        tensors[f"{index}.weight"] = torch.ones(2, 4).to(torch.float8_e4m3fn)
        tensors[f"{index}.weight_scale"] = torch.tensor([[limits.tiny], [limits.max]], dtype=dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    stored = huggingface.read_hf(tmp_path)
    scales.check(quantised.dequantised(stored, {}, "config.json").tensors)


@pytest.mark.parametrize("block", [(4, 3), (4, 1 << 30), (1, 10)], ids=str)
def test_zeros_of_packed_experts(block: tuple[int, int], tmp_path: Path) -> None:
    """[E, rows, columns]: the rows of a range of them are those of all experts. A block may be wider than a matrix."""
    from weights_conversion.errors import ConversionError
    from weights_conversion.formats import huggingface
    from weights_conversion.sources import quantised

    values = torch.ones(3, 6, 10).to(torch.float8_e4m3fn)
    factors = torch.ones(3, -(-6 // block[0]), -(-10 // block[1]))
    raw = {"torch_dtype": "bfloat16", "quantization_config": {**lm.FP8, "weight_block_size": list(block)}}
    factors[1:] = 0
    for damaged in (False, True):
        values[1:] = 0
        values[2, 5, 9] = float(damaged)
        save_file({"a.weight": values, "a.weight_scale_inv": factors}, tmp_path / "model.safetensors")
        found = quantised.dequantised(huggingface.read_hf(tmp_path), raw, "config.json").tensors
        decoder = found["a.weight"].copies[0][0].ref.decoder
        assert isinstance(decoder, BlockScaled)
        assert decoder.zeroed(factors.flatten(0, 1)) == [(6, 18)]  # one read, not one for each row of scales
        if damaged:
            with pytest.raises(ConversionError, match="a scale of 0"):
                scales.check(found)
        else:
            scales.check(found)
