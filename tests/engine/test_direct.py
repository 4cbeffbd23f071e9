"""Reads past the page cache give the bytes that reads through it give, wherever they begin and end."""

from __future__ import annotations

import errno
import mmap
import os
import random
from pathlib import Path

import pytest
import torch

from weights_conversion.engine import direct
from weights_conversion.engine.direct import Direct
from weights_conversion.engine.streams import Source, bytes_of
from weights_conversion.errors import ConversionError
from weights_conversion.layouts.placement import PAGE, TensorRef

SIZE = 3 * direct.BOUNCE_BYTES + 1234


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(random.Random(0).randbytes(SIZE))
    return tmp_path / "weights"


@pytest.fixture
def uncached(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Whatever is read counts as not in the cache; how much was read directly, read by read."""
    read, counts = Direct.read, []

    def counted(self: Direct, descriptor: int, into: memoryview, position: int) -> int:
        counts.append(read(self, descriptor, into, position))
        return counts[-1]

    monkeypatch.setattr(direct, "cached_bytes", lambda *_: 0)
    monkeypatch.setattr(direct, "LEAST_BYTES", 1)
    monkeypatch.setattr(Direct, "read", counted)
    return counts


def part(file: Path, start: int, length: int, shift: int = 0) -> bytes:
    """Bytes of a file as a run reads them, into memory that begins `shift` bytes behind a page's begin."""
    buffer = mmap.mmap(-1, length + shift + 1)
    into = torch.frombuffer(buffer, dtype=torch.uint8)[shift : shift + length]
    source = Source(direct=Direct())
    try:
        source.read(TensorRef(str(file), "a", torch.uint8, (length,), start), 0, into)
    finally:
        source.close()
    return bytes(bytes_of(into))


CASES = [
    (0, 5 * PAGE, 0), (0, SIZE, 0), (PAGE, PAGE + 1, 0), (7, 3, 0), (PAGE - 1, 2, 5), (0, 2 * PAGE, 8),
    (8 * PAGE + 8, 2 * direct.BOUNCE_BYTES + 5, 0), (SIZE - 1, 1, 0), (SIZE - PAGE - 50, PAGE + 50, 0),
]  # fmt: skip


@pytest.mark.parametrize(("start", "length", "shift"), CASES)
def test_bytes(start: int, length: int, shift: int, file: Path, uncached: list[int]) -> None:
    assert part(file, start, length, shift) == file.read_bytes()[start : start + length]
    assert uncached == [length]


@pytest.mark.parametrize("shorter", [PAGE, 1000, 1])
def test_short_reads(shorter: int, file: Path, uncached: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes in pieces, on pages or not, is read to its end."""
    preadv, calls = os.preadv, []

    def short(descriptor: int, buffers: list[memoryview], position: int, *flags: int) -> int:
        calls.append(position)
        whole = len(calls) % 2 or len(buffers[0]) <= shorter
        return preadv(descriptor, buffers if whole else [buffers[0][:shorter]], position, *flags)

    monkeypatch.setattr(os, "preadv", short)
    for start, length, shift in CASES[:4] + CASES[6:7]:
        assert part(file, start, length, shift) == file.read_bytes()[start : start + length]


def test_a_file_that_ends_too_early(file: Path, uncached: list[int]) -> None:
    with pytest.raises(ConversionError, match="in the middle of a"):
        part(file, SIZE - PAGE, 2 * PAGE)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_filesystem_that_refuses(code: int, file: Path, uncached: list[int], monkeypatch) -> None:
    """When it is opened, or only when it is read."""

    def refuses(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    wanted = file.read_bytes()[5 : 5 + 3 * PAGE]
    with monkeypatch.context() as patch:
        patch.setattr(direct, "_read_pages", refuses)
        assert part(file, 5, 3 * PAGE) == wanted
    assert uncached == [0]
    monkeypatch.setattr(direct, "_reopened", lambda _: None)
    assert part(file, 5, 3 * PAGE) == wanted
    assert uncached == [0]


def test_an_error_of_the_disk_is_told(file: Path, uncached: list[int], monkeypatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(direct, "_read_pages", fails)
    with pytest.raises(OSError, match="Input/output") as error:
        part(file, 0, 3 * PAGE)
    assert error.value.filename == str(file)


@pytest.mark.parametrize("known", [True, False])
def test_what_is_cached_is_read_from_the_cache(known: bool, file: Path, monkeypatch) -> None:
    """By the call that counts pages, and where that is not known, by looking at some of them."""
    if not known:
        monkeypatch.setattr(direct, "_cachestat", lambda *_: None)
    file.read_bytes()
    held = Direct()
    descriptor = os.open(file, os.O_RDONLY)
    try:
        assert direct.cached_bytes(descriptor, 0, SIZE) > SIZE // 2
        assert not held.wants(descriptor, 0, SIZE)
    finally:
        held.close()
        os.close(descriptor)
