"""Every command of README and docs runs, in their order and one folder; the hub is a stand-in, the models are tiny."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models as tm
from conftest import run
from hub_standin import HubStandIn, Repository
from pages import PAGES, README, ROOT, Command, commands

TINY = tm.Tiny("documented", "llama2", layers=4, heads=8, groups=8, head_dim=8)
MISTRAL = tm.Tiny("documented-mistral", "mistral", groups=2, window=4096)
OPENED = ("Llama-2-7b-hf", "Llama-2-70b-hf")
# What is not run here, and why.
ELSEWHERE = {
    r"python3 -m venv \.venv && ": "CI runs these two word for word in an empty clone",
    r"hf auth login$": "needs an account",
    r"python -m benchmarks\.run ": "measures a disk; its own --help is asked for below",
    r"python -m benchmarks\.report ": "writes what was measured into these pages",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a reader stands: a clone, with models beside it."""
    folder = tmp_path_factory.mktemp("home")
    tm.write_huggingface(folder / "models" / "Llama-2-7b-hf", TINY)
    tm.write_huggingface(folder / "models" / "Mistral-7B-v0.1", MISTRAL)
    tm.write_meta(folder / "meta" / "llama-2-7b", TINY, 1)
    for script in ("hf_to_megatron.py", "megatron_to_hf.py", "verify.py"):
        (folder / script).symlink_to(ROOT / script)
    return folder


@pytest.fixture(scope="module")
def hub(home: Path) -> Iterator[HubStandIn]:
    files = {path.name: path.read_bytes() for path in (home / "models" / "Llama-2-7b-hf").iterdir()}
    with HubStandIn({f"meta-llama/{name}": Repository(files) for name in OPENED}) as hub:
        yield hub


def trained(home: Path) -> None:
    """What a run from the 70B import has saved at iteration 800."""
    import torch

    root = home / "runs" / "llama2-70b"
    shutil.copytree(home / "checkpoints" / "llama2-70b", root)
    (root / "release").rename(root / "iter_0000800")
    for file in root.rglob("*.pt"):
        content = torch.load(file, weights_only=False)
        content["iteration"] = 800
        torch.save(content, file)
    (root / "latest_checkpointed_iteration.txt").write_text("800")


def process(command: Command, home: Path, hub: HubStandIn) -> tuple[int, str]:
    """The command in a process of its own, with the stand-in for the hub. Tiny models are of no stated size."""
    words = [sys.executable if word == "python" else word for word in command.words]
    if words[0] == "torchrun":
        words[:1] = [sys.executable, "-m", "torch.distributed.run"]
    if words[:2] == ["hf", "download"]:
        words = [sys.executable, "-c", f"import huggingface_hub as h; h.snapshot_download({words[2]!r})"]
    if "--size" in words:
        at = words.index("--size")
        words[at : at + 2] = ["--model-path", f"meta-llama/Llama-2-{words[at + 1]}b-hf"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_", "HF_", "RANK", "WORLD_"))}
    mine = {"HF_HOME": str(home / "hub"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
    given = {name: value.replace("/shared", str(home)) for name, value in command.variables.items()}
    done = subprocess.run(words, cwd=home, env=kept | mine | given, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def carry_out(command: Command, home: Path, hub: HubStandIn) -> tuple[int, str]:
    first = command.words[0]
    if first == "ls":
        trained(home)
        assert sorted(path.name for path in (home / command.words[1]).glob("[il]*")) == [
            "iter_0000800", "latest_checkpointed_iteration.txt",
        ]  # fmt: skip
        return 0, ""
    local = {"--model-path", "--input_dir"} & set(command.words)
    script = "verify.py" if command.words[:3] == ("python", "-m", "weights_conversion.verify") else command.words[1]
    if first == "python" and (local or script == "verify.py") and not command.variables:
        module = {"verify.py": "weights_conversion.verify"}.get(script, script.removesuffix(".py"))
        rest = command.words[3:] if command.words[1] == "-m" else command.words[2:]
        result = run(module, *rest)
        return result.code, result.text
    return process(command, home, hub)


def test_every_command_runs(home: Path, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    seen = 0
    for page in [README, *[page for page in PAGES if page != README]]:
        for command in commands(page):
            line = " ".join(command.words)
            if any(re.match(pattern, line) for pattern in ELSEWHERE):
                continue
            code, text = carry_out(command, home, hub)
            assert code == 0, f"{command}\n{text}"
            seen += 1
    assert seen >= 20


def test_ci_finds_the_two_commands() -> None:
    text = README.read_text()
    for module in ("weights_conversion.demo", "pytest"):
        (line,) = re.findall(rf"^python3 -m venv \.venv && .* -m {module}(?: .*)?$", text, re.M)
        assert "torch==2.13.0" in line


def test_the_benchmark_knows_its_options() -> None:
    lines = [c for page in PAGES for c in commands(page) if "benchmarks.run" in c.words]
    assert lines
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    for command in lines:
        assert all(word in done.stdout for word in command.words if word.startswith("--")), command
