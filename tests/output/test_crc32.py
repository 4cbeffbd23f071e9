"""CRC-32 of a whole from those of its parts."""

from __future__ import annotations

import zlib

import pytest

from weights_conversion.output.crc32 import combine

CHECK = 0xCBF43926  # of "123456789", by which every CRC-32 is known


@pytest.mark.parametrize("cuts", [[9], [1, 8], [4, 5], [3, 3, 3], [0, 9], [9, 0], [2, 0, 7], [1] * 9])
def test_parts_make_the_whole(cuts: list[int]) -> None:
    text, parts = b"123456789", []
    for length in cuts:
        part, text = text[:length], text[length:]
        parts.append((zlib.crc32(part), length))
    assert combine(parts) == CHECK


def test_zeros_count() -> None:
    """A part of zeros, whose sum is that of no other length."""
    megabyte = bytes(1 << 20)
    assert combine([(zlib.crc32(b"a"), 1), (zlib.crc32(megabyte), 1 << 20)]) == zlib.crc32(b"a" + megabyte)


def test_nothing() -> None:
    assert combine([]) == 0
