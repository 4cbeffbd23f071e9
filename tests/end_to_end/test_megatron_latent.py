"""Latent attention and prediction layers in the real megatron-core: it loads ours with the flags that we print, every
parameter, computes transformers' logits, and what it saves is exported bit for bit.

As test_megatron_core.py says, MEGATRON_CORE_PYTHON may name an interpreter with another release: 0.18 and newer join
the down projections too (--mla-down-proj-fusion).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import latent_models as lm
import pytest
import torch
from conftest import run
from safetensors.torch import load_file
from test_megatron_core import TOLERANCE, run_harness, without_megatron_core
from test_megatron_gpt_oss import release, without

HARNESS = Path(__file__).parents[1] / "megatron_latent.py"
TOKENS = [(7 * place + 3) % 96 for place in range(32)]
OLD_YARN = {**lm.YARN, "factor": 16.0, "mscale": 0.707, "mscale_all_dim": 0.707}
V2 = {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": False,
      "rope_scaling": OLD_YARN, "scoring_func": "softmax", "max_position_embeddings": 65536}  # fmt: skip
PLAIN = {"rope_scaling": None, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_theta": 50000.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("deepseek-v3", {"mtp": 1, "rope_scaling": {**OLD_YARN, "mscale": 1.0}, "max_position_embeddings": 65536}),
    "v3, two predicted, all with experts": ("deepseek-v3", {"mtp": 2, "first_k_dense_replace": 0}),
    "v3, tied": ("deepseek-v3", {"first_k_dense_replace": 2, "tie_word_embeddings": True}),
    "moonlight": ("deepseek-v3", PLAIN),
    "v2": ("deepseek-v2", V2),
    "v2 lite": ("deepseek-v2", {**V2, "q_lora_rank": None}),
}
RANKS = ("--ckpt-format", "torch", "--moe-grouped-gemm")
TP = ("--tensor-model-parallel-size", 2, "--expert-tensor-parallel-size", 1)
LAYOUTS: dict[str, tuple[tuple[Any, ...], int, int]] = {
    "torch_dist": ((), 1, 1),
    "torch_dist TP 2": ((), 2, 1),
    "torch_dist EP 2": ((), 1, 2),
    "torch TP 2": ((*RANKS, *TP), 2, 1),
    "torch EP 2": ((*RANKS, "--expert-model-parallel-size", 2), 1, 2),
    "torch TP 2 fused": ((*RANKS, *TP, "--mla-down-proj-fusion"), 2, 1),
    "torch_dist TP 2 fused": (("--mla-down-proj-fusion",), 2, 1),
}
FEW, EVERYWHERE = ("torch_dist", "torch_dist TP 2", "torch TP 2"), ("v3", "v2 lite")
# What happens to a run without a flag: so much other logits, or it stops, since shapes or names are others.
FLAGS: dict[str, float | None] = {
    "--multi-latent-attention": None, "--q-lora-rank": None, "--kv-lora-rank": None, "--qk-head-dim": None,
    "--qk-pos-emb-head-dim": None, "--v-head-dim": None, "--qk-layernorm": 0.01, "--norm-epsilon": 1e-6,
    "--rotary-scaling-factor": 0.01, "--mscale-all-dim": 0.01, "--moe-router-num-groups": None,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model in a layout, and what the run left."""

    hf: Path
    logits: torch.Tensor
    out: Path
    saved: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Case]:
    """All cases, by model and layout, and by a flag that is left out; megatron-core runs once for all."""
    if reason := without_megatron_core():
        pytest.skip(f"megatron-core cannot be imported ({reason})")
    base = tmp_path_factory.mktemp("latent")
    jobs: list[dict[str, Any]] = []
    cases: dict[tuple[str, str], Case] = {}
    for number, (model, (family, changes)) in enumerate(MODELS.items()):
        if release() >= "0.19" and changes.get("q_lora_rank", 1) is None:
            continue  # it asks for a norm that no such model has
        hf = lm.write(base / f"hf-{number}", family, **changes)
        with torch.no_grad():
            logits = lm.load(hf, family)(torch.tensor([TOKENS])).logits[0]
        for place, (layout, (options, tp, ep)) in enumerate(LAYOUTS.items()):
            fused = "fused" in layout
            if fused and (release() < "0.18" or changes.get("q_lora_rank", 1) is None):
                continue
            if model not in EVERYWHERE and layout not in FEW:
                continue
            root = base / f"{number}-{place}"
            result = run("hf_to_megatron", family, "--model-path", hf, "--out", root, *options).succeeded()
            line = next(each for each in result.text.splitlines() if each.startswith("train with"))
            case = cases[model, layout] = Case(hf, logits, Path(f"{root}.pt"), Path(f"{root}-saved"))
            job = {"load": str(root), "flags": shlex.split(line)[2:], "tp": tp, "ep": ep, "rows": 128 * tp,
                   "tokens": TOKENS}  # fmt: skip
            jobs.append({**job, "out": str(case.out), "save": str(case.saved)})
            if (model, layout) == ("v3", "torch_dist"):
                for flag in FLAGS:
                    lacking = cases["v3", flag] = Case(hf, logits, base / f"{flag}.pt", base)
                    flags = without(job["flags"], flag)
                    jobs.append({**job, "flags": flags, "out": str(lacking.out), "may_stop": True})
    run_harness(HARNESS, jobs, base)
    return cases


def case_of(ran: dict[tuple[str, str], Case], model: str, layout: str) -> Case:
    if (model, layout) not in ran:
        pytest.skip(f"nothing of the kind in megatron-core {release()}")
    case = ran[model, layout]
    error = Path(f"{case.out}.error")
    assert not error.exists(), error.read_text()
    return case


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_ours_loads(model: str, layout: str, ran: dict[tuple[str, str], Case]) -> None:
    case = case_of(ran, model, layout)
    found = torch.load(case.out)["logits"][:, : case.logits.shape[1]]
    assert (found - case.logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_theirs_is_exported(
    model: str, layout: str, ran: dict[tuple[str, str], Case], tmp_path: Path, to_hf: Callable[..., Any]
) -> None:
    case, family = case_of(ran, model, layout), MODELS[model][0]
    to_hf("--input_dir", case.saved, "--output_dir", tmp_path / "out", "--no_tokenizer", "--model", family,
          "--true_vocab_size", 128).succeeded()  # fmt: skip
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", case.hf))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("model", [name for name, (_, changes) in MODELS.items() if changes.get("mtp")])
def test_prediction_layers_are_run_as_they_run_them(model: str, ran: dict[tuple[str, str], Case]) -> None:
    """What verify's forward pass makes of our source is what megatron-core computes."""
    from weights_conversion.engine.streams import Source
    from weights_conversion.verification import forward
    from weights_conversion.verification.conventions import CONVENTIONS
    from weights_conversion.verification.sides import open_model
    from weights_conversion.verification.stored import weights_of

    case, files = case_of(ran, model, "torch_dist"), Source()
    side = open_model(case.hf, "deepseek-v3")
    traced = forward.trace(side.config, CONVENTIONS[side.kind], weights_of(side, files), torch.tensor([TOKENS]))
    ours = [output[0] for stage, _, output in traced if stage == "prediction"]
    files.close()
    theirs = torch.load(case.out)["predicted"]
    assert len(ours) == len(theirs) == MODELS[model][1]["mtp"]
    for one, two in zip(ours, theirs, strict=True):
        assert (one - two).abs().max() < TOLERANCE


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_is_needed(flag: str, ran: dict[tuple[str, str], Case]) -> None:
    """None of them is restored: a run without it stops, or computes something else."""
    case, least = case_of(ran, "v3", flag), FLAGS[flag]
    found = torch.load(case.out)
    if least is None:
        assert isinstance(found, str)
    else:
        assert (found["logits"] - case.logits).abs().max() > least
