"""GPT-OSS in MXFP4: the values that transformers' own dequantisation makes of it, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import gpt_oss_models as oss
import pytest
import torch
from golden_core import read_torch_dist
from mxfp4_files import quantised_folder
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from weights_conversion.engine.execute import read_rows
from weights_conversion.engine.streams import Scratch, Source
from weights_conversion.formats import huggingface
from weights_conversion.layouts.placement import slab
from weights_conversion.mapping.parameters import Packed
from weights_conversion.sources import quantised
from weights_conversion.verification import dequantised as again
from weights_conversion.verification.whole import huggingface_weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("kind", [torch.uint8, torch.float8_e8m0fnu], ids=str)
def test_every_byte_and_exponent(kind: torch.dtype, tmp_path: Path) -> None:
    """256 bytes times the exponents that bfloat16 can hold, 255 (which is none) left out."""
    bytes_ = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(255, 1, 1).flatten(0, 1)
    blocks = bytes_.view(1, 255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).repeat(1, 1, 16)
    pair = {"m.experts.down_proj_blocks": blocks, "m.experts.down_proj_scales": scales.contiguous().view(kind)}
    save_file(pair, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    wanted = convert_moe_packed_tensors(blocks, scales)[0]
    stored, files = huggingface.read_hf(tmp_path), Source()
    found = quantised.dequantised(stored, {}, "config.json").tensors
    assert found.keys() == {"m.experts.down_proj_blocks"}
    name = "m.experts.down_proj_blocks"
    for placed in (found[name], again.again(stored, found, {})[name]):
        matrix = slab(placed.copies[0][0].ref, 0, Packed("a", 0, 1), (255, 512))
        for first, last in ((0, 255), (3, 4), (100, 255)):
            assert torch.equal(read_rows(matrix, (first, last), files, Scratch()), wanted.t()[first:last])
    files.close()
    whole = huggingface_weights(tmp_path)
    assert torch.equal(whole("m.experts.down_proj.0", slice(3, 100)), wanted.t()[3:100])
    assert torch.equal(whole("m.experts.down_proj.0.up", slice(0, 127)), wanted.t()[1::2])


@pytest.mark.parametrize("ffn", [32, 64], ids=["oblong", "square down_proj"])
def test_import_is_that_of_the_values(ffn: int, to_megatron, to_hf, tmp_path: Path) -> None:
    small, plain = quantised_folder(tmp_path, ffn)
    result = to_megatron("gpt-oss", "--model-path", small, "--out", tmp_path / "mt", "--verify").succeeded()
    assert "mxfp4: 4 tensors of all experts are dequantised to bfloat16" in result.text
    to_megatron("gpt-oss", "--model-path", plain, "--out", tmp_path / "mt-plain").succeeded()
    (found, _), (wanted, _) = read_torch_dist(tmp_path / "mt"), read_torch_dist(tmp_path / "mt-plain")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    out = to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
    back, source = oss.stored(tmp_path / "out"), oss.stored(plain)
    assert back.keys() == source.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in source.items())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" in out.text


def spoilt(folder: Path, change) -> Path:
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


DOWN = "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{DOWN}_scales"), ("down_proj_blocks", "no _scales")),
        (lambda t: t.pop(f"{DOWN}_blocks"), ("down_proj_scales", "no _blocks")),
        (lambda t: [t.pop(f"{DOWN}_blocks"), t.pop(f"{DOWN}_scales")], ("no tensor", "down_proj")),
        (lambda t: t.update({DOWN: torch.zeros(4, 32, 64, dtype=torch.bfloat16)}), ("the same weights", "down_proj")),
        (lambda t: t.update({f"{DOWN}_scales": t[f"{DOWN}_scales"][:, :-1].contiguous()}), ("shape", "was expected")),
        (lambda t: t.update({f"{DOWN}_blocks": t[f"{DOWN}_blocks"][..., :8].contiguous()}), ("blocks, 16]",)),
        (lambda t: t.update({f"{DOWN}_blocks": t[f"{DOWN}_blocks"][:3].contiguous(),
                             f"{DOWN}_scales": t[f"{DOWN}_scales"][:3].contiguous()}), ("shape [3, 64, 32]",)),
        (lambda t: t.pop("model.layers.1.self_attn.sinks"), ("sinks",)),
    ],
)  # fmt: skip
def test_refused(change, words: tuple[str, ...], to_megatron, tmp_path: Path) -> None:
    small = spoilt(quantised_folder(tmp_path)[0], change)
    to_megatron("gpt-oss", "--model-path", small, "--out", tmp_path / "mt").refused(*words)
    assert not (tmp_path / "mt").exists()
