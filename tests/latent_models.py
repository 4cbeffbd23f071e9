"""Tiny random models with latent attention, as Hugging Face folders, and the same quantised to fp8."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
)

YARN = {
    "type": "yarn", "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32,
    "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
BASE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 72, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 4,
    "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "kv_lora_rank": 20,
    "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840, "rope_theta": 10000.0, "rope_scaling": YARN, "tie_word_embeddings": False,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True,
}  # fmt: skip
CLASSES: dict[str, tuple[Any, Any]] = {
    "glm4-moe-lite": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM),
    "deepseek-v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek-v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
}


def write(folder: Path, family: str = "deepseek-v3", *, dtype: torch.dtype = torch.bfloat16, mtp: int = 0,
          **changes: Any) -> Path:  # fmt: skip
    """A folder as the hub's: layers that predict further tokens behind the last one, with copies of both tables."""
    torch.manual_seed(5)
    config_class, model_class = CLASSES[family]
    values = BASE | changes
    model = model_class(config_class(**values))
    tensors = {}
    for name, tensor in model.state_dict().items():
        values_of = torch.randn(tensor.shape) / (tensor.shape[-1] ** 0.5 if tensor.dim() > 1 else 10)
        tensors[name] = (values_of + (1 if name.endswith("norm.weight") else 0)).to(dtype)
        if name.endswith("e_score_correction_bias"):
            tensors[name] = torch.rand(tensor.shape)
    model.save_pretrained(folder)
    tensors = as_hub(tensors)
    layers, tied = values["num_hidden_layers"], values["tie_word_embeddings"]
    for number in range(layers, layers + mtp):
        tensors |= predicting(tensors, layers - 1, number, tied)
    if tied:
        tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit(folder, torch_dtype=str(dtype).removeprefix("torch."), dtype=None, num_nextn_predict_layers=mtp)
    return folder


def load(folder: Path, family: str) -> Any:
    """The model in transformers, in float32."""
    model = CLASSES[family][1].from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def as_hub(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts one by one, where transformers' module packs them."""
    found = {}
    for name, tensor in tensors.items():
        prefix, _, what = name.rpartition(".")
        if what not in ("gate_up_proj", "down_proj") or not prefix.endswith(".experts"):
            found[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            halves = matrix.chunk(2) if what == "gate_up_proj" else (matrix,)
            for kind, half in zip(("gate", "up") if len(halves) > 1 else ("down",), halves, strict=True):
                found[f"{prefix}.{expert}.{kind}_proj.weight"] = half.clone()
    return found


def predicting(tensors: dict[str, Tensor], last: int, number: int, tied: bool) -> dict[str, Tensor]:
    """Another layer like the `last` one, which predicts a further token."""
    prefix, hidden = f"model.layers.{number}.", len(tensors["model.norm.weight"])
    dtype = tensors["model.norm.weight"].dtype
    found = {
        name.replace(f"layers.{last}.", f"layers.{number}."): (
            torch.randn(tensor.shape) / (tensor.shape[-1] ** 0.5 if tensor.dim() > 1 else 1)
        ).to(tensor.dtype)
        for name, tensor in tensors.items()
        if name.startswith(f"model.layers.{last}.")
    }
    for name in ("enorm", "hnorm", "shared_head.norm"):
        found[f"{prefix}{name}.weight"] = (1 + torch.randn(hidden) / 10).to(dtype)
    found[f"{prefix}eh_proj.weight"] = (torch.randn(hidden, 2 * hidden) / hidden**0.5).to(dtype)
    found[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    head = tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]
    found[f"{prefix}shared_head.head.weight"] = head.clone()
    return found


def edit(folder: Path, **changes: Any) -> None:
    """Changes keys of config.json; None takes one out."""
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    gone = {key for key, value in changes.items() if value is None}
    path.write_text(json.dumps({key: value for key, value in raw.items() if key not in gone}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def quantise(
    tensor: Tensor, block: tuple[int, int] | None, scale_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(fp8 values, scales, what they mean in bfloat16); `block` None: one scale for all.

    The meaning is torch's own float32 product of each block, rounded once.
    """
    rows, columns = tensor.shape
    height, width = block or (rows, columns)
    grid = ceil(rows / height), ceil(columns / width)
    values, meaning = torch.empty(tensor.shape, dtype=dtype), torch.empty(tensor.shape, dtype=torch.bfloat16)
    scales = torch.empty(grid, dtype=scale_dtype)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scales[i, j] = tensor[part].float().abs().max().clamp(min=1e-6) * 1.01 / 448
            values[part] = (tensor[part].float() / scales[i, j].float()).to(dtype)
            meaning[part] = (values[part].float() * scales[i, j].float()).to(torch.bfloat16)
    return values, scales if block else scales.view(()), meaning


def write_fp8(
    source: Path, folder: Path, block: tuple[int, int] | None = (128, 128), *, suffix: str = "_scale_inv",
    config: dict[str, Any] | None = None, skip: Iterable[str] = ("embed_tokens", "lm_head", "head", "gate.weight"),
    **kinds: Any,
) -> Path:  # fmt: skip
    """`source` in fp8 in `folder`, and what its values mean in `folder`-meaning. Scales lie in a file of their own."""
    shutil.copytree(source, folder)
    meaning = shutil.copytree(source, folder.with_name(f"{folder.name}-meaning"))
    stored, scales, meant = {}, {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.dim() != 2 or any(part in name for part in skip):
            stored[name] = meant[name] = tensor
        else:
            stored[name], scales[f"{name}{suffix}"], meant[name] = quantise(tensor, block, **kinds)
    (folder / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": stored, "model-00002-of-00002.safetensors": scales}
    for name, tensors in files.items():
        save_file(tensors, folder / name, {"format": "pt"})
    where = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    save_file(meant, meaning / "model.safetensors", {"format": "pt"})
    edit(folder, quantization_config=FP8 if config is None else config)
    return folder
