"""GPT-OSS in MXFP4, and the same in bfloat16 as transformers' own dequantisation makes it."""

from __future__ import annotations

import json
from pathlib import Path

import gpt_oss_models as oss
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

CONFIG = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}}
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 2}


def quantised_folder(folder: Path, ffn: int = 32, seed: int = 3) -> tuple[Path, Path]:
    """(a folder in MXFP4, the same model in bfloat16 as transformers makes it)."""
    plain = oss.write(folder / "plain", oss.model(intermediate_size=ffn, **WIDE))
    tensors = load_file(plain / "model.safetensors")
    torch.manual_seed(seed)
    packed = {}
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        experts, columns, rows = tensors[name].shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 128, (experts, rows, columns // 32), dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    small = folder / "small"
    small.mkdir()
    kept = {name: tensor for name, tensor in tensors.items() if f"{name}_blocks" not in packed}
    save_file(kept | packed, small / "model.safetensors", {"format": "pt"})
    (small / "config.json").write_text(json.dumps(json.loads((plain / "config.json").read_text()) | CONFIG))
    return small, plain
