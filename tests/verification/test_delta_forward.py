"""Layers of gated delta and gated attention in verify's forward pass, against transformers; mistakes that it sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import delta_models
import pytest
import torch
from conftest import run
from delta_models import DELTAS, Delta
from safetensors.torch import load_file, save_file
from torch import Tensor

from weights_conversion.configs import hf_config
from weights_conversion.mapping.dialects import MEGATRON_CORE
from weights_conversion.verification.conventions import HF
from weights_conversion.verification.forward import trace
from weights_conversion.verification.whole import huggingface_weights

SHARED = Path(__file__).parents[3] / "shared" / "golden"
CASES = {"qwen3-next": SHARED / "core-qwen3-next", "qwen3.5": SHARED / "core-qwen35"}


def stages(family: str, folder: Path, ids: Tensor, *, predicts: int = 0) -> dict[str, Tensor]:
    raw = json.loads((folder / "config.json").read_text())
    config = hf_config.read_config(family, raw, MEGATRON_CORE, "config.json")
    config = type(config)(**{**vars(config), "mtp_num_layers": predicts})
    return {name: found for name, _, found in trace(config, HF, huggingface_weights(folder), ids)}


@pytest.mark.parametrize("family", CASES)
def test_stored_logits(family: str) -> None:
    """Those of transformers, and of a prediction layer made of its modules; float32 leaves a few of 1e-6 x spread."""
    case = CASES[family]
    if not (case / "case.json").is_file():
        pytest.skip("the golden cases are not beside this clone")
    ids = torch.tensor([json.loads((case / "ids.json").read_text())])
    found = stages(family, case / "hf", ids, predicts=1)
    wanted = load_file(case / "logits.safetensors")["logits"]
    assert (found["logits"][0] - wanted).abs().max() < 5e-5  # two orders of sums at a spread of 7
    ahead = load_file(case / "mtp.safetensors")
    (ahead,) = ahead.values()
    head = huggingface_weights(case / "hf")("lm_head.weight", None).float()
    assert ((found["prediction"][0] @ head.t())[: len(ahead)] - ahead).abs().max() < 5e-5


@pytest.mark.parametrize("name", ["next", "next-uneven", "3.5", "3.5-tied", "3.5-moe", "3.6", "3.5-alone"])
def test_logits_of_transformers_in_float64(name: str, tmp_path: Path) -> None:
    """Its own code in float64 is the true value; the forward pass is as near to it as that code is in float32.

    How near that is depends on the processor, whose kernels sum in their own order: on one it was within 1e-5 of the
    spread for all, on another 1.08e-5 here and 1.03e-5 there.
    """
    from transformers import AutoModelForCausalLM

    model = DELTAS[name]
    folder = delta_models.write(tmp_path / "hf", model)
    ids = torch.arange(20)[None] * 3 % model.vocab
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    theirs = {}
    for dtype in (torch.float64, torch.float32):
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **plain).eval()
        with torch.no_grad():
            theirs[dtype] = reference(ids).logits[0].double()
    wanted = theirs[torch.float64]
    near = max((theirs[torch.float32] - wanted).abs().max(), 5e-6 * wanted.std())
    assert (stages(model.family, folder, ids)["logits"][0] - wanted).abs().max() < 2 * near


def swapped(names: tuple[str, str], rows: Callable[[Delta], tuple[slice, slice]] | None = None):
    """Exchanges two tensors of the first layer, or rows of one."""

    def mutate(model: Delta, tensors: dict[str, Tensor]) -> None:
        one, other = (next(key for key in tensors if key.endswith(name)) for name in names)
        if rows is None:
            tensors[one], tensors[other] = tensors[other], tensors[one]
            return
        here, there = rows(model)
        changed = tensors[one].clone()
        changed[here], changed[there] = tensors[one][there], tensors[one][here]
        tensors[one] = changed

    return mutate


def gates(model: Delta) -> tuple[slice, slice]:
    return slice(0, model.head_dim), slice(model.head_dim, 2 * model.head_dim)


MUTATIONS = {
    "b and a exchanged": swapped(("in_proj_b.weight", "in_proj_a.weight")),
    "z and v exchanged": lambda model, tensors: _values_and_gates(model, tensors),
    "gate and query exchanged": swapped(("self_attn.q_proj.weight",) * 2, gates),
    "the norm less one": lambda model, tensors: _shifted(tensors, "linear_attn.norm.weight"),
    "another norm less one": lambda model, tensors: _shifted(tensors, "input_layernorm.weight"),
    "heads of q exchanged": swapped(
        ("in_proj_qkv.weight",) * 2, lambda m: (slice(0, m.key_dim), slice(m.key_dim, 2 * m.key_dim))
    ),
}


def _values_and_gates(model: Delta, tensors: dict[str, Tensor]) -> None:
    qkv, z = (next(key for key in tensors if key.endswith(name)) for name in ("in_proj_qkv.weight", "in_proj_z.weight"))
    keys = 2 * model.key_heads * model.key_dim
    tensors[qkv], tensors[z] = torch.cat([tensors[qkv][:keys], tensors[z]]), tensors[qkv][keys:].clone()


def _shifted(tensors: dict[str, Tensor], end: str) -> None:
    name = next(key for key in tensors if key.endswith(end))
    tensors[name] = (tensors[name].float() - 1).to(tensors[name].dtype)


@pytest.mark.parametrize("what", MUTATIONS)
def test_mistakes_move_the_logits(what: str, tmp_path: Path) -> None:
    """A file with one mistake gives other logits than the one without: none hides in the forward pass."""
    model = DELTAS["3.5"]
    folder = delta_models.write(tmp_path / "hf", model)
    ids = torch.arange(20)[None] * 3 % model.vocab
    right = stages(model.family, folder, ids)["logits"]
    tensors = model.tensors()
    MUTATIONS[what](model, tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert (stages(model.family, folder, ids)["logits"] - right).abs().max() > 1e-2 * right.std()


@pytest.mark.parametrize("what", [*MUTATIONS, "ranks joined end to end"])
def test_verify_sees_mistakes(what: str, to_megatron, tmp_path: Path) -> None:
    """A checkpoint whose source is another by one mistake is different, in its weights and in its forward pass."""
    model = DELTAS["3.5"]
    source = delta_models.write(tmp_path / "hf", model)
    ranks = ["--ckpt-format", "torch", "--tensor-model-parallel-size", "2"]
    to_megatron(model.family, "--model-path", source, "--out", tmp_path / "mt", *ranks).succeeded()
    run("weights_conversion.verify", source, tmp_path / "mt").succeeded()
    tensors = model.tensors()
    if what == "ranks joined end to end":
        name = next(key for key in tensors if key.endswith("in_proj_qkv.weight"))
        keys = model.key_heads * model.key_dim
        q, k, v = tensors[name].split([keys, keys, tensors[name].shape[0] - 2 * keys])
        halves = [part.chunk(2)[rank] for rank in range(2) for part in (q, k, v)]
        tensors[name] = torch.cat(halves)
    else:
        MUTATIONS[what](model, tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    found = run("weights_conversion.verify", source, tmp_path / "mt")
    assert found.code == 1
    assert "DIFFERENT" in found.text
