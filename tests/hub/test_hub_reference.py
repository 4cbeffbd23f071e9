"""--reference REPO of a repository with vision: what is around the text comes from the hub, and no other weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import delta_models
import pytest
import torch
from conftest import REPOSITORY
from delta_models import DELTAS
from hub_standin import HubStandIn, Repository
from safetensors.torch import load_file, save_file

MODEL = DELTAS["3.5-vision"]
NAME = "owner/vision"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three files, the vision tensors in the second; what turns images into input beside them."""
    folder = delta_models.write(tmp_path / "hf", MODEL)
    tensors = MODEL.tensors()
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    files = {name: names[1] if "visual" in name else names[2 * (at % 2)] for at, name in enumerate(tensors)}
    (folder / "model.safetensors").unlink()
    for file in names:
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "preprocessor_config.json").write_text('{"size": 3}')
    return folder


@pytest.fixture
def hub(source: Path) -> Iterator[HubStandIn]:
    with HubStandIn({NAME: Repository({path.name: path.read_bytes() for path in source.iterdir()})}) as hub:
        yield hub


def export(hub: HubStandIn, tmp_path: Path, *options: Any) -> tuple[int, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "SLURM_")) and not k.endswith("_proxy")}
    mine = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
    (tmp_path / "temporary").mkdir(exist_ok=True)
    line = [sys.executable, REPOSITORY / "megatron_to_hf.py", "--input_dir", tmp_path / "mt", "--no_tokenizer"]
    line += ["--output_dir", tmp_path / "out", "--reference", NAME, *options]
    done = subprocess.run(
        [str(word) for word in line], env=kept | mine | {"TMPDIR": str(tmp_path / "temporary")},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert not list((tmp_path / "temporary").glob("weights-conversion-*"))
    return done.returncode, done.stdout + done.stderr


def in_cache(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "home").rglob("snapshots/*/model-*"))


@pytest.mark.parametrize("manifest", [True, False])
def test_the_vision_part_comes_from_the_hub(
    manifest: bool, source: Path, hub: HubStandIn, to_megatron: Callable[..., Any], tmp_path: Path
) -> None:
    to_megatron(MODEL.family, "--model-path", source, "--out", tmp_path / "mt").succeeded()
    if not manifest:
        (tmp_path / "mt" / "conversion_manifest.json").unlink()
    code, said = export(hub, tmp_path, "--dry-run")
    assert code == 0, said
    assert "2 tensors that are not the text model's, of owner/vision" in said
    assert in_cache(tmp_path) == []
    for _ in range(2):  # the second finds everything in the cache, and an output of its own to replace
        hub.requests.clear()
        code, said = export(hub, tmp_path, "--verify", "--overwrite")
        assert code == 0, said
        assert in_cache(tmp_path) == ["model-00002-of-00003.safetensors"]
    assert not [one for one in hub.requests if one.file and one.method == "GET" and "00002" in one.file]
    found, wanted = load_file(tmp_path / "out" / "model.safetensors"), MODEL.tensors()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 3}'
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vision_config"] == {"depth": 1}


def test_a_hub_that_fails_in_between_is_an_error(
    source: Path, hub: HubStandIn, to_megatron: Callable[..., Any], tmp_path: Path
) -> None:
    to_megatron(MODEL.family, "--model-path", source, "--out", tmp_path / "mt").succeeded()
    hub.trouble.status["model-00002-of-00003.safetensors"] = 403
    code, said = export(hub, tmp_path)
    assert code == 1
    assert NAME in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
