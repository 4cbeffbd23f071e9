"""An OUT that was there keeps its mode, owner and group, empty or replaced."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

MODEL = "llama2-gqa"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make files of other owners")


def modes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): stat.S_IMODE(p.stat().st_mode) for p in (folder, *folder.rglob("*"))}


@pytest.mark.parametrize("mode", [0o700, 0o2770, 0o750, 0o755, 0o555])
@pytest.mark.parametrize("overwrite", [False, True])
def test_mode_is_kept(mode: int, overwrite: bool, imported, sources, to_megatron, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if overwrite:
        shutil.copytree(imported("llama2"), out)
    else:
        out.mkdir()
    out.chmod(mode)
    options = ["--overwrite"] if overwrite else []
    to_megatron("llama2", "--model-path", sources(MODEL), "--out", out, *options).succeeded()
    found = modes(out)
    assert found["."] == mode
    assert {name for name, has in found.items() if has & 0o077 & ~mode} == set()
    assert found["release"] & 0o2000 == mode & 0o2000


@as_root
@pytest.mark.parametrize("overwrite", [False, True])
def test_owner_and_group_are_kept(overwrite: bool, imported, sources, to_megatron, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if overwrite:
        shutil.copytree(imported("llama2"), out)
    else:
        out.mkdir()
    os.chown(out, 2001, 3000)
    out.chmod(0o2770)
    options = ["--overwrite"] if overwrite else []
    to_megatron("llama2", "--model-path", sources(MODEL), "--out", out, *options).succeeded()
    assert {(p.stat().st_uid, p.stat().st_gid) for p in (out, *out.rglob("*"))} == {(2001, 3000)}
    assert stat.S_IMODE(out.stat().st_mode) == 0o2770


def test_a_new_output_has_the_mode_of_umask_and_parent(sources, to_megatron, tmp_path: Path) -> None:
    place = tmp_path / "group"
    place.mkdir()
    place.chmod(0o2775)
    before = os.umask(0o027)
    try:
        to_megatron("llama2", "--model-path", sources(MODEL), "--out", place / "out").succeeded()
    finally:
        os.umask(before)
    found = modes(place / "out")
    assert found["."] == found["release"] == 0o2750
    assert found["release/mp_rank_00/model_optim_rng.pt"] == found["conversion_manifest.json"] == 0o640
