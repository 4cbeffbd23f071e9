"""CRC-32 of a whole from the CRC-32s of its parts, so that parts can be written in any order by anyone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # of zip and zlib, bits reversed: bit 31 is x^0


def _multiply(a: int, b: int) -> int:
    """a * b modulo the CRC's polynomial."""
    product = 0
    while b:
        if b & 0x80000000:
            product ^= a
        a = a >> 1 ^ _POLYNOMIAL if a & 1 else a >> 1
        b = b << 1 & 0xFFFFFFFF
    return product


@lru_cache(maxsize=4096)
def _shift(length: int) -> int:
    """x^(8*length) modulo the CRC's polynomial: what appending `length` bytes does to a CRC."""
    result, power = 0x80000000, 0x00800000  # x^0, x^8
    while length:
        if length & 1:
            result = _multiply(result, power)
        power = _multiply(power, power)
        length >>= 1
    return result


def combine(parts: Sequence[tuple[int, int]]) -> int:
    """The CRC-32 of consecutive parts, each given as (crc, length)."""
    total = 0
    for crc, length in parts:
        total = crc if length and total == 0 else _multiply(_shift(length), total) ^ crc
    return total
