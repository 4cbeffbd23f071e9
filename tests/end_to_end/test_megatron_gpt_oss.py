"""GPT-OSS in the real megatron-core: it loads ours with the flags that we print, and we export what it saves.

As test_megatron_core.py says, MEGATRON_CORE_PYTHON may name an interpreter with another release; with 0.19 both forms
of torch_dist are loaded.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpt_oss_models as oss
import pytest
import torch
from conftest import run
from doubled import transformers_logits
from test_megatron_core import PYTHON, TOLERANCE, run_harness, without_megatron_core
from torch import Tensor

HARNESS = Path(__file__).parents[1] / "megatron_gpt_oss.py"
EXACT = 1e-10  # in float64
TOKENS = [(7 * place + 3) % 96 for place in range(40)]
# A model with other windows, a square down_proj and tied tables; and what is printed of its windows.
MODELS: dict[str, dict[str, Any]] = {
    "as published": {},
    "windows in turn": {
        "intermediate_size": 32, "tie_word_embeddings": True, "swiglu_limit": 3.0,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
}  # fmt: skip
SILENT = {
    "--window-size": 1.0, "--window-attn-skip-freq": 0.1, "--glu-linear-offset": 1.0, "--softmax-type": 1.0,
    "--activation-func-clamp-value": 1.0, "--rotary-scaling-factor": 1.0,
    "--no-yarn-correction-range-round-to-int": 0.01,
}  # fmt: skip


def release() -> str:
    code = "from importlib.metadata import version; print(version('megatron_core'))"
    return subprocess.run([PYTHON, "-c", code], check=False, capture_output=True, text=True).stdout.strip()


def without(flags: list[str], name: str) -> list[str]:
    at = flags.index(name)
    valued = at + 1 < len(flags) and not flags[at + 1].startswith("--")
    return flags[:at] + flags[at + 1 + valued :]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Of a model: its folder, transformers' logits, and what all jobs left; megatron-core runs once for both."""
    if reason := without_megatron_core():
        pytest.skip(f"megatron-core cannot be imported ({reason})")
    base = tmp_path_factory.mktemp("gpt-oss")
    jobs: list[dict[str, Any]] = []
    found: dict[str, dict[str, Any]] = {}
    forms = ["before-0.19", *(["0.19"] if release() >= "0.19" else [])]
    for number, (model, changes) in enumerate(MODELS.items()):
        made = oss.model(seed=number, **changes)
        made.config._attn_implementation = "eager"
        with torch.no_grad():
            logits = made(torch.tensor([TOKENS])).logits[0]
        hf = oss.write(base / f"hf-{number}", made)
        of = found[model] = {"hf": hf, "logits": logits}
        for form in forms:
            root = base / f"{form}-{number}"
            result = run("hf_to_megatron", "gpt-oss", "--model-path", hf, "--out", root, "--core-release", form)
            line = next(each for each in result.succeeded().text.splitlines() if each.startswith("train with"))
            of["flags"] = shlex.split(line)[2:]
            job = {"rows": 96, "tokens": TOKENS, "flags": of["flags"]}
            jobs.append({**job, "load": str(root), "out": str(root) + ".pt"})
            of[form] = Path(str(root) + ".pt")
        for flag in (*SILENT, "--quick-geglu"):
            of[flag] = base / f"{number}{flag}.pt"
            jobs.append({**job, "load": str(root), "flags": without(of["flags"], flag), "out": str(of[flag]),
                         "may_stop": True})  # fmt: skip
        of["saved"] = base / f"saved-{number}"
        jobs.append({**job, "save": str(of["saved"]), "of": str(root), "hf": str(hf)})
    run_harness(HARNESS, jobs, base)
    return found.__getitem__


def difference(file: Path, logits: Tensor) -> float:
    return (torch.load(file)["logits"] - logits).abs().max().item()


@pytest.mark.parametrize("form", ["before-0.19", "0.19"])
@pytest.mark.parametrize("model", MODELS)
def test_ours_loads(model: str, form: str, work: Callable[[str], dict[str, Any]]) -> None:
    of = work(model)
    if form not in of:
        pytest.skip(f"megatron-core {release()} cannot read the form of 0.19; MEGATRON_CORE_PYTHON names another")
    assert difference(of[form], of["logits"]) < TOLERANCE
    assert (torch.load(of[form])["logits64"] - transformers_logits(of["hf"], TOKENS)).abs().max() < EXACT


@pytest.mark.parametrize("flag", SILENT)
def test_each_flag_is_needed(flag: str, work: Callable[[str], dict[str, Any]]) -> None:
    """A run without it goes on, and computes something else."""
    of = work("as published")
    assert difference(of[flag], of["logits"]) > SILENT[flag]


def test_a_run_without_its_activation_stops(work: Callable[[str], dict[str, Any]]) -> None:
    assert "shape mismatch" in torch.load(work("as published")["--quick-geglu"])


def test_windows_are_printed(work: Callable[[str], dict[str, Any]]) -> None:
    for model, freq in (("as published", "2"), ("windows in turn", "([0]*1+[1]*2+[0]*1)")):
        flags = work(model)["flags"]
        assert flags[flags.index("--window-attn-skip-freq") + 1] == freq
        assert flags[flags.index("--window-size") + 1] == "7,0"


@pytest.mark.parametrize("model", MODELS)
def test_theirs_is_exported(model: str, work: Callable[[str], dict[str, Any]], to_hf, tmp_path: Path) -> None:
    of = work(model)
    to_hf("--input_dir", of["saved"], "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
    back, source = oss.stored(tmp_path / "out"), oss.stored(of["hf"])
    assert back.keys() == source.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in source.items())
    config, stated = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", of["hf"]))
    for key in ("layer_types", "swiglu_limit", "sliding_window", "tie_word_embeddings", "rope_parameters"):
        assert config[key] == stated[key]
