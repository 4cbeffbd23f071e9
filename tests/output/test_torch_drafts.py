"""How a torch file is laid out: the output's own file is never opened by torch, and its holes stay holes."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch

from weights_conversion.formats.torch_files import TorchFileTarget, read_torch_file
from weights_conversion.layouts.placement import TensorRef

SHAPES = {"large": (4096, 1024), "small": (3,), "last": (1000, 7)}


def laid_out(path: Path) -> dict[str, int]:
    refs = {name: TensorRef("a/model_optim_rng.pt", name, torch.bfloat16, shape) for name, shape in SHAPES.items()}
    target = TorchFileTarget("a/model_optim_rng.pt", {"args": {"text": "x" * 100_000}, **refs}, tuple(refs.values()))
    with path.open("w+b") as file:
        offsets = target.create(file)
    with path.open("rb") as file:
        assert target.find(file) == offsets
    return {ref.name: offset for ref, offset in offsets.items()}


def saved() -> bytes:
    """What torch itself saves of the same content, aligned as ours."""
    from torch.utils.serialization import config

    buffer = io.BytesIO()
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()}
    with config.patch({"save.storage_alignment": 4096}):  # pyright: ignore[reportAttributeAccessIssue]
        torch.save({"args": {"text": "x" * 100_000}, **tensors}, buffer)
    return buffer.getvalue()


def test_torch_writes_beside_the_file_and_the_holes_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch truncates what it opens, whereupon ext4 would lay the data out in hundreds of pieces."""
    opened, save, path = [], torch.save, tmp_path / "model_optim_rng.pt"

    def watched(content: object, place: Path) -> None:
        opened.append(os.path.samestat(os.stat(place), os.stat(path)))
        save(content, place)

    monkeypatch.setattr(torch, "save", watched)
    laid_out(path)
    assert opened == [not hasattr(os, "memfd_create")]
    assert path.stat().st_blocks * 512 < 1 << 20 < 8 << 20 < path.stat().st_size


@pytest.mark.parametrize("memory", [True, False])
def test_a_draft_gives_torchs_own_structure(memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With or without files in memory: the same places, and the file that torch would have saved."""
    if not memory:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    path = tmp_path / "model_optim_rng.pt"
    offsets = laid_out(path)
    (tmp_path / "theirs.pt").write_bytes(saved())
    theirs = read_torch_file(tmp_path / "theirs.pt")
    assert sorted(offsets.values()) == sorted(theirs.records[str(i)].offset for i in range(len(SHAPES)))
    loaded = torch.load(path, weights_only=True)
    assert loaded["args"] == {"text": "x" * 100_000}
    assert all(tensor.shape == SHAPES[name] and not tensor.any() for name, tensor in loaded.items() if name != "args")
