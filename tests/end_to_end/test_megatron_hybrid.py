"""Hybrids in the real megatron-core (0.19): its HybridModel loads ours, and we export what it saves, bit for bit.

As test_megatron_core.py says, MEGATRON_CORE_PYTHON may name an interpreter that has it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import hybrid_models as hm
import pytest
import torch
from conftest import run
from doubled import transformers_logits
from safetensors.torch import load_file
from test_megatron_core import PYTHON, TOLERANCE, run_harness, without_megatron_core

HARNESS = Path(__file__).parents[1] / "megatron_hybrid.py"
EXACT = 1e-10  # in float64
TOKENS = [(7 * place + 3) % 96 for place in range(40)]
MODELS: dict[str, dict[str, Any]] = {
    "dense": {}, "experts": hm.EXPERTS, "latent experts": hm.LATENT, "tied": {"tie_word_embeddings": True},
    "one group": {"n_groups": 1, "hybrid_override_pattern": "M*-"},
}  # fmt: skip
FORMS = {
    "torch_dist": (), "0.19": ("--core-release", "0.19"), "rank file": ("--ckpt-format", "torch", "--moe-grouped-gemm"),
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Of each model: its folder, and what all jobs left; megatron-core runs once for all of them."""
    if reason := without_megatron_core():
        pytest.skip(f"megatron-core cannot be imported ({reason})")
    probe = "import triton, megatron.core.models.hybrid.hybrid_model"
    if subprocess.run([PYTHON, "-c", probe], check=False, capture_output=True).returncode:
        pytest.skip("this megatron-core has no HybridModel; MEGATRON_CORE_PYTHON names another")
    base, jobs, found = tmp_path_factory.mktemp("hybrids"), [], {}
    for number, (model, changes) in enumerate(MODELS.items()):
        of = found[model] = {"hf": hm.write(base / f"hf-{number}", **changes)}
        job = {"rows": 96, "tokens": TOKENS}
        for form, options in FORMS.items():
            own = [option for option in options if option != "--moe-grouped-gemm" or "moe_intermediate_size" in changes]
            root, of[form] = base / f"{number}-{form}", base / f"{number}-{form}.pt"
            run("hf_to_megatron", "nemotron-h", "--model-path", of["hf"], "--out", root, *own).succeeded()
            jobs.append({**job, "load": str(root), "out": str(of[form])})
        for kind in ("torch_dist", "torch"):
            of[f"saved {kind}"] = base / f"{number}-saved-{kind}"
            jobs.append({**job, "save": str(of[f"saved {kind}"]), "of": str(base / f"{number}-torch_dist"),
                         "hf": str(of["hf"] / "model.safetensors"), "format": kind})  # fmt: skip
    run_harness(HARNESS, jobs, base)
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS)
def test_ours_loads(model: str, form: str, work: dict[str, dict[str, Path]]) -> None:
    logits = hm.logits(work[model]["hf"], torch.tensor([TOKENS]))
    found = torch.load(work[model][form])
    assert (found["logits"] - logits).abs().max() < TOLERANCE
    assert (found["logits64"] - transformers_logits(work[model]["hf"], TOKENS)).abs().max() < EXACT


@pytest.mark.parametrize("kind", ["torch_dist", "torch"])
@pytest.mark.parametrize("model", MODELS)
def test_theirs_is_exported(model: str, kind: str, work: dict[str, dict[str, Path]], to_hf, tmp_path: Path) -> None:
    of = work[model]
    to_hf("--input_dir", of[f"saved {kind}"], "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
    back, source = load_file(tmp_path / "out" / "model.safetensors"), load_file(of["hf"] / "model.safetensors")
    assert back.keys() == source.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in source.items())
