"""An iteration that stands under another's number is refused by what its files state, in each format that states it."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN

from weights_conversion.errors import ConversionError
from weights_conversion.sources.checkpoint import open_files

FORMATS = {
    "common.pt": GOLDEN / "core-qwen2" / "megatron-torch_dist" / "iter_0000121",
    "common state": GOLDEN / "core-qwen3" / "megatron-torch_dist" / "iter_0000131",
    "entry": GOLDEN / "core-llama3-torch-dcp" / "megatron-torch_dcp" / "iter_0000342",
    "adapters": GOLDEN / "bridge-lora" / "megatron-adapters" / "iter_0007301",
}


def copied(folder: Path, root: Path, name: str, tracked: str) -> Path:
    """`folder` as root/name, which the tracker names."""
    shutil.copytree(folder, root / name)
    (root / "latest_checkpointed_iteration.txt").write_text(tracked)
    return root


@pytest.mark.parametrize("form", FORMATS)
def test_a_copy_under_another_number(form: str, tmp_path: Path) -> None:
    number = int(FORMATS[form].name.removeprefix("iter_"))
    root = copied(FORMATS[form], tmp_path / "ckpt", "iter_0000010", "10")
    for path, asked in ((root, None), (root, 10), (root / "iter_0000010", None)):
        with pytest.raises(ConversionError, match=f"is of iteration {number} by.*but stands in iter_0000010; rename"):
            open_files(path, asked)
    (root / "iter_0000010").rename(root / FORMATS[form].name)  # the advice works
    open_files(root, number)


@pytest.mark.parametrize(("name", "tracked"), [("release", "release"), ("best", "121")], ids=lambda name: name)
def test_other_names_are_believed(name: str, tracked: str, tmp_path: Path) -> None:
    """Some trainers save at iteration 1 and move it to release; what a renamed folder is, its user knows."""
    root = copied(FORMATS["common.pt"], tmp_path / "ckpt", name, tracked)
    open_files(root / name)
    if name == "release":
        open_files(root)


def test_nothing_states_the_iteration(imported, tmp_path: Path) -> None:
    release = imported("llama2", "--target", "megatron-core") / "release"
    root = copied(release, tmp_path / "ckpt", "iter_0000010", "10")
    with pytest.raises(ConversionError, match="iteration 0"):
        open_files(root)
    path = root / "iter_0000010" / "common.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        common = torch.load(path, weights_only=True)
    del common["iteration"]
    torch.save(common, path)
    open_files(root)
