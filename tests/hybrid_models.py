"""Tiny random hybrids, each layer one sub-block, laid out as the hub's: names of Nemotron-H, experts one by one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "vocab_size": 96, "hidden_size": 32,
    "hybrid_override_pattern": "M-M*-M", "num_hidden_layers": 6, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 512, "layer_norm_epsilon": 1e-5,
    "rms_norm_eps": 1e-5, "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "mamba_num_heads": 8,
    "mamba_head_dim": 6, "ssm_state_size": 10, "n_groups": 4, "conv_kernel": 4, "use_conv_bias": True,
    "use_bias": False, "mlp_bias": False, "attention_bias": False, "chunk_size": 128, "expand": 2,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "time_step_limit": [0.0, float("inf")], "time_step_min": 0.001,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "hybrid_override_pattern": "ME*-ME", "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 24, "routed_scaling_factor": 2.5,
    "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
}  # fmt: skip
LATENT = {**EXPERTS, "moe_latent_size": 20}
FLOAT32 = ("A_log", ".D")


def value(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A value by which every part of the model moves the logits, and no state forgets at once."""
    normal = torch.randn(shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        return 0.15 * normal
    if name.endswith("A_log"):
        return torch.log(0.05 + 2 * torch.rand(shape, generator=generator))
    if name.endswith("dt_bias"):
        return 0.5 * normal - 1
    if re.search(r"norm(_f)?\.weight$|\.D$", name):
        return 1 + 0.25 * normal
    return normal * (0.35 if "conv1d" in name else 0.2 if len(shape) == 1 else 0.8 / shape[-1] ** 0.5)


def write(
    folder: Path, *, dtype: torch.dtype = torch.bfloat16, float32: tuple[str, ...] = (), **changes: Any
) -> Path:  # fmt: skip
    """A model of CONFIG with `changes`, its values in `dtype`, those whose names end as `float32` says in that."""
    from transformers import AutoConfig, NemotronHForCausalLM

    folder.mkdir(parents=True)
    config = {**CONFIG, **changes, "torch_dtype": str(dtype).removeprefix("torch.")}
    config["num_hidden_layers"] = len(config["hybrid_override_pattern"])
    (folder / "config.json").write_text(json.dumps(config))
    model = NemotronHForCausalLM._from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    generator, tensors = torch.Generator().manual_seed(5), {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        new = value(name, tuple(tensor.shape), generator)
        new = new.to(torch.float32 if name.endswith(("e_score_correction_bias", *float32)) else dtype)
        name = name.replace("model.", "backbone.", 1) if name.startswith("model.") else name
        if match := re.fullmatch(r"(.*\.mixer\.experts)\.(up|down)_proj", name):
            for expert, matrix in enumerate(new):
                tensors[f"{match[1]}.{expert}.{match[2]}_proj.weight"] = matrix.clone()
        else:
            tensors[name] = new
    if config["tie_word_embeddings"]:  # which transformers leaves to the file
        tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def logits(folder: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """transformers', in one chunk: some releases of it are wrong behind the first."""
    from transformers import NemotronHForCausalLM

    model = NemotronHForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(ids).logits[0]
