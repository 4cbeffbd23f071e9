"""Checkpoints as Megatron-Bridge leaves them, made of an import: no args, run_config.yaml, a number as iteration."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import dist_files
import tiny_models as tm
import torch
import yaml
from golden_core import read_torch_dist


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


def whole_gemma(text: Path, root: Path) -> Path:
    """A Gemma 3 with vision around the text model that Bridge left in `text`, as its own import of one writes it."""
    shutil.copytree(text, root)
    folder = root / "iter_0000000"
    (folder / "__0_0.distcp").unlink()
    tensors = {f"language_model.{name}": tensor for name, tensor in read_torch_dist(text)[0].items()}
    tensors["vision_tower.post_layernorm.weight"] = torch.ones(8)
    tensors["multi_modal_projector.proj.weight"] = torch.ones(16, 8)
    dist_files.write(folder, {name: dist_files.whole(tensor) for name, tensor in tensors.items()})
    content = yaml.safe_load((folder / "run_config.yaml").read_text())
    content["model"] |= {
        "_target_": "megatron.bridge.models.gemma_vl.gemma3_vl_provider.Gemma3VLModelProvider",
        "is_vision_language": True,
        "image_token_id": 63,
        "mm_tokens_per_image": 4,
        "vision_projector_config": {"_target_": "megatron.bridge.x.Projector", "hidden_size": 16, "num_layers": 1},
    }
    (folder / "run_config.yaml").write_text(yaml.safe_dump(content))
    return root
