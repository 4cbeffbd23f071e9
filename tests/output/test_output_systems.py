"""Systems that have not what is asked for: mounts that know few calls, sandboxes, servers that squash users."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from failing import failing

from weights_conversion.output import imitate, locks, publish


@pytest.fixture
def line(sources, tmp_path: Path) -> list[object]:
    return ["llama2", "--model-path", sources("llama2-gqa"), "--out", tmp_path / "out", "--overwrite"]


UNSUPPORTED = [errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, 524]  # the last: the kernel's own, of 9p and some NFS servers


@pytest.mark.parametrize("code", UNSUPPORTED)
def test_a_mount_that_knows_few_calls(code: int, line, to_megatron, tmp_path: Path, monkeypatch) -> None:
    """No attributes, no lists, no locks, no exchange, no syncs of folders: nothing of it ends a conversion."""
    fsync = os.fsync

    class Library:
        renameat2 = staticmethod(lambda *_: -1)

    with monkeypatch.context() as patch:
        for name in ("getxattr", "setxattr", "removexattr"):
            patch.setattr(os, name, failing(code))
        patch.setattr(locks.fcntl, "flock", failing(code))
        patch.setattr(publish, "ctypes", SimpleNamespace(
            CDLL=lambda *_, **__: Library, get_errno=lambda: code, c_int=int, c_uint=int))  # fmt: skip
        patch.setattr(os, "fsync", failing(code, lambda file: Path(f"/proc/self/fd/{file}").is_dir(), fsync))
        to_megatron(*line).succeeded()
        to_megatron(*line).succeeded()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.EACCES])
def test_a_sandbox_that_forbids_the_exchange(code: int, line, to_megatron, tmp_path: Path, monkeypatch) -> None:
    class Library:
        renameat2 = staticmethod(lambda *_: -1)

    to_megatron(*line).succeeded()
    monkeypatch.setattr(publish, "ctypes", SimpleNamespace(
        CDLL=lambda *_, **__: Library, get_errno=lambda: code, c_int=int, c_uint=int))  # fmt: skip
    to_megatron(*line).succeeded()
    assert os.listdir(tmp_path) == ["out"]


def test_no_list_to_remove_narrows_nothing(line, to_megatron, tmp_path: Path, monkeypatch) -> None:
    """A server that squashes users refuses to remove a list that is not there."""
    to_megatron(*line).succeeded()
    (tmp_path / "out").chmod(0o2775)
    monkeypatch.setattr(imitate.os, "removexattr", failing(errno.EPERM))
    assert "cannot be kept" not in to_megatron(*line).succeeded().text
    assert (tmp_path / "out").stat().st_mode & 0o7777 == 0o2775
