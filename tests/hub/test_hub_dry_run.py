"""A repository is looked into before its weights are fetched: by headers in a dry run, by its config in any run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models as tm
from conftest import REPOSITORY
from hub_standin import HubStandIn, Repository

NAME = "owner/tiny"


def files(folder: Path, **settings: object) -> dict[str, bytes]:
    tm.write_huggingface(folder, tm.MODELS["llama2"], **settings)  # pyright: ignore[reportArgumentType]
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStandIn]:
    repositories = {
        NAME: Repository(files(tmp_path / "model", parts=2)),
        "owner/bins": Repository(files(tmp_path / "bins", kind="bin")),
    }
    with HubStandIn(repositories) as hub:
        yield hub


def convert(hub: HubStandIn, tmp_path: Path, *options: object, repository: str = NAME) -> tuple[int, str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "SLURM_")) and not k.endswith("_proxy")}
    mine = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "TMPDIR": str(tmp_path),
    }
    line = [sys.executable, REPOSITORY / "hf_to_megatron.py", "llama2", "--model-path", repository]
    line += ["--out", tmp_path / "out", *options]
    done = subprocess.run([str(word) for word in line], env=kept | mine, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


def weights_in_cache(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "home").rglob("snapshots/*/model-*"))


def test_a_dry_run_fetches_headers_alone(hub: HubStandIn, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    code, out, err = convert(hub, tmp_path, "--dry-run", "--tensor-model-parallel-size", 2)
    assert code == 0, out + err
    commit = hub.repositories[NAME].commit
    assert out.splitlines()[0] == f"source      {NAME}: llama2, Hugging Face, 2 files, float32; {NAME} at {commit}"
    (said,) = [line for line in out.splitlines() if "would be fetched into" in line]
    assert said.endswith(" free")
    assert str(tmp_path / "home") in said
    assert {r.range for r in hub.requests if r.method == "GET" and r.file and "model-0" in r.file} == {"bytes=0-100000"}
    assert weights_in_cache(tmp_path) == []
    assert set(tmp_path.iterdir()) - before == {tmp_path / "home"}
    plan = [line for line in out.splitlines() if line.startswith(("output", "train with"))]
    code, out, err = convert(hub, tmp_path, "--tensor-model-parallel-size", 2)
    assert code == 0, out + err
    assert [line for line in out.splitlines() if line.startswith(("output", "train with"))] == plan
    assert len(weights_in_cache(tmp_path)) == 2
    asked = len(hub.requests)
    code, out, err = convert(hub, tmp_path, "--dry-run", "--overwrite")
    assert code == 0, out + err
    assert "0 bytes would be fetched" in out
    assert not [r for r in hub.requests[asked:] if r.method == "GET" and r.file and "model-0" in r.file]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--tensor-model-parallel-size", 3], "3"),
        (["--size", 70], "--size 70"),
        (["--true-vocab-size", 5], "--true-vocab-size 5"),
        (["--num-layers-per-virtual-pipeline-stage", 1], "--pipeline-model-parallel-size"),
    ],
)
def test_what_a_config_rules_out_is_not_fetched(options: list, word: str, hub: HubStandIn, tmp_path: Path) -> None:
    code, out, err = convert(hub, tmp_path, *options)
    assert code == 1, out + err
    assert word in err
    assert not [request for request in hub.requests if request.file and request.file.startswith("model")]
    assert weights_in_cache(tmp_path) == []


def test_bins_cannot_be_looked_into(hub: HubStandIn, tmp_path: Path) -> None:
    code, _, err = convert(hub, tmp_path, "--dry-run", repository="owner/bins")
    assert code == 1
    assert "would be fetched into" in err
    assert "hf download owner/bins" in err
    assert not [request for request in hub.requests if request.file and request.file.endswith(".bin")]
