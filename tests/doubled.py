"""Float64 everywhere: code that asks for float32 gets float64, so that two systems are compared beyond rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

WIDE = torch.float64


@contextlib.contextmanager
def doubled() -> Iterator[None]:
    """As long as it lasts, torch.float32 and Tensor.float are float64."""
    names: Any = torch
    float32, single, cast, default = torch.float32, torch.float, torch.Tensor.float, torch.get_default_dtype()
    torch.set_default_dtype(WIDE)
    names.float32 = names.float = WIDE
    names.Tensor.float = lambda self, *args, **kwargs: self.to(WIDE)
    try:
        yield
    finally:
        names.float32, names.float, names.Tensor.float = float32, single, cast
        torch.set_default_dtype(default)


def widen(model: Any) -> Any:
    """A model's parameters, buffers, and angles of rotary embeddings, which some keep as plain attributes."""
    model = model.to(WIDE)
    for module in model.modules():
        if isinstance(getattr(module, "inv_freq", None), torch.Tensor):
            module.inv_freq = module.inv_freq.to(WIDE)
    return model


def transformers_logits(folder: Any, tokens: list[int]) -> torch.Tensor:
    """(length, vocabulary) in float64, by transformers' own code."""
    from transformers import AutoModelForCausalLM

    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=WIDE, **plain)
    with torch.no_grad(), doubled():  # angles of rotary embeddings are computed as a model is made
        model = AutoModelForCausalLM.from_config(loaded.config, **plain)
        model.load_state_dict(loaded.state_dict())
        return widen(model).eval()(torch.tensor([tokens])).logits[0]
