"""Runs the real megatron-core on a CPU: writes its checkpoints, and loads ours into its GPTModel.

    python tests/megatron_core.py save --hf-config HF/config.json --out ROOT [--format torch_dist|torch] [--tp N] [...]
    python tests/megatron_core.py load --hf-config HF/config.json --checkpoint ROOT --out RESULT.pt [--norms ...] [...]
    python tests/megatron_core.py run JOBS.json

`run` does many of the former in one set of processes, since importing megatron-core takes longest: JOBS.json is a list
of argument lists. A job that fails leaves its traceback in ERROR-N.txt beside JOBS.json, N being its number.

Neither action imports the package under test: the conversion between HF and Megatron-Core tensors below is a second,
naive one.

`save` draws HF tensors from --seed, puts them into a GPTModel, and saves that as Megatron-LM's training does. ROOT gets
the checkpoint, `expected.safetensors` (HF names, V rows), `padded.safetensors` (the vocabulary tables with padding
rows) and `config.json` (the HF one).

`load` fills every parameter with NaN, loads with megatron-core's own strictness, and writes a dict to RESULT.pt:
`logits` [batch, sequence, V] computed in float32, `tokens`, `parameters` (count), `nan` (parameters that still hold a
NaN), `unexpected` and `missing` (names, non-strict legacy loads only), `dtypes`, `args` (the checkpoint's, as a dict).

One process per rank on this machine over gloo. What is replaced of CUDA: see `cpu_shims`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import core_experts
import torch
from core_experts import Experts
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]

# (module in a local-spec layer, module under which Transformer Engine and torch_dist keep the same norm)
NORM_SPELLINGS = (
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
)
# An arg of uneven pipeline stages -> the field of TransformerConfig, where they differ.
STAGE_FIELDS = {
    "decoder_first_pipeline_num_layers": "num_layers_in_first_pipeline_stage",
    "decoder_last_pipeline_num_layers": "num_layers_in_last_pipeline_stage",
}
LEGACY = {"moe_grouped_gemm": True, "moe_use_legacy_grouped_gemm": True}  # GroupedMLP, gone since 0.17
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


# --- sizes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """What a GPTModel needs, read from an HF config.json of Llama's kind, with experts or without."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    epsilon: float
    theta: float
    rope_factor: float | None
    window: int | None
    tied: bool
    dtype: torch.dtype
    qkv_bias: bool = False
    qk_norm: bool = False
    llama3_factor: float | None = None
    rotary_percent: float = 1.0
    experts: Experts | None = None

    @classmethod
    def from_hf(cls, path: Path) -> Sizes:
        config = json.loads(path.read_text())
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "linear", "llama3"):
            raise SystemExit(f"the harness has no rope type {rope_type}")
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            ffn=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            epsilon=config["rms_norm_eps"],
            theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            rope_factor=float(rope["factor"]) if rope_type == "linear" else None,
            window=config.get("sliding_window") if config["model_type"] == "mistral" else None,
            tied=bool(config.get("tie_word_embeddings", False)),
            dtype=getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32"),
            qkv_bias=config["model_type"] in ("qwen2", "qwen2_moe") or config["model_type"] == "glm4_moe",
            qk_norm=config["model_type"] in ("qwen3", "qwen3_moe") or bool(config.get("use_qk_norm")),
            llama3_factor=float(rope["factor"]) if rope_type == "llama3" else None,
            rotary_percent=config.get("partial_rotary_factor") or 1.0,
            experts=Experts.from_hf(config),
        )

    def padded_vocab(self, divisible_by: int, tp: int) -> int:
        multiple = divisible_by * tp
        return (self.vocab + multiple - 1) // multiple * multiple


# --- the naive conversion --------------------------------------------------------------------------------------------


def random_hf(sizes: Sizes, seed: int, rows: int) -> Tensors:
    """HF tensors with vocabulary tables of `rows` rows; no norm is one, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(out_features: int, in_features: int) -> Tensor:
        # every value a bfloat16: casts between dtypes cannot hide behind rounding
        return (torch.randn(out_features, in_features, generator=generator) * 0.08).bfloat16().to(sizes.dtype)

    def norm(size: int = sizes.hidden) -> Tensor:
        return (1 + 0.3 * torch.randn(size, generator=generator)).bfloat16().to(sizes.dtype)

    query, key = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    tensors = {"model.embed_tokens.weight": matrix(rows, sizes.hidden), "model.norm.weight": norm()}
    if not sizes.tied:
        tensors["lm_head.weight"] = matrix(rows, sizes.hidden)
    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            f"{prefix}input_layernorm.weight": norm(),
            f"{prefix}post_attention_layernorm.weight": norm(),
            f"{prefix}self_attn.q_proj.weight": matrix(query, sizes.hidden),
            f"{prefix}self_attn.k_proj.weight": matrix(key, sizes.hidden),
            f"{prefix}self_attn.v_proj.weight": matrix(key, sizes.hidden),
            f"{prefix}self_attn.o_proj.weight": matrix(sizes.hidden, query),
        }
        if sizes.qkv_bias:
            parts = (("q", query), ("k", key), ("v", key))
            tensors |= {f"{prefix}self_attn.{name}_proj.bias": matrix(1, size)[0] for name, size in parts}
        if sizes.qk_norm:
            tensors |= {f"{prefix}self_attn.{name}_norm.weight": norm(sizes.head_dim) for name in "qk"}
        if sizes.experts is not None and sizes.experts.layers[layer]:
            own = sizes.experts.random(layer, sizes.hidden, matrix)
            tensors |= {prefix + name: tensor for name, tensor in own.items()}
        else:
            tensors |= {
                f"{prefix}mlp.gate_proj.weight": matrix(sizes.ffn, sizes.hidden),
                f"{prefix}mlp.up_proj.weight": matrix(sizes.ffn, sizes.hidden),
                f"{prefix}mlp.down_proj.weight": matrix(sizes.hidden, sizes.ffn),
            }
    return tensors


Cut = tuple[int, int]  # (rank, size)


def rank_tensors(hf: Tensors, sizes: Sizes, tensor: Cut, expert: Cut = (0, 1), expert_tensor: Cut = (0, 1)) -> Tensors:
    """One rank's local-spec tensors of the whole depth, layers by global number."""
    rank, tp = tensor
    tensors = {
        EMBEDDING: hf["model.embed_tokens.weight"].chunk(tp)[rank],
        HEAD: hf["model.embed_tokens.weight" if sizes.tied else "lm_head.weight"].chunk(tp)[rank],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    per_group, dim = sizes.heads // sizes.kv_heads, sizes.head_dim
    for layer in range(sizes.layers):
        source, target = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        q, k, v = (hf[f"{source}self_attn.{name}_proj.weight"] for name in "qkv")

        def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = []
            for group in range(sizes.kv_heads):
                rows.append(q[group * per_group * dim : (group + 1) * per_group * dim])
                rows.append(k[group * dim : (group + 1) * dim])
                rows.append(v[group * dim : (group + 1) * dim])
            return torch.cat(rows).chunk(tp)[rank]

        tensors |= {
            f"{target}input_layernorm.weight": hf[f"{source}input_layernorm.weight"],
            f"{target}pre_mlp_layernorm.weight": hf[f"{source}post_attention_layernorm.weight"],
            f"{target}self_attention.linear_qkv.weight": grouped(q, k, v),
            f"{target}self_attention.linear_proj.weight": hf[f"{source}self_attn.o_proj.weight"].chunk(tp, dim=1)[rank],
        }
        if sizes.qkv_bias:
            biases = (hf[f"{source}self_attn.{name}_proj.bias"] for name in "qkv")
            tensors[f"{target}self_attention.linear_qkv.bias"] = grouped(*biases)
        if sizes.qk_norm:
            for name in "qk":
                norm = hf[f"{source}self_attn.{name}_norm.weight"]
                tensors[f"{target}self_attention.{name}_layernorm.weight"] = norm
        if sizes.experts is not None and sizes.experts.layers[layer]:
            tensors |= sizes.experts.of_rank(hf, source, target, tensor, expert, expert_tensor)
            continue
        gate, up = (hf[f"{source}mlp.{name}_proj.weight"].chunk(tp)[rank] for name in ("gate", "up"))
        tensors |= {
            f"{target}mlp.linear_fc1.weight": torch.cat([gate, up]),
            f"{target}mlp.linear_fc2.weight": hf[f"{source}mlp.down_proj.weight"].chunk(tp, dim=1)[rank],
        }
    return tensors


# --- megatron-core on a CPU ------------------------------------------------------------------------------------------


class Idle:
    """A stream or an event that has nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: Idle()


def cpu_shims() -> None:
    """The places where megatron-core reaches for a GPU on these paths; the last only with a tied head and PP > 1."""
    from megatron.core.tensor_parallel import random as tp_random
    from megatron.core.transformer.moe import moe_utils

    cpu: Any = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.Stream = torch.cuda.Event = Idle  # of those that deal tokens out to experts
    torch.cuda.current_stream = lambda *args: Idle()
    torch.cuda.stream = lambda *args: contextlib.nullcontext()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    ones = torch.ones
    torch.ones = lambda *args, **kwargs: ones(*args, **(kwargs | {"device": "cpu"}))  # the mask of a window

    @contextlib.contextmanager
    def fork(self: Any, name: str = "") -> Iterator[None]:
        yield

    tp_random.CudaRNGStatesTracker.fork = fork
    vars(moe_utils).setdefault("te_general_gemm", None)  # 0.16.1 forgets it where Transformer Engine is not installed


@dataclass(frozen=True)
class Chunk:
    """One model chunk of this rank; `first` and `last` say whether it holds the embedding, and the head."""

    model: Any
    virtual: int
    offset: int
    first: bool
    last: bool


def build_chunks(sizes: Sizes, options: Namespace, window: tuple[int, int] | None = None) -> list[Chunk]:
    """GPTModels of this rank in the local layer spec, one per virtual stage."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    config = TransformerConfig(
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        ffn_hidden_size=sizes.ffn,
        num_attention_heads=sizes.heads,
        num_query_groups=sizes.kv_heads,
        kv_channels=sizes.head_dim,
        tensor_model_parallel_size=options.tp,
        pipeline_model_parallel_size=options.pp,
        virtual_pipeline_model_parallel_size=options.vpp if options.vpp > 1 else None,
        pipeline_dtype=sizes.dtype,
        params_dtype=sizes.dtype,
        bf16=sizes.dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        add_bias_linear=False,
        add_qkv_bias=sizes.qkv_bias,
        qk_layernorm=sizes.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        layernorm_epsilon=sizes.epsilon,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        attention_softmax_in_fp32=True,
        window_size=window,
        **expert_fields(sizes, options),
        **{STAGE_FIELDS.get(name, name): value for name, value in options.stages.items()},
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    chunks = []
    for virtual in range(options.vpp):
        first = stage == 0 and virtual == 0
        last = stage == options.pp - 1 and virtual == options.vpp - 1
        spec: Any = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=sizes.qk_norm)
        if sizes.experts is not None:
            stage_of = virtual if options.vpp > 1 else None
            spec = get_gpt_decoder_block_spec(config, False, normalization="RMSNorm", vp_stage=stage_of)
        model = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=sizes.padded_vocab(options.divisible_by, options.tp),
            max_sequence_length=sizes.max_positions,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=sizes.tied,
            position_embedding_type="rope",
            rotary_base=int(sizes.theta),
            rotary_percent=sizes.rotary_percent,
            seq_len_interpolation_factor=sizes.rope_factor,
            rope_scaling=sizes.llama3_factor is not None,
            rope_scaling_factor=sizes.llama3_factor or 8.0,
            vp_stage=virtual if options.vpp > 1 else None,
        )
        model.to(sizes.dtype).eval()  # as training's Float16Module does: the local norms are born float32
        for module in model.modules():
            if hasattr(module, "_maintain_float32_expert_bias"):
                module._maintain_float32_expert_bias()
        offset = get_transformer_layer_offset(config, virtual if options.vpp > 1 else None)
        chunks.append(Chunk(model, virtual, offset, first, last))
    return chunks


def expert_fields(sizes: Sizes, options: Namespace) -> dict[str, Any]:
    """What TransformerConfig is told where there are experts."""
    if sizes.experts is None:
        return {}
    return sizes.experts.config() | {
        "expert_model_parallel_size": options.ep,
        "expert_tensor_parallel_size": options.etp or options.tp,
        **(LEGACY if options.experts == "legacy" else {}),
    }


def world_of(options: Namespace) -> int:
    """The fewest processes that hold both, the dense layers' ranks and the experts'."""
    return math.lcm(options.tp, options.ep * (options.etp or options.tp)) * options.pp


@torch.no_grad()
def forward(chunks: list[Chunk], tokens: Tensor, options: Namespace) -> Tensor | None:
    """Logits [batch, sequence, padded V] on tensor rank 0 of the last stage, None elsewhere."""
    from megatron.core import parallel_state

    batch, length = tokens.shape
    positions = torch.arange(length).expand(batch, length)
    mask = torch.ones(1, 1, length, length).triu(diagonal=1).bool()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    group_ranks = torch.distributed.get_process_group_ranks(group)
    hidden = torch.empty(0)
    for virtual in range(options.vpp):
        chunk = chunks[virtual]
        hidden_shape = (length, batch, chunk.model.config.hidden_size)
        if not chunk.first:
            if options.pp > 1:
                hidden = torch.empty(hidden_shape)
                torch.distributed.recv(hidden, src=group_ranks[(stage - 1) % options.pp])
            chunk.model.set_input_tensor(hidden)
        hidden = chunk.model(tokens, positions, mask)
        if not chunk.last and options.pp > 1:
            torch.distributed.send(hidden.contiguous(), dst=group_ranks[(stage + 1) % options.pp])
    if not chunks[-1].last:
        return None
    shards = [torch.empty_like(hidden) for _ in range(options.tp)]
    torch.distributed.all_gather(shards, hidden.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    first_of_all = parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_data_parallel_rank() == 0
    return torch.cat(shards, dim=-1) if first_of_all else None


def content_metadata(layers: str) -> dict[str, Any]:
    """What Megatron-LM's training records about a checkpoint's content; `layers` is --layers.

    stacked: one tensor with a leading layer axis (training's way); apart: `decoder.layers.N.`; singleton: apart, and
    the two halves of linear_fc1 under `..._w` and `..._v`.
    """
    metadata: dict[str, Any] = {
        "distrib_optim_sharding_type": "dp_reshardable",
        "singleton_local_shards": layers == "singleton",
        "chained_optim_avoid_prefix": True,
    }
    return metadata | ({"non_homogeneous_layers": True} if layers == "apart" else {})


def model_key(options: Namespace, virtual: int) -> str:
    return f"model{virtual}" if options.vpp > 1 else "model"


def rank_folder(options: Namespace, tensor_rank: int, stage: int, expert: int = 0) -> str:
    folder = f"mp_rank_{tensor_rank:02d}" + (f"_{stage:03d}" if options.pp > 1 else "")
    return folder + (f"_{expert:03d}" if options.ep > 1 else "")


def cuts() -> tuple[Cut, Cut, Cut]:
    """(rank, size) of this process among the tensor ranks, the expert ranks, and those that cut an expert."""
    from megatron.core import parallel_state as ps

    return (
        (ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()),
        (ps.get_expert_model_parallel_rank(), ps.get_expert_model_parallel_world_size()),
        (ps.get_expert_tensor_parallel_rank(), ps.get_expert_tensor_parallel_world_size()),
    )


def training_args(sizes: Sizes, options: Namespace) -> Namespace:
    """The `args` that Megatron-LM's training leaves, with the kinds of values that are not plain."""
    from megatron.core.transformer.enums import AttnBackend

    return Namespace(
        num_layers=sizes.layers,
        encoder_num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        ffn_hidden_size=sizes.ffn,
        num_attention_heads=sizes.heads,
        num_query_groups=sizes.kv_heads,
        group_query_attention=sizes.kv_heads != sizes.heads,
        kv_channels=sizes.head_dim,
        seq_length=sizes.max_positions,
        max_position_embeddings=sizes.max_positions,
        position_embedding_type="rope",
        add_position_embedding=True,
        use_rotary_position_embeddings=True,
        rotary_base=int(sizes.theta),
        rotary_percent=sizes.rotary_percent,
        rotary_interleaved=False,
        rotary_seq_len_interpolation_factor=None if sizes.rope_factor is None else int(sizes.rope_factor),
        use_rope_scaling=False,
        add_bias_linear=False,
        add_qkv_bias=sizes.qkv_bias,
        qk_layernorm=sizes.qk_norm,
        multi_latent_attention=False,
        swiglu=True,
        squared_relu=False,
        untie_embeddings_and_output_weights=not sizes.tied,
        normalization="RMSNorm",
        norm_epsilon=sizes.epsilon,
        layernorm_epsilon=sizes.epsilon,
        apply_layernorm_1p=False,
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        window_size=None if sizes.window is None else (sizes.window - 1, 0),
        make_vocab_size_divisible_by=options.divisible_by,
        padded_vocab_size=sizes.padded_vocab(options.divisible_by, options.tp),
        tokenizer_type="HuggingFaceTokenizer",
        vocab_size=None,
        tensor_model_parallel_size=options.tp,
        pipeline_model_parallel_size=options.pp,
        virtual_pipeline_model_parallel_size=options.vpp if options.vpp > 1 else None,
        world_size=world_of(options),
        **expert_args(sizes, options),
        data_parallel_size=1,
        params_dtype=sizes.dtype,
        bf16=sizes.dtype == torch.bfloat16,
        fp16=False,
        attention_backend=AttnBackend.auto,
        transformer_impl="local",
        ckpt_format=options.format,
        no_save_optim=not options.training_state,
        no_save_rng=not options.training_state,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        wandb_api_key="do-not-copy-me",
        **options.stages,
    )


def expert_args(sizes: Sizes, options: Namespace) -> dict[str, Any]:
    if sizes.experts is None:
        return {"expert_model_parallel_size": 1, "num_experts": None}
    return sizes.experts.args() | {
        "expert_model_parallel_size": options.ep,
        "expert_tensor_parallel_size": options.etp or options.tp,
        "moe_grouped_gemm": options.experts != "each",
        "moe_use_legacy_grouped_gemm": options.experts == "legacy",
    }


def add_training_state(state: dict[str, Any], chunks: list[Chunk], metadata: dict[str, Any]) -> None:
    """Optimizer moments and random states, as sharded entries under the keys that Megatron-LM's training uses."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    moments: dict[str, Any] = {}
    for chunk in chunks:
        sharded = chunk.model.sharded_state_dict(metadata=metadata)
        for name, parameter in chunk.model.named_parameters():
            for kind in ("exp_avg", "exp_avg_sq", "fp32_param"):
                moments[f"{chunk.virtual}.{kind}.{name}"] = make_sharded_optimizer_tensor(
                    sharded[name], torch.full_like(parameter, 7.0, dtype=torch.float32), f"optimizer.state.{kind}"
                )
    state["optimizer"] = {"param_state": moments, "param_groups": [{"lr": 1e-4, "step": 3}]}
    stage, tensor_rank = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    rng = [{"random_rng_state": (3, (1, 2), None), "torch_rng_state": torch.get_rng_state(), "rng_tracker_states": {}}]
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    state["rng_state"] = ShardedObject("rng_state", rng, shape, (stage, tensor_rank), replica_id=0)
    state["opt_param_scheduler"] = {"max_lr": 1e-4, "num_steps": 3}


# --- actions ---------------------------------------------------------------------------------------------------------


def checkpoint_folder(root: Path) -> Path:
    """ROOT's current checkpoint, or ROOT itself when it holds no tracker."""
    tracker = root / "latest_checkpointed_iteration.txt"
    if not tracker.exists():
        return root
    name = tracker.read_text().strip()
    return root / (name if name == "release" else f"iter_{int(name):07d}")


def save(sizes: Sizes, options: Namespace) -> None:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    padded = sizes.padded_vocab(options.divisible_by, options.tp)
    hf = random_hf(sizes, options.seed, padded)
    chunks = build_chunks(sizes, options)
    tensor_rank, stage = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    ours = rank_tensors(hf, sizes, *cuts())
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in weights_of(chunk):
                fill(parameter, name, ours, chunk.offset)

    folder = options.out / f"iter_{options.iteration:07d}"
    rank = torch.distributed.get_rank()
    if rank == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    args = training_args(sizes, options)
    state: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": options.iteration}
    if options.format == "torch_dist":
        metadata = content_metadata(options.layers)
        for chunk in chunks:
            state[model_key(options, chunk.virtual)] = chunk.model.sharded_state_dict(metadata=metadata)
        if options.training_state:
            add_training_state(state, chunks, metadata)
        if options.common == "inside":
            common = {key: state[key] for key in ("args", "checkpoint_version", "iteration")}
            common["content_metadata"] = content_metadata(options.layers)
            state["common_state"] = ShardedObject("common_state", common, (1,), (0,), replica_id=rank)
        dist_checkpointing.save(state, str(folder), content_metadata=metadata)
        torch.distributed.barrier()
        if options.common == "inside" and rank == 0:
            (folder / "common.pt").unlink()
    else:
        for chunk in chunks:
            model = chunk.model.state_dict_for_save_checkpoint()
            # a stand-in for TEGroupedMLP, which a CPU cannot build
            state[model_key(options, chunk.virtual)] = {
                core_experts.spelled(name, options.experts): value for name, value in model.items()
            }
        if options.training_state:
            state["optimizer"] = {"state": {"exp_avg": torch.full((64,), 7.0)}}
            state["rng_state"] = [{"torch_rng_state": torch.get_rng_state()}]
        path = folder / rank_folder(options, tensor_rank, stage, cuts()[1][0]) / "model_optim_rng.pt"
        if 0 in (parallel_state.get_data_parallel_rank(), parallel_state.get_expert_data_parallel_rank()):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, path)
    torch.distributed.barrier()
    if rank == 0:
        (options.out / "latest_checkpointed_iteration.txt").write_text(str(options.iteration))
        tables = ("model.embed_tokens.weight", "lm_head.weight")
        expected = {n: t[: sizes.vocab].clone() if n in tables else t for n, t in hf.items()}
        save_file(expected, options.out / "expected.safetensors", {"format": "pt"})
        save_file({n: hf[n] for n in tables if n in hf}, options.out / "padded.safetensors", {"format": "pt"})
        (options.out / "config.json").write_text(options.hf_config.read_text())


def weights_of(chunk: Chunk) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the one buffer that is trained."""
    yield from chunk.model.named_parameters()
    yield from ((name, buffer) for name, buffer in chunk.model.named_buffers() if name.endswith(".expert_bias"))


def fill(parameter: Tensor, name: str, ours: Tensors, offset: int) -> None:
    whole = to_global(name, offset)
    if whole in ours:
        parameter.copy_(ours[whole])
        return
    # GroupedMLP: all experts of the rank in one, each transposed, one behind the other in memory
    prefix, _, number = whole.rpartition("weight")
    each = [
        ours[f"{prefix}local_experts.{expert}.linear_fc{number}.weight"].T
        for expert in range(sum(key.startswith(f"{prefix}local_experts.") for key in ours) // 2)
    ]
    parameter.view(len(each), *each[0].shape).copy_(torch.stack(each))


def to_global(name: str, offset: int) -> str:
    """A chunk's parameter name with its layer number made global."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + offset)
    return ".".join(parts)


def choose_norms(model: dict[str, Any], norms: str) -> dict[str, Any]:
    """A legacy model dict with one of its two norm spellings dropped; the rest named as the local layer spec reads it.

    Transformer Engine's layers cannot run here, so its spelling is read through the local names, one for one.
    """
    if norms == "both":
        return dict(model)
    drop, keep = (1, 0) if norms == "local" else (0, 1)
    chosen = {}
    for name, value in model.items():
        if any(name.endswith(pair[drop]) for pair in NORM_SPELLINGS):
            continue
        for pair in NORM_SPELLINGS:
            if name.endswith(pair[keep]):
                name = name.removesuffix(pair[keep]) + pair[0]
        chosen[name] = value
    return chosen


def load(sizes: Sizes, options: Namespace) -> None:
    from megatron.core import dist_checkpointing, parallel_state

    chunks = build_chunks(sizes, options)
    with torch.no_grad():
        for chunk in chunks:
            for _, parameter in weights_of(chunk):
                parameter.fill_(float("nan"))
    folder = checkpoint_folder(options.checkpoint)
    missing: list[str] = []
    unexpected: list[str] = []
    if options.format == "torch_dist":
        common = dist_checkpointing.load_common_state_dict(str(folder))
        metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
        request = {model_key(options, c.virtual): c.model.sharded_state_dict(metadata=metadata) for c in chunks}
        state: Any = dist_checkpointing.load(request, str(folder))
        for chunk in chunks:
            chunk.model.load_state_dict(state[model_key(options, chunk.virtual)], strict=True)
    else:
        name = rank_folder(
            options,
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
            cuts()[1][0],
        )
        state = torch.load(folder / name / "model_optim_rng.pt", map_location="cpu", weights_only=False)
        for chunk in chunks:
            model = choose_norms(state[model_key(options, chunk.virtual)], options.norms)
            model = {core_experts.spelled(name, "each"): value for name, value in model.items()}
            result = chunk.model.load_state_dict(model, strict=options.norms != "both")
            missing += result.missing_keys
            unexpected += result.unexpected_keys

    report: dict[str, Any] = {
        "parameters": 0,
        "nan": [],
        "dtypes": set(),
        "buffers": set(),
        "missing": missing,
        "unexpected": unexpected,
    }
    for chunk in chunks:
        for name, parameter in weights_of(chunk):
            report["parameters"] += 1
            report["dtypes" if isinstance(parameter, torch.nn.Parameter) else "buffers"].add(str(parameter.dtype))
            if name in (EMBEDDING, HEAD):
                # the run pads for its own TP: rows behind the checkpoint's are not the checkpoint's to fill
                start = parallel_state.get_tensor_model_parallel_rank() * parameter.shape[0]
                parameter = parameter[: max(0, sizes.vocab - start)]
            if parameter.isnan().any():
                report["nan"].append(to_global(name, chunk.offset))
    reports: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reports, report)
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, sizes.vocab, (2, 16), generator=generator)
    # a second model in float32: bfloat16 arithmetic would hide what the logits are to show
    window = getattr(state["args"], "window_size", None)
    exact = build_chunks(replace(sizes, dtype=torch.float32), options, window and tuple(window))
    for chunk, loaded in zip(exact, chunks, strict=True):
        chunk.model.load_state_dict(loaded.model.state_dict())
    logits = forward(exact, tokens, options)
    if logits is not None:
        merged = {
            "logits": logits[..., : sizes.vocab].float().clone(),
            "tokens": tokens,
            "parameters": sum(r["parameters"] for r in reports),
            "args": {
                k: v if isinstance(v, (str, int, float, bool)) else repr(v) for k, v in vars(state["args"]).items()
            },
            "checkpoint_version": state["checkpoint_version"],
            "iteration": state["iteration"],
            **{
                key: sorted({n for r in reports for n in r[key]})
                for key in ("nan", "dtypes", "buffers", "missing", "unexpected")
            },
        }
        torch.save(merged, options.out)


# --- processes -------------------------------------------------------------------------------------------------------


def run_rank(options: Namespace, rank: int, store: str) -> None:
    """One job on one of its ranks."""
    world = world_of(options)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=90)
    )
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=options.tp,
        pipeline_model_parallel_size=options.pp,
        virtual_pipeline_model_parallel_size=options.vpp if options.vpp > 1 else None,
        expert_model_parallel_size=options.ep,
        expert_tensor_parallel_size=options.etp or options.tp,
    )
    sizes = Sizes.from_hf(options.hf_config)
    {"save": save, "load": load}[options.action](sizes, options)
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def run_jobs(jobs: list[list[str]], errors: Path, rank: int, store: str) -> None:
    """Rank `rank`'s part of every job that has such a rank."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    cpu_shims()
    core_experts.grouped_gemm()
    for number, arguments in enumerate(jobs):
        options = parse(arguments)
        if rank >= world_of(options):
            continue
        try:
            run_rank(options, rank, f"{store}-{number}")
        except BaseException:
            with open(errors / f"ERROR-{number}.txt", "a") as file:
                file.write(f"rank {rank}: {' '.join(arguments)}\n{traceback.format_exc()}\n")
            if torch.distributed.is_initialized():
                from megatron.core import parallel_state

                parallel_state.destroy_model_parallel()
                torch.distributed.destroy_process_group()


def launch(arguments: list[str], world: int, timeout: float = 600.0) -> int:
    """Starts one process per rank and waits; the first failure ends the others. Returns the exit code."""
    with tempfile.TemporaryDirectory() as scratch:
        store = os.path.join(scratch, "store")
        processes = [
            subprocess.Popen([sys.executable, __file__, *arguments, "--rank", str(rank), "--store", store])
            for rank in range(world)
        ]
        deadline = time.monotonic() + timeout
        try:
            while any(p.poll() is None for p in processes):
                if any(p.poll() not in (None, 0) for p in processes) or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
    return max((abs(p.returncode) for p in processes), default=0)


def parse(arguments: list[str]) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("save", "load", "run"))
    parser.add_argument("jobs", type=Path, nargs="?", help="run: the file of jobs")
    parser.add_argument("--hf-config", type=Path, help="HF config.json that gives the sizes")
    parser.add_argument("--checkpoint", type=Path, help="load: checkpoint root, or one iteration's folder")
    parser.add_argument("--out", type=Path, help="save: checkpoint root; load: result file")
    parser.add_argument("--format", choices=("torch_dist", "torch"), default="torch_dist")
    parser.add_argument("--norms", choices=("local", "te", "both"), default="local", help="load --format torch only")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--vpp", type=int, default=1, help="model chunks per rank")
    parser.add_argument("--ep", type=int, default=1, help="expert ranks")
    parser.add_argument("--etp", type=int, help="ranks that cut an expert; default: --tp")
    parser.add_argument(
        "--experts", choices=("each", "grouped", "legacy"), default="each",
        help="save: modules of their own, the names of TEGroupedMLP (--format torch), or GroupedMLP's class",
    )  # fmt: skip
    parser.add_argument("--stages", type=json.loads, default={}, help="save: args of uneven pipeline stages, as JSON")
    parser.add_argument("--divisible-by", type=int, default=128, help="make_vocab_size_divisible_by of the run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--iteration", type=int, default=5)
    parser.add_argument("--training-state", action="store_true", help="save: with optimizer and random state")
    parser.add_argument(
        "--layers", choices=("stacked", "apart", "singleton"), default="stacked", help="save --format torch_dist only"
    )
    parser.add_argument(
        "--common",
        choices=("file", "inside"),
        default="file",
        help="save: common.pt, or the entry common_state/shard_0_1",
    )
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--errors", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    jobs = json.loads(options.jobs.read_text()) if options.action == "run" else [arguments]
    with tempfile.TemporaryDirectory() as scratch:
        errors = options.jobs.parent if options.action == "run" else Path(scratch)
        if options.rank is None:
            parsed = [parse(job) for job in jobs]
            code = launch([*arguments, "--errors", str(errors)], max(map(world_of, parsed)))
            if options.action != "run":
                for path in errors.glob("ERROR-*.txt"):
                    sys.stderr.write(path.read_text())
                    code = 1
            return code
    run_jobs(jobs, options.errors, options.rank, options.store)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
