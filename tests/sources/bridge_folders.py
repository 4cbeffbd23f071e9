"""Checkpoints as Megatron-Bridge leaves them, made of an import: no args, run_config.yaml, a number as iteration."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import tiny_models as tm
import torch
import yaml


def model_section(model: tm.Tiny, **changes: Any) -> dict[str, Any]:
    """The section `model` of a run_config.yaml, flat."""
    return {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"},
        "attention_backend": {
            "_args_": [5], "_call_": True, "_name_": "auto", "_target_": "megatron.core.transformer.enums.AttnBackend",
        },
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "ffn_hidden_size": model.ffn,
        "gated_linear_unit": True,
        "hidden_size": model.hidden,
        "kv_channels": model.head_dim,
        "layernorm_epsilon": model.eps,
        "make_vocab_size_divisible_by": 128,
        "normalization": "RMSNorm",
        "num_attention_heads": model.heads,
        "num_layers": model.layers,
        "num_moe_experts": None,
        "num_query_groups": model.groups,
        "params_dtype": {"_call_": False, "_target_": "torch.bfloat16"},
        "position_embedding_type": "rope",
        "rotary_base": model.theta,
        "seq_length": model.max_positions,
        "share_embeddings_and_output_weights": False,
        "should_pad_vocab": True,
        "tensor_model_parallel_size": 1,
        "vocab_size": model.vocab,
    } | changes  # fmt: skip


OUTER = ("vocab_size", "should_pad_vocab", "make_vocab_size_divisible_by", "share_embeddings_and_output_weights",
         "rotary_base", "seq_length", "position_embedding_type")  # fmt: skip


def nested(section: dict[str, Any]) -> dict[str, Any]:
    """`section` as newer releases write it: the transformer's own fields one level down."""
    outer = {key: value for key, value in section.items() if key in OUTER}
    inner = {key: value for key, value in section.items() if key not in OUTER}
    return {"_target_": "megatron.bridge.models.gpt.GPTModelConfig", **outer, "transformer": inner}


def as_bridge(imported: Path, root: Path, section: dict[str, Any], iteration: int = 0) -> Path:
    """A copy of a torch_dist import at `root` in which Megatron-Bridge's files stand for our own."""
    folder = root / f"iter_{iteration:07d}"
    shutil.copytree(imported / "release", folder)
    common = {"checkpoint_version": 3.0, "iteration": iteration, "content_metadata": {"singleton_local_shards": False}}
    torch.save(common, folder / "common.pt")
    text = yaml.safe_dump({"model": section, "tokenizer": {"tokenizer_type": "HuggingFaceTokenizer"}, "peft": None})
    (folder / "run_config.yaml").write_text(text + "x: !!python/object:a.b {c: 1}\ny: !!set {}\n")
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return root
