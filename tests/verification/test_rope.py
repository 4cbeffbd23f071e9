"""The forward pass's own rotary frequencies against transformers' functions, over many random parameters."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from weights_conversion.errors import ConversionError
from weights_conversion.verification.rope import frequencies

CASES = 150
TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5


def theirs(kind: str, dim: int, theta: float, given: dict[str, Any]) -> tuple[Tensor, float]:
    """What transformers computes for a Llama with these parameters, in the spelling of its release."""
    sizes = {"hidden_size": 4 * dim, "num_attention_heads": 4, "head_dim": dim, "max_position_embeddings": 1 << 20}
    if TRANSFORMERS_5:
        config = transformers.LlamaConfig(**sizes, rope_parameters={"rope_type": kind, "rope_theta": theta, **given})
    else:
        scaling = {"rope_type": kind, **given} if kind != "default" else None
        config = transformers.LlamaConfig(**sizes, rope_theta=theta, rope_scaling=scaling)
    if kind == "default":
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        return rotary.inv_freq, rotary.attention_scaling
    found, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return found, scaling


def parameters(kind: str, draw: random.Random) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if kind != "default":
        given["factor"] = draw.choice([1.0, 2.0, 4.0, 8.0, 32.0, 40.0, draw.uniform(1, 64)])
    if kind in ("llama3", "yarn"):
        given["original_max_position_embeddings"] = draw.choice([16, 256, 4096, 8192, 32768, 131072])
    if kind == "llama3":
        given["low_freq_factor"] = draw.choice([1.0, draw.uniform(0.5, 2)])
        given["high_freq_factor"] = given["low_freq_factor"] * draw.choice([4.0, draw.uniform(1.5, 8)])
    if kind == "yarn":
        optional = {
            "attention_factor": draw.uniform(0.5, 2),
            "beta_fast": draw.choice([32.0, draw.uniform(8, 64)]),
            "beta_slow": draw.choice([1.0, draw.uniform(0.5, 4)]),
            "truncate": draw.random() < 0.5,
        }
        given |= {name: value for name, value in optional.items() if draw.random() < 0.5}
        if draw.random() < 0.5:
            given |= {"mscale": draw.uniform(0.5, 1.5), "mscale_all_dim": draw.choice([0.0, draw.uniform(0.5, 1.5)])}
    return given


def within_one_step(found: Tensor, wanted: Tensor) -> bool:
    """Whether two positive float32 tensors are neighbours or equal, value by value."""
    return bool(((found.view(torch.int32) - wanted.view(torch.int32)).abs() <= 1).all())


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_frequencies_are_those_of_transformers(kind: str) -> None:
    draw = random.Random(kind)
    for _ in range(CASES):
        dim = draw.choice([4, 8, 16, 24, 64, 80, 96, 128, 256])
        theta = draw.choice([1e4, 1e5, 5e5, 1e6, draw.uniform(500, 2e7)])
        given = parameters(kind, draw)
        wanted, wanted_scaling = theirs(kind, dim, theta, given)
        found, scaling = frequencies(kind, dim=dim, theta=theta, **given)
        assert found.dtype == torch.float32
        assert found.shape == (dim // 2,)
        assert within_one_step(found, wanted), (dim, theta, given)
        assert scaling == pytest.approx(wanted_scaling, rel=1e-12), given


DECIDES = {  # a change of each parameter must show in the numbers
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 32.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 4096,
    },
    "yarn": {
        "factor": 8.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 1.5,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "truncate": False,
    },
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in DECIDES.items() for name in names])
def test_every_parameter_decides(kind: str, name: str) -> None:
    whole = {"factor": 4.0, "original_max_position_embeddings": 8192, "mscale": 1.0, "mscale_all_dim": 1.2}
    right, right_scaling = frequencies(kind, dim=64, theta=5e5, **whole)
    wrong, wrong_scaling = frequencies(kind, dim=64, theta=5e5, **{**whole, name: DECIDES[kind][name]})
    assert not torch.equal(right, wrong) or right_scaling != wrong_scaling


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConversionError, match="knows the rope kinds default, linear, llama3, yarn, not 'longrope'"):
        frequencies("longrope", dim=8, theta=1e4)


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_the_first_context_length_must_be_stated(kind: str) -> None:
    with pytest.raises(ConversionError, match=f"kind {kind} needs original_max_position_embeddings"):
        frequencies(kind, dim=8, theta=1e4, factor=2.0)
