"""Runs the real megatron-core's HybridModel on a CPU, in a process of its own: one rank, Transformer Engine's spec.

    python tests/megatron_hybrid.py JOBS.json

JOBS.json is a list of jobs. {"load": ROOT, "out": FILE} builds the model that ROOT's args say, loads ROOT (torch_dist,
or one rank file) into it, every parameter, and writes float32 logits for "tokens". {"save": ROOT, "of": ROOT2, "hf":
FILE, "format": torch_dist|torch} builds the model of ROOT2's args and saves it as training does, its values put there
by a naive mapping. Nothing of the package under test is imported.
"""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import mamba_stand_in
import te_stand_in

te_stand_in.install()
mamba_stand_in.install()

import megatron_core  # noqa: E402
import megatron_starts  # noqa: E402
import torch  # noqa: E402
from doubled import doubled  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402


def build(args: Namespace, rows: int, dtype: torch.dtype) -> Any:
    from megatron.core.activations import squared_relu
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer import TransformerConfig

    experts: dict[str, Any] = {}
    if args.num_experts:
        experts = {
            "num_moe_experts": args.num_experts, "moe_ffn_hidden_size": args.moe_ffn_hidden_size,
            "moe_router_topk": args.moe_router_topk, "moe_router_score_function": args.moe_router_score_function,
            "moe_router_enable_expert_bias": args.moe_router_enable_expert_bias,
            "moe_router_topk_scaling_factor": args.moe_router_topk_scaling_factor,
            "moe_router_num_groups": args.moe_router_num_groups, "moe_router_group_topk": args.moe_router_group_topk,
            "moe_shared_expert_intermediate_size": args.moe_shared_expert_intermediate_size,
            "moe_latent_size": args.moe_latent_size, "moe_grouped_gemm": True,
            "moe_router_load_balancing_type": "none", "moe_router_dtype": "fp32",
        }  # fmt: skip
    config = TransformerConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size, ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads, num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels, add_bias_linear=False, gated_linear_unit=args.swiglu,
        activation_func=squared_relu if args.squared_relu else torch.nn.functional.silu, normalization="RMSNorm",
        layernorm_epsilon=args.layernorm_epsilon, mamba_state_dim=args.mamba_state_dim,
        mamba_head_dim=args.mamba_head_dim, mamba_num_groups=args.mamba_num_groups,
        mamba_num_heads=getattr(args, "mamba_num_heads", None), params_dtype=dtype, bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype, use_cpu_initialization=True, perform_initialization=False, attention_dropout=0.0,
        hidden_dropout=0.0, masked_softmax_fusion=False, bias_activation_fusion=False, apply_rope_fusion=False,
        gradient_accumulation_fusion=False, attention_softmax_in_fp32=True, **experts,
    )  # fmt: skip
    model = HybridModel(
        config, hybrid_stack_spec, rows, args.max_position_embeddings, hybrid_layer_pattern=args.hybrid_layer_pattern,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type, rotary_base=args.rotary_base,
    )  # fmt: skip
    model = model.to(dtype).eval()
    for name, buffer in model.named_buffers():  # as training keeps it
        if name.endswith("expert_bias"):
            buffer.data = buffer.data.float()
    return model


def rank_file(folder: Path) -> dict[str, Any] | None:
    path = folder / "mp_rank_00" / "model_optim_rng.pt"
    return torch.load(path, weights_only=False) if path.is_file() else None


def stored_args(folder: Path) -> tuple[Namespace, Any]:
    from megatron.core import dist_checkpointing

    content = rank_file(folder)
    if content is not None:
        return content["args"], None
    common = dist_checkpointing.load_common_state_dict(str(folder))
    return common["args"], dist_checkpointing.load_content_metadata(preloaded_state_dict=common)


def load(job: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing

    folder = megatron_core.checkpoint_folder(Path(job["load"]))
    args, metadata = stored_args(folder)
    content = rank_file(folder)
    model = build(args, job["rows"], torch.bfloat16)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    if content is None:
        state: Any = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, str(folder))
    else:
        states = {name: each for name, each in model.state_dict().items() if "_extra_state" in name}
        own = {name for name in model.state_dict() if "_extra_state" not in name}
        state = {"model": states | {name: each for name, each in content["model"].items() if name in own}}
    model.load_state_dict(state["model"], strict=True)
    assert not [name for name, each in model.named_parameters() if each.isnan().any()]
    exact = build(args, job["rows"], torch.float32)
    exact.load_state_dict(model.state_dict())
    tokens = torch.tensor(job["tokens"])[None]
    length = tokens.shape[1]
    mask = torch.ones(1, 1, length, length).triu(diagonal=1).bool()
    with torch.no_grad():
        logits = exact(tokens, torch.arange(length)[None], mask)
    found = {"logits": logits[0].clone()}
    with torch.no_grad(), doubled():
        exact = build(args, job["rows"], torch.float64)
        exact.load_state_dict(model.state_dict())
        found["logits64"] = exact(tokens, torch.arange(length)[None], mask)[0].clone()
    torch.save(found, job["out"])


NORMS = {
    "mixer.in_proj.layer_norm_weight", "self_attention.linear_qkv.layer_norm_weight",
    "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight",
}  # fmt: skip
OUTSIDE = {
    "embedding.word_embeddings.weight": "backbone.embeddings.weight", "output_layer.weight": "lm_head.weight",
    "decoder.final_norm.weight": "backbone.norm_f.weight",
}  # fmt: skip


def value_of(name: str, hf: dict[str, Tensor], groups: int) -> Tensor:
    """The naive mapping: a live name of one rank -> its value."""
    if name in OUTSIDE:
        return hf[OUTSIDE[name]]
    _, _, layer, inner = name.split(".", 3)
    at = f"backbone.layers.{layer}."
    if inner in NORMS:
        return hf[f"{at}norm.weight"]
    if inner == "self_attention.linear_qkv.weight":
        q, k, v = (hf[f"{at}mixer.{kind}_proj.weight"].chunk(groups) for kind in "qkv")
        return torch.cat([part for group in zip(q, k, v, strict=True) for part in group])
    if match := re.fullmatch(r"mlp\.experts\.linear_fc(\d)\.weight(\d+)", inner):
        return hf[f"{at}mixer.experts.{match[2]}.{('up', 'down')[int(match[1]) - 1]}_proj.weight"]
    for old, new in (
        ("self_attention.linear_proj", "mixer.o_proj"),
        ("mlp.router.expert_bias", "mixer.gate.e_score_correction_bias"),
        ("mlp.router", "mixer.gate"), ("mlp.", "mixer."), ("linear_fc1", "up_proj"), ("linear_fc2", "down_proj"),
        ("conv1d_", "conv1d."),
    ):  # fmt: skip
        inner = inner.replace(old, new)
    return hf[at + inner]


def save(job: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing

    root = Path(job["save"])
    args, metadata = stored_args(megatron_core.checkpoint_folder(Path(job["of"])))
    hf = load_file(job["hf"])
    model = build(args, job["rows"], torch.bfloat16)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "tokens_per_expert" in name:
                continue
            value = value_of(name, hf, args.num_query_groups)
            tensor[: len(value)].copy_(value)
    folder = root / "iter_0000005"
    folder.mkdir(parents=True)
    state: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": 5}
    if job["format"] == "torch":
        (folder / "mp_rank_00").mkdir()
        torch.save(state | {"model": model.state_dict()}, folder / "mp_rank_00" / "model_optim_rng.pt")
    else:
        metadata = metadata or megatron_core.content_metadata("stacked")
        state["model"] = model.sharded_state_dict(metadata=metadata)
        dist_checkpointing.save(state, str(folder), content_metadata=metadata)
    (root / "latest_checkpointed_iteration.txt").write_text("5")


if __name__ == "__main__":
    todo = json.loads(Path(sys.argv[1]).read_text())
    megatron_starts.one_process(todo, lambda job: (save if "save" in job else load)(job))
