"""The forward pass of hybrids against transformers' logits, and mistakes in their parts, each of which verify sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import hybrid_models as hm
import pytest
import torch
from conftest import REPOSITORY, Script, run
from safetensors.torch import load_file, save_file
from torch import Tensor

from weights_conversion.configs import hf_config
from weights_conversion.mapping.dialects import MEGATRON_CORE
from weights_conversion.verification.conventions import HF
from weights_conversion.verification.forward import trace
from weights_conversion.verification.whole import huggingface_weights

GOLDEN = REPOSITORY.parent / "shared" / "golden" / "core-nemotron-h"
IDS = torch.arange(1, 41)[None]


def logits(folder: Path, ids: Tensor) -> Tensor:
    raw = json.loads((folder / "config.json").read_text())
    config = hf_config.read_config("nemotron-h", raw, MEGATRON_CORE, "config.json")
    *_, (stage, _, found) = trace(config, HF, huggingface_weights(folder), ids)
    assert stage == "logits"
    return found[0]


@pytest.mark.parametrize(
    "changes",
    [{}, hm.EXPERTS, hm.LATENT, {"hybrid_override_pattern": "MM*"}, {"hybrid_override_pattern": "*-"}, {"n_groups": 1}],
    ids=["dense", "experts", "latent experts", "state spaces", "attention", "one group"],
)
def test_logits_are_those_of_transformers(changes: dict, tmp_path: Path) -> None:
    folder = hm.write(tmp_path / "hf", dtype=torch.float32, **changes)
    assert (logits(folder, IDS) - hm.logits(folder, IDS)).abs().max() < 1e-5


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden cases do not lie beside this clone")
def test_golden_logits() -> None:
    ids = torch.tensor(json.loads((GOLDEN / "ids.json").read_text())).view(1, -1)
    assert (logits(GOLDEN / "hf", ids) - load_file(GOLDEN / "logits.safetensors")["logits"]).abs().max() < 1e-5


INNER, STATES = 48, 40  # of hybrid_models.CONFIG
M, E = "backbone.layers.0.mixer.", "backbone.layers.1.mixer."


def moved(name: str, order: list[slice]) -> Callable[[dict[str, Tensor]], None]:
    """Parts of a tensor in another order."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.cat([tensors[name][rows] for rows in order])

    return change


def set_to(name: str, number: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].fill_(number)

    return change


def exchanged(one: str, two: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[one], tensors[two] = tensors[two].clone(), tensors[one].clone()

    return change


def transposed(tensors: dict[str, Tensor]) -> None:
    """Latent projections exchanged, as far as their shapes let them be."""
    one, two = f"{E}fc1_latent_proj.weight", f"{E}fc2_latent_proj.weight"
    tensors[one], tensors[two] = tensors[two].T.contiguous(), tensors[one].T.contiguous()


def shifted(tensors: dict[str, Tensor]) -> None:
    """Each of two state spaces in the place of the other."""
    for name in [name for name in tensors if name.startswith(M)]:
        exchanged(name, name.replace("layers.0.", "layers.4."))(tensors)


B, C = slice(2 * INNER, 2 * INNER + STATES), slice(2 * INNER + STATES, 2 * INNER + 2 * STATES)
Z, X, DT = slice(0, INNER), slice(INNER, 2 * INNER), slice(2 * INNER + 2 * STATES, None)
MUTATIONS: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "B and C exchanged": moved(f"{M}in_proj.weight", [Z, X, C, B, DT]),
    "z and x exchanged": moved(f"{M}in_proj.weight", [X, Z, B, C, DT]),
    "B and C of the convolution exchanged": moved(
        f"{M}conv1d.weight", [Z, slice(INNER + STATES, None), slice(INNER, INNER + STATES)]
    ),
    "bias of the convolution turned": moved(f"{M}conv1d.bias", [slice(1, None), slice(0, 1)]),
    "D dropped": set_to(f"{M}D", 0.0),
    "A_log dropped": set_to(f"{M}A_log", 0.0),
    "dt_bias dropped": set_to(f"{M}dt_bias", 0.0),
    "ranks end to end": moved(
        f"{M}in_proj.weight",
        [slice(a + r * n // 2, a + (r + 1) * n // 2) for r in range(2)
         for a, n in ((0, INNER), (INNER, INNER), (96, STATES), (136, STATES), (176, 8))],
    ),
    "latent projections exchanged": transposed,
    "state spaces exchanged": shifted,
    "experts exchanged": exchanged(f"{E}experts.0.up_proj.weight", f"{E}experts.1.up_proj.weight"),
    "norm of a state space as it was made": set_to(f"{M}norm.weight", 1.0),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hm.write(tmp_path_factory.mktemp("hybrid") / "hf", **hm.LATENT)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_seen(mutation: str, model: Path, tmp_path: Path, to_megatron: Script) -> None:
    """In the weights, and in what the model computes."""
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "config.json").write_bytes((model / "config.json").read_bytes())
    tensors = load_file(model / "model.safetensors")
    MUTATIONS[mutation](tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, wrong / "model.safetensors")
    options = ("--ckpt-format", "torch", "--tensor-model-parallel-size", 2)
    to_megatron("nemotron-h", "--model-path", wrong, "--out", tmp_path / "mt", *options).succeeded()
    found = run("verify", model, tmp_path / "mt")
    assert found.code == 1, found.text
    assert "DIFFERENT" in found.text
    assert (logits(model, IDS) - logits(wrong, IDS)).abs().max() > 1e-3
