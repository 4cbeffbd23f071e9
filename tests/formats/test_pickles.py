"""What our reading of pickles bounds that pickle.Unpickler does not."""

from __future__ import annotations

import contextlib
import pickle
import sys
import tracemalloc
from collections.abc import Callable

import pytest

from weights_conversion.errors import ConversionError
from weights_conversion.formats import pickles

INDEX, LENGTH = 1 << 22, 1 << 26
CRAFTED = {
    "a memo index": b"\x80\x02Nr" + INDEX.to_bytes(4, "little") + b".",  # None, put at that index
    "a claimed length of 8 bytes": b"\x80\x04\x8e" + LENGTH.to_bytes(8, "little") + b"x.",
    "a claimed length of 4 bytes": b"\x80\x04B" + LENGTH.to_bytes(4, "little") + b"x.",
}


def peak(read: Callable[[], object]) -> int:
    """Bytes that are allocated at one time while `read` runs, whether it succeeds or not."""
    tracemalloc.start()
    try:
        with contextlib.suppress(pickle.UnpicklingError, ConversionError):
            read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", CRAFTED)
def test_few_bytes_take_little_memory(name: str) -> None:
    assert peak(lambda: pickles.load(CRAFTED[name], "x.pt")) < 1 << 20


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="later Pythons bound some of it too")
@pytest.mark.parametrize("name", CRAFTED)
def test_unpickler_allocates_what_is_claimed(name: str) -> None:
    """Which is why the machine is not built on it."""
    assert peak(lambda: pickle.loads(CRAFTED[name])) >= 1 << 26
