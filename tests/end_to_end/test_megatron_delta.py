"""Gated delta in the real Megatron-LM (0.19): its own parser, builder and checkpoint code take what an import prints.

It computes transformers' logits (the judge is float64: the delta rule lets float32's rounding grow), a flag left out
moves them or stops it, and what its save_checkpoint writes is exported bit for bit. As test_megatron_core.py says,
MEGATRON_CORE_PYTHON may name an interpreter that has it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import delta_models
import pytest
import torch
from conftest import run
from delta_models import DELTAS
from doubled import transformers_logits
from safetensors.torch import load_file
from test_megatron_core import PYTHON, TOLERANCE, run_harness
from test_megatron_gpt_oss import without

HARNESS = Path(__file__).parents[1] / "megatron_stock.py"
TOKENS = [3 * place % 64 for place in range(20)]
EXACT = 1e-10
MODELS = ("next", "next-tied", "next-uneven", "3.5", "3.5-tied", "3.5-moe", "3.6-moe")
RANKS = ("--ckpt-format", "torch", "--tensor-model-parallel-size", 2)
# How it is written, and the tensor and expert ranks that load it.
LAYOUTS: dict[str, tuple[tuple[Any, ...], int, int]] = {
    "torch_dist": ((), 1, 1), "torch_dist TP 2": ((), 2, 1), "torch TP 2": (RANKS, 2, 1),
    "torch_dist EP 2": ((), 1, 2), "hybrid": (("--hybrid",), 1, 1), "hybrid TP 2": (("--hybrid",), 2, 1),
    "hybrid torch TP 2": ((*RANKS, "--hybrid"), 2, 1),
}  # fmt: skip
# What a run without a flag computes: logits that are so far off, or nothing, since shapes or names are others.
FLAGS: dict[str, float | None] = {
    "--apply-layernorm-1p": 1.0, "--moe-shared-expert-gate": 0.1, "--qk-layernorm": 0.01, "--norm-epsilon": 0.01,
    "--attention-output-gate": None, "--linear-num-key-heads": None, "--linear-num-value-heads": None,
    "--linear-key-head-dim": None, "--linear-value-head-dim": None, "--experimental-attention-variant": None,
    "--linear-attention-freq": None,
}  # fmt: skip
RESTORED = ("--rotary-base", "--rotary-percent", "--mtp-num-layers")  # printed for releases that do not


@dataclass(frozen=True)
class Case:
    hf: Path
    out: Path
    saved: Path
    flags: list[str]


def without_training() -> str:
    """Why Megatron's training cannot be imported, or nothing."""
    code = "import te_stand_in; te_stand_in.install(); import megatron.core.ssm.gated_delta_net.gdn, megatron.training"
    probe = subprocess.run(
        [PYTHON, "-c", code], check=False, capture_output=True, text=True, cwd=HARNESS.parent,
        env=os.environ | {"TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    return "" if probe.returncode == 0 else f"{PYTHON}: {probe.stderr.strip().splitlines()[-1]}"


def options_of(name: str, layout: str) -> list[Any] | None:
    """None: there is no such model in that layout."""
    model, options = DELTAS[name], list(LAYOUTS[layout][0])
    if layout == "torch_dist EP 2" and not model.experts:
        return None
    if "--hybrid" in options:
        if model.predicts:
            return None
        options.remove("--hybrid")
        kinds = ("G" if linear else "*" for linear in model.layers)
        options += ["--hybrid-layer-pattern", "".join(kind + "-E"[bool(model.experts)] for kind in kinds)]
    if "torch" in options and model.experts:
        options.append("--moe-grouped-gemm")
    return options


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Case]:
    """By model and layout, and by layout and flag; megatron-core runs once for all."""
    if reason := without_training():
        pytest.skip(f"no Megatron-LM 0.19 with its training can be imported ({reason})")
    base = tmp_path_factory.mktemp("delta")
    jobs: list[dict[str, Any]] = []
    cases: dict[tuple[str, str], Case] = {}
    for name in MODELS:
        hf = delta_models.write(base / name / "hf", DELTAS[name])
        for number, (layout, (_, tp, ep)) in enumerate(LAYOUTS.items()):
            options = options_of(name, layout)
            if options is None:
                continue
            root = base / name / str(number)
            said = run("hf_to_megatron", DELTAS[name].family, "--model-path", hf, "--out", root, *options).succeeded()
            line = next(each for each in said.text.splitlines() if each.startswith("train with"))
            case = Case(hf, Path(f"{root}.pt"), Path(f"{root}-saved"), shlex.split(line)[2:])
            cases[name, layout] = case
            job = {"flags": case.flags, "out": str(case.out), "tp": tp, "ep": ep, "etp": tp, "rows": 128 * tp,
                   "tokens": TOKENS}  # fmt: skip
            jobs.append({**job, "double": True, "save": str(case.saved)})
            if name == "next" and layout in ("torch_dist", "torch TP 2"):
                for flag in (*FLAGS, *RESTORED):
                    lacking = Case(hf, Path(f"{root}{flag}.pt"), base, without(case.flags, flag))
                    cases[layout, flag] = lacking
                    jobs.append({**job, "flags": lacking.flags, "out": str(lacking.out), "may_stop": True})
    run_harness(HARNESS, jobs, base)
    return cases


def case_of(ran: dict[tuple[str, str], Case], name: str, layout: str) -> Case:
    if (name, layout) not in ran:
        pytest.skip("there is no such model in that layout")
    case = ran[name, layout]
    error = Path(f"{case.out}.error")
    assert not error.exists(), error.read_text()
    return case


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_ours_loads(name: str, layout: str, ran: dict[tuple[str, str], Case]) -> None:
    case = case_of(ran, name, layout)
    wanted, found = transformers_logits(case.hf, TOKENS), torch.load(case.out)
    assert (found["logits64"][:, :64] - wanted).abs().max() < EXACT
    assert (found["logits"][:, :64] - wanted).abs().max() < TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_theirs_is_exported(
    name: str, layout: str, ran: dict[tuple[str, str], Case], tmp_path: Path, to_hf: Callable[..., Any]
) -> None:
    case = case_of(ran, name, layout)
    to_hf("--input_dir", case.saved, "--output_dir", tmp_path / "out", "--no_tokenizer", "--true_vocab_size", 64,
          "--model", DELTAS[name].family, "--verify").succeeded()  # fmt: skip
    found, wanted = load_file(tmp_path / "out" / "model.safetensors"), DELTAS[name].tensors()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("layout", ["torch_dist", "torch TP 2"])
@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_is_needed(flag: str, layout: str, ran: dict[tuple[str, str], Case]) -> None:
    """None of them is restored: a run without it stops, or computes something else."""
    case, least = ran[layout, flag], FLAGS[flag]
    found = torch.load(case.out)
    if least is None:
        assert isinstance(found, str)
    else:
        assert (found["logits"][:, :64] - transformers_logits(case.hf, TOKENS)).abs().max() > least


@pytest.mark.parametrize("flag", RESTORED)
def test_flags_that_are_restored_too(flag: str, ran: dict[tuple[str, str], Case]) -> None:
    case = ran["torch_dist", flag]
    difference = torch.load(case.out)["logits"][:, :64] - transformers_logits(case.hf, TOKENS)
    assert difference.abs().max() < 1e-4
