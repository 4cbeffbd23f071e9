"""--adapter REPOSITORY: PEFT's two files come from the hub, checked, and from its cache when the hub is away."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models as tm
import torch
from conftest import GOLDEN, REPOSITORY
from hub_standin import HubStandIn, Repository

CASE = GOLDEN / "core-llama3-lora"
NAME = "owner/adapter"


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    adapter = {path.name: path.read_bytes() for path in (CASE / "adapter").iterdir()}
    repositories = {NAME: Repository(adapter), "owner/config": Repository({"adapter_config.json": b"{}"})}
    with HubStandIn(repositories) as hub:
        yield hub


def convert(
    hub: HubStandIn, tmp_path: Path, adapter: str, *options: object, **settings: str
) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "SLURM_")) and not k.endswith("_proxy")}
    mine = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", **settings}
    line = [sys.executable, REPOSITORY / "hf_to_megatron.py", "llama3", "--model-path", CASE / "base"]
    line += ["--adapter", adapter, "--out", tmp_path / "out", *options]
    return subprocess.run([str(word) for word in line], env=kept | mine, capture_output=True, text=True, timeout=240)


def test_an_adapter_of_the_hub(hub: HubStandIn, tmp_path: Path, to_hf) -> None:
    done = convert(hub, tmp_path, NAME, "--verify")
    assert done.returncode == 0, done.stderr
    assert f"adapter    {tmp_path / 'home'}" in done.stdout
    to_hf("--input_dir", tmp_path / "out", "--output_dir", tmp_path / "hf", "--no_tokenizer").succeeded()
    found, wanted = tm.read_huggingface(tmp_path / "hf"), tm.read_huggingface(CASE / "hf")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    again = convert(hub, tmp_path, NAME, "--overwrite", "--dtype", "fp32", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("owner/none", "owner/none"),
        ("owner/config", "holds no adapter of PEFT's"),
        ("no/such/folder", "neither a folder here nor the name of a repository"),
    ],
)
def test_what_is_no_adapter(name: str, words: str, hub: HubStandIn, tmp_path: Path) -> None:
    done = convert(hub, tmp_path, name)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_was_tampered_with(hub: HubStandIn, tmp_path: Path) -> None:
    assert convert(hub, tmp_path, NAME, "--dry-run").returncode == 0
    (cached,) = (tmp_path / "home").rglob("snapshots/*/adapter_model.safetensors")
    content = bytearray(cached.read_bytes())
    content[-1] ^= 1
    cached.resolve().write_bytes(content)
    done = convert(hub, tmp_path, NAME)
    assert done.returncode == 1
    assert "does not hold the bytes that the hub states" in done.stderr
