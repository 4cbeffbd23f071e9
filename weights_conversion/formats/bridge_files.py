"""What Megatron-Bridge keeps beside the items of a checkpoint: run_config.yaml, train_state.pt, its trackers.

run_config.yaml states what a model needs to be built again; every field of Bridge's that is not there has its default
(megatron/bridge/training/config.py and training/checkpointing.py of Megatron-Bridge 0.6).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from weights_conversion.config import ModelConfig
from weights_conversion.formats import bridge_model
from weights_conversion.formats.run_config import RUN_CONFIG

FOLDER = "iter_0000000"
TRACKER_TEXT = b"0"
_TRAIN_STATE = "train_state.pt"
_LATEST = f"latest_{_TRAIN_STATE}"


def files(
    config: ModelConfig, args: Mapping[str, Any], vocabulary: int, dtype: torch.dtype, divisible_by: int
) -> dict[str, bytes]:
    """The small files, below the checkpoint's root. `args` are Megatron-LM's, `vocabulary` counts the rows."""
    state = _train_state()
    content = {
        "_target_": "megatron.bridge.training.config.ConfigContainer",
        "checkpoint": {
            "_target_": "megatron.bridge.training.config.CheckpointConfig",
            "ckpt_format": "torch_dist",
            "fully_parallel_save": True,
            "save_optim": False,
            "save_rng": False,
        },
        "model": bridge_model.section(config, args, vocabulary, dtype, divisible_by),
        "peft": None,
        "tokenizer": None,
        "train": None,
    }
    text = "".join(f"{line}\n" for line in _yaml(content)).encode()
    return {f"{FOLDER}/{RUN_CONFIG}": text, f"{FOLDER}/{_TRAIN_STATE}": state, _LATEST: state}


def _train_state() -> bytes:
    """The state of a training that has not begun."""
    state: dict[str, torch.Tensor] = {
        name: torch.tensor(0)
        for name in ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    }
    state["floating_point_operations_so_far"] = torch.tensor(0.0)
    state |= {name: torch.tensor(False) for name in ("do_train", "do_valid", "do_test")}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _yaml(content: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Lines of YAML 1.1, which reads 1e-06 as text and 1.0e-06 as a number."""
    for key in sorted(content):
        value = content[key]
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from _yaml(value, indent + "  ")
        elif isinstance(value, list):
            yield f"{indent}{key}: [{', '.join(map(_scalar, value))}]"
        else:
            yield f"{indent}{key}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value) if isinstance(value, float) else str(value)
    mantissa, mark, exponent = text.partition("e")
    return f"{mantissa}.0{mark}{exponent}" if isinstance(value, float) and mark and "." not in mantissa else text
