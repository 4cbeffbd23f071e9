"""Reading ranges of stored tensors, writing them, and the memory that both reuse."""

from __future__ import annotations

from pathlib import Path

import torch

from weights_conversion.engine.streams import Scratch, Source, bytes_of
from weights_conversion.layouts.placement import PAGE, TensorRef


def test_scratch_is_on_pages_and_reused() -> None:
    scratch = Scratch()
    first, second = scratch.take((3, 5), torch.float32), scratch.take((7,), torch.bfloat16)
    assert (first.shape, first.dtype, second.shape, second.dtype) == ((3, 5), torch.float32, (7,), torch.bfloat16)
    assert first.data_ptr() % PAGE == second.data_ptr() % PAGE == 0
    assert second.data_ptr() - first.data_ptr() == PAGE
    at = first.data_ptr()
    scratch.reset()
    assert scratch.take((3, 5), torch.float32).data_ptr() == at


def test_bytes_of_are_the_tensors_own() -> None:
    tensor = torch.tensor([1, 2], dtype=torch.int16)
    assert bytes(bytes_of(tensor)) == b"\x01\x00\x02\x00"
    bytes_of(tensor)[0] = 7
    assert tensor.tolist() == [7, 2]


def test_source_reads_from_a_byte_of_a_tensor(tmp_path: Path) -> None:
    """A tensor that begins at byte 4 of its file, from its third element on."""
    (tmp_path / "f").write_bytes(b"head" + bytes([10, 0, 20, 0, 30, 0, 40, 0]) + b"tail")
    ref = TensorRef(str(tmp_path / "f"), "w", torch.int16, (4,), 4)
    source, into = Source(), torch.zeros(2, dtype=torch.int16)
    try:
        source.read(ref, 4, into)
    finally:
        source.close()
    assert into.tolist() == [30, 40]
