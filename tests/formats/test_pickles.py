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


SHARED = b"(" + b"N" * 2000 + b"tq\x01"  # a tuple of 2000, which a few bytes each pass to a call


@pytest.mark.parametrize(("function", "training"), [(b"csignal\nSignals\n", False), (b"cmegatron\nAny\n", True)])
def test_calls_of_a_shared_tuple_take_no_square_of_the_time(
    function: bytes, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call goes through its arguments: they are counted, for 60 kB could take half a minute, and 1 MB hours."""
    monkeypatch.setattr(pickles, "BYTES_AT_LEAST", 0)
    data = b"\x80\x02" + function + b"q\x00" + SHARED + b"0" + b"h\x00h\x01R0" * 2000 + b"N."
    with pytest.raises(ConversionError, match="far more objects"):
        pickles.load(data, "x.pt", training=training)


def text(length: int) -> bytes:
    """The opcodes of a string of so many characters, each of which would be an object of its own in a tuple."""
    data = ("\u0100" * length).encode()
    return b"X" + len(data).to_bytes(4, "little") + data


COPIED = {
    "sizes of a string": b"ctorch\nSize\nq\x00" + text(200_000) + b"q\x01" + b"0h\x00h\x01\x85R" * 50 + b".",
    "sizes of bytes": b"ctorch\nSize\nq\x00B" + (1 << 20).to_bytes(4, "little") + bytes(1 << 20)
    + b"q\x01" + b"0h\x00h\x01\x85R" * 50 + b".",
    "items of a string": b"ccollections\nOrderedDict\n" + text(400_000) + b"\x85R.",
    "states by a call that a state brought":
        b"cmegatron\nAny\n)\x81q\x00}X\x0c\x00\x00\x00__setstate__ctorch\nSize\nsb0" + text(200_000)
        + b"q\x01" + b"0h\x00h\x01b" * 50 + b".",
}  # fmt: skip


@pytest.mark.parametrize("name", COPIED)
def test_nothing_is_copied_uncounted(name: str) -> None:
    """A string of a megabyte, which six bytes name again, made objects of ten each time."""
    assert peak(lambda: pickles.load(b"\x80\x02" + COPIED[name], "x.pt", training=True)) < 8 << 20
