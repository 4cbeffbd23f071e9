"""Pickles taken apart as the standard library's own disassembler does it."""

from __future__ import annotations

import io
import pickle
import pickletools
import random
import re
import zipfile
from collections.abc import Callable, Iterable

import pytest
import torch

from weights_conversion.errors import ConversionError
from weights_conversion.formats import pickles
from weights_conversion.formats.pickle_opcodes import operations


def saved() -> bytes:
    """The pickle of what torch.save writes."""

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


def outcome(data: bytes) -> str:
    """What `load` makes of a pickle, or why it refuses it."""
    try:
        return repr(pickles.load(data, "file"))
    except ConversionError as error:
        return re.sub(r" at 0x\w+", "", str(error))


def damaged(data: bytes) -> Iterable[bytes]:
    """The pickle, cut off anywhere, and with one byte changed."""
    yield data
    yield from (data[:end] for end in range(0, len(data) - 1, max(len(data) // 97, 1)))
    rng = random.Random(0)
    for _ in range(300):
        place = rng.randrange(len(data))
        yield data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]


@pytest.mark.parametrize("data", PICKLES, ids=["torch", *map(str, range(6))])
def test_the_quick_way_has_the_same_outcome(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is whole, and of what is damaged; without it every operation is taken apart by the slow way."""
    quick = [outcome(each) for each in damaged(data)]
    monkeypatch.setattr(pickles, "CERTAIN", 1 << 40)
    slow = [outcome(each) for each in damaged(data)]
    assert sum("damaged pickle" in said for said in slow) > 50
    for one, other in zip(quick, slow, strict=True):
        assert one.partition(" holds a damaged pickle")[:2] == other.partition(" holds a damaged pickle")[:2]


def test_a_state_dict_is_read_the_quick_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 512 ranks it is thirty million operations: only a few of each file go the slow way."""
    slow: list[str] = []
    plain = pickles.Operations.next

    def noted(self: pickles.Operations) -> tuple[str, object]:
        found = plain(self)
        slow.append(found[0])
        return found

    monkeypatch.setattr(pickles.Operations, "next", noted)
    buffer = io.BytesIO()
    torch.save({"model": {f"layers.{n}.weight": torch.zeros(n, 300) for n in range(400)}}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        found = pickles.load(archive.read("archive/data.pkl"), "file")
    assert [tensor.shape for tensor in found["model"].values()] == [(n, 300) for n in range(400)]
    assert len(slow) < 40
