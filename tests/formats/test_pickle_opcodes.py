"""Pickles taken apart as the standard library's own disassembler does it."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Iterable

import pytest
import torch

from weights_conversion.formats.pickle_opcodes import operations


def saved() -> bytes:
    """The pickle of what torch.save writes."""
    import zipfile

    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3, dtype=torch.bfloat16), "b": [1, -5, 1 << 40, 1 << 90, 0.5, None, True]}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


OBJECT = {"text": "x" * 300, "bytes": b"y" * 300, "numbers": [*range(300), -1, 1 << 33, 2.5], "more": ({1, 2}, ("a",))}
PICKLES = [saved(), *(pickle.dumps(OBJECT, protocol) for protocol in range(6))]


@pytest.mark.parametrize("data", PICKLES, ids=["torch", *map(str, range(6))])
def test_operations_are_those_of_the_standard_library(data: bytes) -> None:
    wanted = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(data)]
    assert list(operations(data)) == wanted


def refusal(take_apart: Callable[[bytes], Iterable[object]], data: bytes) -> str:
    with pytest.raises(ValueError, match=r"\w") as found:
        list(take_apart(data))
    return str(found.value)


@pytest.mark.parametrize("data", PICKLES, ids=["torch", *map(str, range(6))])
def test_what_is_cut_off_is_refused_in_the_same_words(data: bytes) -> None:
    for end in range(0, len(data) - 1, max(len(data) // 97, 1)):
        assert refusal(operations, data[:end]) == refusal(pickletools.genops, data[:end])


def test_an_unknown_opcode_is_named() -> None:
    with pytest.raises(ValueError, match=r"at position 2, opcode b'\\xff' unknown"):
        list(operations(b"\x80\x02\xff."))
