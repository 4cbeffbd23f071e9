"""What a verification reads, counted: every block once, by all threads, and no archive or part looked up twice."""

from __future__ import annotations

import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from weights_conversion.errors import ConversionError
from weights_conversion.verification import dist_storage, linear, whole
from weights_conversion.verification.dist_storage import DistTensor, Part


def test_products_are_shared_among_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is asked for once, in blocks of a bounded size, by more than one thread; the product is the same."""
    monkeypatch.setattr(linear, "BLOCK_ELEMENTS", 600)
    monkeypatch.setattr(linear, "CACHED_ELEMENTS", 100)
    matrix, x = torch.randn(101, 30), torch.randn(2, 5, 30)
    wanted, asked, names = x @ matrix[3:].T, [], set()
    both = threading.Barrier(2, timeout=20)

    def weights(_: str, rows: slice | None) -> Tensor:
        assert rows is not None
        if len(asked) < 2:
            asked.append((rows.start, rows.stop))
            both.wait()  # until the second thread asks too
        else:
            asked.append((rows.start, rows.stop))
        names.add(threading.current_thread().name)
        return matrix[rows]

    with torch.inference_mode(), linear.threads(2):
        found = linear.linear(weights, "name", x, 3, 101)
        assert found.is_inference()
    asked.sort()
    assert [start for start, _ in asked] == [3, *(stop for _, stop in asked[:-1])]
    assert asked[-1][1] == 101
    assert all((stop - start) * 30 <= 600 for start, stop in asked)
    assert len(names) == 2
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(linear.linear(lambda _, rows: matrix[rows or slice(None)], "name", x, 3, 101), wanted)


def test_an_error_of_a_thread_is_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "CACHED_ELEMENTS", 10)
    with linear.threads(2), pytest.raises(ConversionError, match="name, rows 0 to 4, has shape"):
        linear.linear(lambda *_: torch.zeros(3, 3), "name", torch.zeros(1, 8), 0, 8)


def test_what_safetensors_has_mapped_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is opened anew after every so many bytes, since mapped pages count as memory."""
    monkeypatch.setattr(whole, "MAPPED_BYTES", 1024)
    tensor = torch.arange(64 * 16, dtype=torch.float32).view(64, 16)  # 4096 bytes
    save_file({"name": tensor}, tmp_path / "model.safetensors")
    opened, safe_open = [], safetensors.safe_open

    def counted(*args: Any, **kwargs: Any) -> Any:
        opened.append(args)
        return safe_open(*args, **kwargs)

    monkeypatch.setattr(safetensors, "safe_open", counted)
    weights = whole.huggingface_weights(tmp_path)
    rows = [weights("name", slice(first, first + 4)) for first in range(0, 64, 4)]  # of 256 bytes
    assert torch.equal(torch.cat(rows), tensor)
    assert len(opened) == 4


def test_parts_are_found_by_their_lead_and_archives_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers of three experts, each a part of two halves: a read opens the archives of its own expert alone."""
    tensor = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)
    parts, position = [], 0
    with (tmp_path / "__0_0.distcp").open("wb") as file:
        for layer, expert, half in ((a, b, c) for a in range(2) for b in range(3) for c in range(2)):
            torch.save(tensor[layer : layer + 1, expert : expert + 1, 2 * half : 2 * half + 2].clone(), file)
            length = file.tell() - position
            where = ((layer, expert, 2 * half, 0), (1, 1, 2, 5))
            parts.append(Part(*where, tmp_path / "__0_0.distcp", position, length))
            position += length
    stored = DistTensor(torch.float32, tuple(tensor.shape), tuple(parts))
    looked, archive = [], zipfile.ZipFile

    def counted(*args: Any) -> Any:
        looked.append(args)
        return archive(*args)

    monkeypatch.setattr(dist_storage.zipfile, "ZipFile", counted)
    for _ in range(3):
        assert torch.equal(stored.read((1, 2), 1, 4), tensor[1, 2, 1:4])
    assert len(looked) == 2
    assert torch.equal(stored.read((0, 0), 0, 4), tensor[0, 0])
    assert len(looked) == 4
    with pytest.raises(ConversionError, match="hold 0 of 20"):
        stored.read((1, 3), 0, 4)


@pytest.mark.parametrize("failure", ["absent", "refused", "rounded", None])
def test_products_by_onednn_are_tried_first(monkeypatch: pytest.MonkeyPatch, failure: str | None) -> None:
    """Where torch has none, or one that rounds its factors to bfloat16, its own product is taken; both are the same."""

    def broken(x: Tensor, matrix: Tensor) -> Tensor:
        if failure == "absent":
            raise AttributeError("_linear_pointwise")
        if failure == "refused":
            raise RuntimeError("not built with oneDNN")
        return x.bfloat16().float() @ matrix.t()

    linear._multiply.cache_clear()
    if failure is not None:
        monkeypatch.setattr(linear, "_by_onednn", broken)
    try:
        multiply = linear._multiply()
        assert failure is None or multiply is linear._by_torch
    finally:
        linear._multiply.cache_clear()
    x, matrix = torch.randn(72, 300), torch.randn(50, 300).t().contiguous().t()
    torch.testing.assert_close(multiply(x, matrix), x @ matrix.t(), rtol=1e-5, atol=1e-4)
