"""Large writes through the page cache: the disk is asked to begin at once, and nothing but the bytes matters."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from weights_conversion.engine import streams
from weights_conversion.engine.behind import KEPT, Behind
from weights_conversion.layouts.placement import TensorRef

PIECE = 1 << 20


def test_pieces_are_handed_to_the_disk_and_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, position, length, advice: advised.append((position, length)))
    data = os.urandom(8 * PIECE)
    with (tmp_path / "file").open("w+b") as file:
        behind = Behind(file.fileno())
        for number in range(8):
            behind.write(memoryview(data)[number * PIECE : (number + 1) * PIECE], number * PIECE)
    assert (tmp_path / "file").read_bytes() == data
    for number in range(8):  # once when it is written, once when others have followed
        assert advised.count((number * PIECE, PIECE)) == (2 if number < 8 - KEPT else 1)


@pytest.mark.parametrize("refusal", [OSError(errno.EINVAL, "refused"), OSError(errno.EIO, "bad"), AttributeError()])
def test_a_refused_hint_and_short_writes_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    real = os.pwrite

    def refused(*_: Any) -> None:
        raise refusal

    monkeypatch.setattr(os, "posix_fadvise", refused)
    monkeypatch.setattr(os, "pwrite", lambda fd, view, position: real(fd, view[:1000], position))
    data = os.urandom(10_500)
    with (tmp_path / "file").open("w+b") as file:
        Behind(file.fileno()).write(memoryview(data), 0)
    assert (tmp_path / "file").read_bytes() == data


def test_a_target_without_direct_writes_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, position, length, advice: advised.append(length))
    large, small = torch.arange(PIECE, dtype=torch.int16), torch.ones(100, dtype=torch.int16)
    (tmp_path / "file").write_bytes(bytes(2 * PIECE + 200))
    of_large = TensorRef("file", "large", torch.int16, (PIECE,), 0)
    of_small = TensorRef("file", "small", torch.int16, (100,), 2 * PIECE)
    target = streams.Target(tmp_path, {of_large: 0, of_small: 2 * PIECE}, direct=False)
    target.write(of_large, 0, large)
    target.write(of_small, 0, small)
    target.close()
    assert (tmp_path / "file").read_bytes() == large.numpy().tobytes() + small.numpy().tobytes()
    assert advised == [2 * PIECE]
