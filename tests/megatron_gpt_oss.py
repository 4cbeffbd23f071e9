"""Runs the real megatron-core's GPT-OSS on a CPU, in a process of its own: one rank, local layer spec.

    python tests/megatron_gpt_oss.py JOBS.json

JOBS.json is a list of jobs. {"load": ROOT, "flags": [...], "out": FILE} builds a model as a run with
--use-checkpoint-args and `flags` has it, loads ROOT (torch_dist) into it, every parameter, and writes float32 logits
for "tokens". {"save": ROOT, "of": ROOT2, "hf": FOLDER} builds the model of ROOT2's args and saves it as training does,
its values put there by the naive mapping of gpt_oss_models.py. Nothing of the package under test is imported.
"""

from __future__ import annotations

import argparse
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import megatron_core
import megatron_starts
import torch
from doubled import doubled
from torch import Tensor

# What load_args_from_checkpoint of megatron.training sets (0.19.2).
RESTORED = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "position_embedding_type", "rotary_base", "rotary_percent", "add_bias_linear", "add_qkv_bias", "swiglu",
    "untie_embeddings_and_output_weights", "num_experts", "moe_layer_freq", "moe_router_topk", "moe_ffn_hidden_size",
    "moe_router_pre_softmax", "max_position_embeddings", "bf16",
)  # fmt: skip


def run_args(flags: list[str], stored: Namespace) -> Namespace:
    """The args of a run, as far as they decide the model: Megatron-LM's defaults, `flags`, then what is restored."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, kind, default in (
        ("norm-epsilon", float, 1e-5), ("activation-func-clamp-value", float, None), ("glu-linear-offset", float, 0.0),
        ("softmax-type", str, "vanilla"), ("rotary-scaling-factor", float, 1.0), ("window-attn-skip-freq", eval, None),
        ("yarn-original-max-position-embeddings", int, 4096), ("window-size", eval, None), ("mscale", float, 1.0),
        ("yarn-beta-fast", float, 32.0), ("yarn-beta-slow", float, 1.0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--quick-geglu", action="store_true")
    parser.add_argument("--no-yarn-correction-range-round-to-int", dest="round", action="store_false")
    args, _ = parser.parse_known_args(flags)
    for name in RESTORED:
        setattr(args, name, getattr(stored, name))
    return args


def build(args: Namespace, rows: int, dtype: torch.dtype) -> Any:
    from megatron.core.activations import quick_gelu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size, ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads, num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels, add_bias_linear=args.add_bias_linear, add_qkv_bias=args.add_qkv_bias,
        gated_linear_unit=args.swiglu or args.quick_geglu,
        activation_func=torch.nn.functional.silu if args.swiglu else quick_gelu if args.quick_geglu
        else torch.nn.functional.gelu,
        glu_linear_offset=args.glu_linear_offset, activation_func_clamp_value=args.activation_func_clamp_value,
        softmax_type=args.softmax_type, window_size=args.window_size, window_attn_skip_freq=args.window_attn_skip_freq,
        normalization="RMSNorm", layernorm_epsilon=args.norm_epsilon, num_moe_experts=args.num_experts,
        moe_ffn_hidden_size=args.moe_ffn_hidden_size, moe_router_topk=args.moe_router_topk,
        moe_layer_freq=args.moe_layer_freq, moe_router_pre_softmax=args.moe_router_pre_softmax,
        moe_router_load_balancing_type="none", params_dtype=dtype, bf16=dtype is torch.bfloat16, pipeline_dtype=dtype,
        use_cpu_initialization=True, perform_initialization=False, attention_dropout=0.0, hidden_dropout=0.0,
        masked_softmax_fusion=False, bias_activation_fusion=False, apply_rope_fusion=False,
        gradient_accumulation_fusion=False, attention_softmax_in_fp32=True,
    )  # fmt: skip
    yarn = {
        "rotary_scaling_factor": args.rotary_scaling_factor, "beta_fast": args.yarn_beta_fast,
        "beta_slow": args.yarn_beta_slow, "mscale": args.mscale, "mscale_all_dim": 0.0,
        "original_max_position_embeddings": args.yarn_original_max_position_embeddings,
        "correction_range_round_to_int": args.round,
    }  # fmt: skip
    for name, value in yarn.items():  # attributes that no field declares, in 0.16 and 0.19 alike
        setattr(config, f"yarn_{name}", value)
    spec: Any = get_gpt_decoder_block_spec(config, False, normalization="RMSNorm")
    model = GPTModel(
        config=config, transformer_layer_spec=spec, vocab_size=rows, max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type, rotary_base=args.rotary_base,
        rotary_percent=args.rotary_percent,
    )  # fmt: skip
    return model.to(dtype).eval()


def stored_args(folder: Path) -> tuple[Namespace, Any]:
    from megatron.core import dist_checkpointing

    common = dist_checkpointing.load_common_state_dict(str(folder))
    return common["args"], dist_checkpointing.load_content_metadata(preloaded_state_dict=common)


def load(job: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing

    folder = megatron_core.checkpoint_folder(Path(job["load"]))
    stored, metadata = stored_args(folder)
    args = run_args(job["flags"], stored)
    model = build(args, job["rows"], torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    state: Any = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, str(folder))
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


def local_name(name: str) -> str:
    """TEGroupedMLP's and Transformer Engine's names of gpt_oss_models.in_megatron as the local spec has them."""
    before, dot, behind = name.partition(".mlp.experts.")
    if dot:
        module, kind = behind.split(".")
        number = "".join(filter(str.isdigit, kind))
        return f"{before}.mlp.experts.local_experts.{number}.{module}.{kind.removesuffix(number)}"
    return name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")


def save(job: dict[str, Any]) -> None:
    import gpt_oss_models as oss
    from megatron.core import dist_checkpointing

    root = Path(job["save"])
    stored, metadata = stored_args(megatron_core.checkpoint_folder(Path(job["of"])))
    tensors = oss.in_megatron(oss.stored(Path(job["hf"])))
    model = build(run_args(job["flags"], stored), job["rows"], torch.bfloat16)
    ours: dict[str, Tensor] = {local_name(name): tensor for name, tensor in tensors.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter[: len(ours[name])].copy_(ours.pop(name))
    assert not ours
    folder = root / "iter_0000005"
    folder.mkdir(parents=True)
    metadata = metadata or megatron_core.content_metadata("stacked")
    state: dict[str, Any] = {"args": stored, "checkpoint_version": 3.0, "iteration": 5}
    state["model"] = model.sharded_state_dict(metadata=metadata)
    dist_checkpointing.save(state, str(folder), content_metadata=metadata)
    (root / "latest_checkpointed_iteration.txt").write_text("5")


if __name__ == "__main__":
    todo = json.loads(Path(sys.argv[1]).read_text())
    megatron_starts.one_process(todo, lambda job: (save if "save" in job else load)(job))
