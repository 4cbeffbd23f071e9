"""Runs the real megatron-core's latent attention and prediction layers on a CPU, in processes of its own.

    python tests/megatron_latent.py JOBS.json

JOBS.json is a list of {"load": ROOT, "flags": [...], "out": FILE, "tp": 1, "ep": 1, "rows": N, "tokens": [...]}. A job
builds a model as a run with --use-checkpoint-args and `flags` has it, by the layer spec of Transformer Engine (which
te_stand_in.py stands in for: there is no other with latent attention), loads ROOT, every parameter, and writes float32
logits and what the prediction layers put out. With "save" it then saves the model there as training does, in ROOT's
format. "may_stop": an error is a result. Nothing of the package under test is imported.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import te_stand_in
import torch

te_stand_in.install()

import megatron_core  # noqa: E402
import megatron_starts  # noqa: E402

WORLD = 2
# What load_args_from_checkpoint of megatron.training sets (0.16.1, 0.19.2).
RESTORED = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "position_embedding_type", "rotary_base", "rotary_percent", "add_bias_linear", "add_qkv_bias", "swiglu",
    "untie_embeddings_and_output_weights", "num_experts", "moe_layer_freq", "moe_router_topk", "moe_ffn_hidden_size",
    "moe_router_pre_softmax", "moe_router_topk_scaling_factor", "moe_router_score_function",
    "moe_router_enable_expert_bias", "moe_shared_expert_intermediate_size", "max_position_embeddings",
    "mtp_num_layers",
)  # fmt: skip


def run_args(flags: list[str], stored: Namespace) -> Namespace:
    """The args of a run, as far as they decide the model: Megatron-LM's defaults, `flags`, then what is restored."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, kind, default in (
        ("norm-epsilon", float, 1e-5), ("q-lora-rank", int, None), ("kv-lora-rank", int, 32),
        ("qk-head-dim", int, 128), ("qk-pos-emb-head-dim", int, 64), ("v-head-dim", int, 128),
        ("rotary-scaling-factor", float, 1.0), ("mscale", float, 1.0), ("mscale-all-dim", float, 0.0),
        ("rope-type", str, None), ("moe-router-dtype", str, None), ("moe-router-num-groups", int, None),
        ("moe-router-group-topk", int, None),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    for name in ("multi-latent-attention", "qk-layernorm", "mla-down-proj-fusion", "moe-grouped-gemm"):
        parser.add_argument(f"--{name}", action="store_true")
    args, _ = parser.parse_known_args(flags)
    for name in RESTORED:
        setattr(args, name, getattr(stored, name, None))
    args.moe_grouped_gemm = args.moe_grouped_gemm or bool(getattr(stored, "moe_grouped_gemm", False))
    return args


def build(args: Namespace, job: dict[str, Any], dtype: torch.dtype) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer import transformer_config

    values: dict[str, Any] = {
        name: getattr(args, name)
        for name in (
            "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "add_bias_linear",
            "moe_layer_freq", "moe_router_topk", "moe_ffn_hidden_size", "moe_router_topk_scaling_factor",
            "moe_router_score_function", "moe_shared_expert_intermediate_size", "moe_router_dtype",
            "moe_router_num_groups", "moe_router_group_topk", "moe_grouped_gemm", "qk_layernorm", "mtp_num_layers",
        )
    }  # fmt: skip
    values["num_moe_experts"] = args.num_experts
    values["moe_router_pre_softmax"] = bool(args.moe_router_pre_softmax)
    values["moe_router_enable_expert_bias"] = bool(args.moe_router_enable_expert_bias)
    kind = transformer_config.TransformerConfig
    if args.multi_latent_attention:
        kind = transformer_config.MLATransformerConfig
        values |= {
            name: getattr(args, name)
            for name in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim",
                         "rotary_scaling_factor", "mscale", "mscale_all_dim", "rotary_base", "rotary_percent")
        }  # fmt: skip
        values["rope_type"] = args.rope_type or "yarn"
        if args.mla_down_proj_fusion:
            values["mla_down_proj_fusion"] = True
    config = kind(
        gated_linear_unit=args.swiglu, activation_func=torch.nn.functional.silu, normalization="RMSNorm",
        layernorm_epsilon=args.norm_epsilon, moe_router_load_balancing_type="none", params_dtype=dtype,
        bf16=dtype is torch.bfloat16, pipeline_dtype=dtype, use_cpu_initialization=True, perform_initialization=False,
        attention_dropout=0.0, hidden_dropout=0.0, masked_softmax_fusion=False, bias_activation_fusion=False,
        apply_rope_fusion=False, gradient_accumulation_fusion=False, attention_softmax_in_fp32=True,
        tensor_model_parallel_size=job["tp"], expert_model_parallel_size=job["ep"], expert_tensor_parallel_size=1,
        moe_token_dispatcher_type="allgather", **values,
    )  # fmt: skip
    spec: Any = get_gpt_decoder_block_spec(config, True, normalization="RMSNorm")
    further: Any = get_gpt_mtp_block_spec(config, spec, True) if args.mtp_num_layers else None
    model = GPTModel(
        config=config, transformer_layer_spec=spec, vocab_size=job["rows"], mtp_block_spec=further,
        max_sequence_length=args.max_position_embeddings, position_embedding_type="rope",
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        rotary_base=args.rotary_base, rotary_percent=args.rotary_percent,
    )  # fmt: skip
    return model.to(dtype).eval() if dtype is not torch.float32 else model.eval()


def own_folder(job: dict[str, Any]) -> str:
    from megatron.core import parallel_state

    expert = f"_{parallel_state.get_expert_model_parallel_rank():03d}" if job["ep"] > 1 else ""
    return f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}{expert}"


def load(job: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing

    folder = megatron_core.checkpoint_folder(Path(job["load"]))
    if (folder / ".metadata").exists():
        common = dist_checkpointing.load_common_state_dict(str(folder))
        metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
        args = run_args(job["flags"], common["args"])
        model = empty(args, job)
        state: Any = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, str(folder))
    else:
        metadata = None
        state = torch.load(folder / own_folder(job) / "model_optim_rng.pt", weights_only=False)
        args = run_args(job["flags"], state["args"])
        model = empty(args, job)
    older = any(".transformer_layer." in name for name in model.state_dict())  # before 0.18, in rank files
    held = {
        name.replace(".mtp_model_layer.", ".transformer_layer.") if older else name: each
        for name, each in state["model"].items()
    }
    loaded = model.load_state_dict(held, strict=False)
    lost = [name for name in loaded.missing_keys if not name.endswith("_extra_state")]
    assert not lost, lost
    # Rank files have both spellings of a norm, of which Megatron-LM's second, forgiving try takes its own.
    others = [name for name in loaded.unexpected_keys if not name.endswith(("_layernorm.weight", "_extra_state"))]
    assert not others, others
    left = [name for name, each in parameters(model) if each.isnan().any()]
    assert not left, left
    exact = build(args, job, torch.float32)
    exact.load_state_dict(model.state_dict(), strict=False)
    found = forward(exact, torch.tensor(job["tokens"])[None])
    if torch.distributed.get_rank() == 0:
        torch.save(found, job["out"])
    if "save" in job:
        save(job, model, state if metadata is None else common, metadata)


def parameters(model: Any) -> Any:
    biases = ((name, each) for name, each in model.named_buffers() if name.endswith("expert_bias"))
    return [*model.named_parameters(), *biases]


def empty(args: Namespace, job: dict[str, Any]) -> Any:
    model = build(args, job, torch.bfloat16)
    with torch.no_grad():
        for name, parameter in parameters(model):
            if name.endswith("expert_bias"):
                parameter.data = parameter.data.float()
            parameter.fill_(float("nan"))
    return model


def save(job: dict[str, Any], model: Any, before: Any, metadata: Any) -> None:
    """As training saves it, in the format that was loaded."""
    from megatron.core import dist_checkpointing

    root = Path(job["save"])
    folder = root / "iter_0000005"
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {"args": before["args"], "checkpoint_version": 3.0, "iteration": 5}
    if metadata is None:
        state["model"] = model.state_dict_for_save_checkpoint()
        (folder / own_folder(job)).mkdir()
        torch.save(state, folder / own_folder(job) / "model_optim_rng.pt")
    else:
        state["model"] = model.sharded_state_dict(metadata=metadata)
        dist_checkpointing.save(state, str(folder), content_metadata=metadata)
    (root / "latest_checkpointed_iteration.txt").write_text("5")


@torch.no_grad()
def forward(model: Any, tokens: torch.Tensor) -> dict[str, Any]:
    """Logits (length, rows), and the outputs of prediction layers, (length, hidden) each."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    heads: list[torch.Tensor] = []
    further: list[torch.Tensor] = []
    # The loss, which a model with prediction layers computes, changes logits in place.
    model.output_layer.register_forward_hook(lambda module, given, made: heads.append(made[0].clone()))
    if model.mtp_process:
        model.mtp.register_forward_hook(lambda module, given, made: further.append(made))
    length = tokens.shape[1]
    mask = torch.ones(1, 1, length, length).triu(diagonal=1).bool()
    labels = {"labels": torch.zeros_like(tokens)} if model.mtp_process else {}
    model(tokens, torch.arange(length)[None], mask, **labels)
    logits = gather_from_tensor_model_parallel_region(heads[-1])[:, 0].float().clone()
    layers = model.config.mtp_num_layers or 0
    predicted = [part[:, 0].clone() for part in further[0].chunk(1 + layers)[1:]] if further else []
    return {"logits": logits, "predicted": predicted}


if __name__ == "__main__":
    sys.exit(megatron_starts.many_processes(__file__, WORLD, load))
