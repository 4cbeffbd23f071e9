"""Sources in fp8: read as the values that they mean, bit for bit by torch's own arithmetic; refused where that is not
to be told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import latent_models as lm
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from weights_conversion.engine.execute import read_rows
from weights_conversion.engine.streams import Scratch, Source
from weights_conversion.formats import huggingface
from weights_conversion.sources import quantised
from weights_conversion.verification import dequantised as again
from weights_conversion.verification.whole import huggingface_weights

SHAPES = [(256, 384), (132, 131), (1, 300), (129, 1), (576, 130), (7, 5)]
ROWS, BLOCK = {"strategy": "channel"}, {"strategy": "block", "block_structure": "32x16"}


def compressed(**weights: Any) -> dict[str, Any]:
    group = {"weights": {"num_bits": 8, "type": "float", "symmetric": True, **weights}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


# (block, the config, the scale's name, further arguments of quantise)
KINDS: dict[str, tuple[tuple[int, int] | None, dict[str, Any], str, dict[str, Any]]] = {
    "deepseek": ((128, 128), lm.FP8, "_scale_inv", {}),
    "its block": ((64, 32), {**lm.FP8, "weight_block_size": [64, 32]}, "_scale_inv", {}),
    "a tensor": (None, {"quant_method": "fp8", "weight_block_size": None}, "_scale_inv", {}),
    "a row, bfloat16": ((1, 4096), compressed(**ROWS), "_scale", {"scale_dtype": torch.bfloat16}),
    "a row, float32": ((1, 4096), {"quant_method": "fbgemm_fp8"}, "_scale", {}),
    "compressed block": ((32, 16), compressed(**BLOCK), "_scale", {}),
    "e5m2": ((128, 128), {**lm.FP8, "fmt": "e5m2"}, "_scale_inv", {"dtype": torch.float8_e5m2}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_torchs_own(kind: str, shape: tuple[int, int], tmp_path: Path) -> None:
    block, config, suffix, further = KINDS[kind]
    torch.manual_seed(1)
    values, scales, meaning = lm.quantise(torch.randn(shape) / 30, block, **further)
    tensors = {"a.weight": values, f"a.weight{suffix}": scales, "a.input_scale": torch.ones(())}
    save_file(tensors, tmp_path / "model.safetensors")
    raw = {"torch_dtype": "bfloat16", "quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    stored = huggingface.read_hf(tmp_path)
    found = quantised.dequantised(stored, raw, "config.json").tensors
    assert found.keys() == {"a.weight"}
    files, rows = Source(), shape[0]
    for placed in (found["a.weight"], again.again(stored, found, raw)["a.weight"]):
        assert (placed.rows, placed.columns, placed.dtype) == (*shape, torch.bfloat16)
        for first, last in {(0, rows), (rows // 3, rows // 2 + 1), (rows - 1, rows)}:
            assert torch.equal(read_rows(placed, (first, last), files, Scratch()), meaning[first:last])
    whole = huggingface_weights(tmp_path)
    assert torch.equal(whole("a.weight", None), meaning)
    assert torch.equal(whole("a.weight", slice(rows // 3, rows)), meaning[rows // 3 :])
    files.close()


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lm.write(
        tmp_path_factory.mktemp("latent") / "hf", hidden_size=132, intermediate_size=131, kv_lora_rank=32,
        q_lora_rank=130, num_hidden_layers=2, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
        mtp=1, num_attention_heads=2, num_key_value_heads=2, qk_nope_head_dim=48, v_head_dim=44,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["deepseek", "a row, bfloat16", "a tensor"])
def test_both_ways(kind: str, bfloat16: Path, tmp_path: Path, to_megatron, to_hf) -> None:
    block, config, suffix, further = KINDS[kind]
    source = lm.write_fp8(bfloat16, tmp_path / "fp8", block, suffix=suffix, config=config, **further)
    out, back = tmp_path / "out", tmp_path / "back"
    said = to_megatron("deepseek-v3", "--model-path", source, "--out", out, "--verify").succeeded()
    assert "are dequantised to bfloat16" in said.text
    assert "IDENTICAL" in said.text
    said = to_hf("--input_dir", out, "--output_dir", back, "--no_tokenizer").succeeded()
    assert "quantization_config is left out" in said.text
    wanted = load_file(tmp_path / "fp8-meaning" / "model.safetensors")
    found = load_file(back / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == tensor.dtype for name, tensor in wanted.items())
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert "quantization_config" not in json.loads((back / "config.json").read_text())


def test_ranks_that_cut_through_blocks(bfloat16: Path, tmp_path: Path, to_megatron) -> None:
    source = lm.write_fp8(bfloat16, tmp_path / "fp8")
    sizes = ("--tensor-model-parallel-size", 2, "--expert-model-parallel-size", 2, "--expert-tensor-parallel-size", 1)
    folders = {"fp8": source, "meaning": tmp_path / "fp8-meaning"}
    lm.edit(source, intermediate_size=131)
    for name, folder in folders.items():
        lm.edit(folder, intermediate_size=130)

        def cut(tensors: dict[str, Tensor]) -> None:
            for key in [key for key in tensors if "layers.0.mlp." in key and tensors[key].dtype != torch.float32]:
                tensors[key] = (tensors[key][:, :130] if "down" in key else tensors[key][:130]).contiguous()

        if name == "meaning":
            lm.edit_tensors(folder, cut)
        else:
            values = load_file(folder / "model-00001-of-00002.safetensors")
            cut(values)
            save_file(values, folder / "model-00001-of-00002.safetensors")
        to_megatron("deepseek-v3", "--model-path", folder, "--out", tmp_path / f"out-{name}", "--ckpt-format", "torch",
                    *sizes).succeeded()  # fmt: skip
    ranks = sorted(path.relative_to(tmp_path / "out-fp8") for path in (tmp_path / "out-fp8").rglob("*.pt"))
    assert len(ranks) == 2
    for rank in ranks:
        one, two = (torch.load(tmp_path / f"out-{name}" / rank, weights_only=False)["model"] for name in folders)
        assert all(torch.equal(one[name], tensor) for name, tensor in two.items() if tensor is not None)


def test_packed_experts(bfloat16: Path, tmp_path: Path, to_megatron) -> None:
    """[E, 2f, H] with scales [E, ...]: gate ends within a block."""
    source = lm.write_fp8(bfloat16, tmp_path / "fp8", (12, 100), config={**lm.FP8, "weight_block_size": [12, 100]})
    values, scales = (source / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    stored, factors, meant = load_file(values), load_file(scales), {}
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts."
        packed: dict[str, list[list[Tensor]]] = {"gate_up_proj": [], "down_proj": []}
        for expert in range(4):
            one = {kind: f"{prefix}{expert}.{kind}_proj.weight" for kind in ("gate", "up", "down")}
            for name in one.values():
                factors.pop(f"{name}_scale_inv")
            up = torch.cat([stored.pop(one["gate"]).float(), stored.pop(one["up"]).float()])
            for name, matrix in (("gate_up_proj", up), ("down_proj", stored.pop(one["down"]).float())):
                packed[name].append([part.clone() for part in lm.quantise(matrix, (12, 100))])
        for name, parts in packed.items():
            stored[prefix + name], factors[f"{prefix}{name}_scale_inv"], meant[prefix + name] = (
                torch.stack(part) for part in zip(*parts, strict=True)
            )
    save_file(stored, values)
    save_file(factors, scales)
    where = dict.fromkeys(stored, values.name) | dict.fromkeys(factors, scales.name)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors.pop(name)
        tensors |= meant

    lm.edit_tensors(tmp_path / "fp8-meaning", pack)
    for name in ("fp8", "fp8-meaning"):
        to_megatron("deepseek-v3", "--model-path", tmp_path / name, "--out", tmp_path / f"out-{name}",
                    "--verify").succeeded()  # fmt: skip
    one, two = (tmp_path / f"out-{name}" / "release/__0_1.distcp" for name in ("fp8", "fp8-meaning"))
    assert one.read_bytes() == two.read_bytes()


def test_an_adapter_is_added_to_what_the_values_mean(bfloat16: Path, tmp_path: Path, to_megatron) -> None:
    source = lm.write_fp8(bfloat16, tmp_path / "fp8")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    module = "base_model.model.model.layers.0.self_attn.o_proj"
    factors = {"lora_A": torch.randn(4, 88), "lora_B": torch.randn(132, 4)}
    named = {f"{module}.{name}.weight": each for name, each in factors.items()}
    save_file(named, adapter / "adapter_model.safetensors")
    for name in ("fp8", "fp8-meaning"):
        to_megatron("deepseek-v3", "--model-path", tmp_path / name, "--out", tmp_path / f"out-{name}", "--adapter",
                    adapter, "--verify").succeeded()  # fmt: skip
    one, two = (tmp_path / f"out-{name}" / "release/__0_1.distcp" for name in ("fp8", "fp8-meaning"))
    assert one.read_bytes() == two.read_bytes()
    assert source.is_dir()


O_PROJ = "model.layers.0.self_attn.o_proj.weight"
Tensors = dict[str, Tensor]


def _shape(tensors: Tensors) -> None:
    tensors[f"{O_PROJ}_scale_inv"] = torch.ones(2, 2)


def _extra(tensors: Tensors) -> None:
    tensors["model.norm.weight_scale_inv"] = torch.ones(1)


def _orphan(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.z_proj.weight_scale_inv"] = torch.ones(1, 1)


def _both(tensors: Tensors) -> None:
    tensors[f"{O_PROJ}_scale"] = torch.ones(2, 1)


def _integers(tensors: Tensors) -> None:
    tensors[f"{O_PROJ}_scale_inv"] = torch.ones(2, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(f"{O_PROJ}_scale_inv"), (O_PROJ, "float8_e4m3fn", "no scale")),
        (_shape, (O_PROJ, "[132, 88]", "[2, 2]", "[2, 1]", "128 x 128")),
        (_extra, ("model.norm.weight_scale_inv is a scale", "bfloat16, which needs none")),
        (_orphan, ("z_proj.weight_scale_inv is a scale", "not there")),
        (_both, (O_PROJ, "two scales")),
        (_integers, (f"{O_PROJ}_scale_inv", "int32")),
    ],
    ids=["missing", "shape", "extra", "orphan", "both", "type"],
)
def test_scales_that_do_not_fit(
    change: Callable[[Tensors], Any], words: tuple[str, ...], bfloat16: Path, tmp_path: Path, to_megatron
) -> None:
    source = lm.write_fp8(bfloat16, tmp_path / "fp8")
    tensors: Tensors = {}
    for path in source.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (source / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    to_megatron("deepseek-v3", "--model-path", source, "--out", tmp_path / "out").refused(*words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "mxfp4"}, ("mxfp4",)),
        ({"quant_method": "awq", "bits": 4}, ("awq", "4 bits")),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("bitsandbytes",)),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, ("NVFP4",)),
        (compressed(num_bits=4, type="int", strategy="group"), ("4 bits", "int")),
        (compressed(strategy="tensor_group"), ("tensor_group",)),
        ({**lm.FP8, "weight_block_size": [128]}, ("weight_block_size", "[128]")),
        ({**lm.FP8, "weight_block_size": [128, 1 << 70]}, ("weight_block_size", "[128, 118")),
    ],
    ids=["mxfp4", "awq", "bitsandbytes", "nvfp4", "int4", "groups", "block", "no block is as wide"],
)
def test_others_are_refused_by_name(config: dict[str, Any], words: tuple[str, ...], bfloat16: Path, tmp_path: Path,
                                    to_megatron) -> None:  # fmt: skip
    source = lm.write_fp8(bfloat16, tmp_path / "fp8", config=config)
    to_megatron("deepseek-v3", "--model-path", source, "--out", tmp_path / "out").refused("quantised", *words)


def test_a_config_that_says_fp8_of_what_is_not(bfloat16: Path, tmp_path: Path, to_megatron) -> None:
    lm.write_fp8(bfloat16, tmp_path / "fp8")
    lm.edit(tmp_path / "fp8-meaning", quantization_config=lm.FP8)
    said = to_megatron("deepseek-v3", "--model-path", tmp_path / "fp8-meaning", "--out", tmp_path / "out", "--verify")
    assert "no tensor is" in said.succeeded().text


def test_verify_sees_scales_that_are_one_block_off(bfloat16: Path, tmp_path: Path, to_megatron, monkeypatch) -> None:
    from weights_conversion.layouts.decoding import BlockScaled

    source = lm.write_fp8(bfloat16, tmp_path / "fp8")
    decode = BlockScaled.decode

    def shifted(self: BlockScaled, rows: Any, stored: Any, into: Tensor) -> None:
        decode(self, rows, [stored[0], stored[1].roll(1, -1)], into)

    monkeypatch.setattr(BlockScaled, "decode", shifted)
    said = to_megatron("deepseek-v3", "--model-path", source, "--out", tmp_path / "out", "--verify")
    said.refused("failed its proof")


def test_a_scalar_that_no_model_has(bfloat16: Path, tmp_path: Path, to_megatron) -> None:
    """Scales of activations alone, and more experts than are there: a sentence of each."""
    lm.write_fp8(bfloat16, tmp_path / "fp8")
    plain = tmp_path / "fp8-meaning"
    lm.edit_tensors(plain, lambda tensors: tensors.update({"model.layers.0.mlp.down_proj.input_scale": torch.ones(())}))
    arguments = ("deepseek-v3", "--model-path", plain, "--out", tmp_path / "out")
    to_megatron(*arguments).refused("model.layers.0.mlp.down_proj.input_scale")
    lm.edit(plain, n_routed_experts=100_000)
    to_megatron(*arguments).refused("100000 experts")
