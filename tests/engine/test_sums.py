"""SHA-256 sums that are taken of what is written, in whatever order it comes."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch

import hf_to_megatron
import megatron_to_hf
from weights_conversion.engine.sums import RunningSums, Taped
from weights_conversion.errors import ConversionError
from weights_conversion.layouts.placement import TensorRef

HEADER = 11
GO_ON = threading.Event()


class File:
    """A file of int8 tensors behind a header, that takes writes."""

    def __init__(self, folder: Path, name: str, sizes: list[int]) -> None:
        self.path, self.name = folder / name, name
        self.refs = [TensorRef(name, f"t{number}", torch.int8, (size,)) for number, size in enumerate(sizes)]
        self.content = os.urandom(HEADER + sum(sizes))
        self.offsets: dict[TensorRef, int] = {}
        at = HEADER
        for ref, size in zip(self.refs, sizes, strict=True):
            self.offsets[ref], at = at, at + size
        self.path.write_bytes(self.content[:HEADER] + bytes(sum(sizes)))

    def write(self, ref: TensorRef, start: int, data: torch.Tensor) -> None:
        with self.path.open("r+b") as file:
            file.seek(self.offsets[ref] + start)
            file.write(bytes(data.view(torch.uint8).tolist()))

    def piece(self, ref: TensorRef, start: int, stop: int) -> tuple[TensorRef, int, torch.Tensor]:
        at = self.offsets[ref]
        return ref, start, torch.frombuffer(bytearray(self.content[at + start : at + stop]), dtype=torch.int8)

    def sum(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    """Begins sums of some files."""
    begun: list[RunningSums] = []
    folder = os.open(tmp_path, os.O_RDONLY)

    def begin(*files: File) -> RunningSums:
        offsets = {ref: at for file in files for ref, at in file.offsets.items()}
        begun.append(RunningSums(folder, tmp_path, offsets))
        return begun[-1]

    yield begin
    for each in begun:
        each.close()
    os.close(folder)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each read from now on."""
    fill, found = RunningSums._fill, list[int]()

    def count(self: RunningSums, *asked: Any) -> int:
        found.append(fill(self, *asked))
        return found[-1]

    monkeypatch.setattr(RunningSums, "_fill", count)
    return found


def test_what_comes_in_order_is_not_read_back(tmp_path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = File(tmp_path, "f", [100, 60])
    sums = opened(file)
    read = counted(monkeypatch)
    for turn, (ref, start, stop) in enumerate([(0, 0, 40), (0, 40, 100), (1, 0, 60)]):
        file.write(*file.piece(file.refs[ref], start, stop))
        sums.take(turn, [file.piece(file.refs[ref], start, stop)])
    assert sums.finish("f", GO_ON) == file.sum()
    assert read == [HEADER]


def test_what_comes_early_is_read_back_alone(tmp_path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As gate and up do: two chunks, each with half of both, and then a third tensor."""
    file = File(tmp_path, "f", [100, 60, 30])
    first, second, third = file.refs
    sums = opened(file)
    read = counted(monkeypatch)
    pieces = [[(first, 0, 50), (second, 0, 30)], [(first, 50, 100), (second, 30, 60)], [(third, 0, 30)]]
    for turn, chunk in enumerate(pieces):
        for piece in chunk:
            file.write(*file.piece(*piece))
        sums.take(turn, [file.piece(*piece) for piece in chunk])
    assert sums.finish("f", GO_ON) == file.sum()
    assert read == [HEADER, 30]  # the second half of `second` comes when it is due


def test_what_never_comes_is_read_at_the_end(tmp_path: Path, opened: Any) -> None:
    file = File(tmp_path, "f", [100, 60])
    file.path.write_bytes(file.content)
    sums = opened(file)
    sums.take(0, [file.piece(file.refs[1], 10, 20)])
    assert sums.finish("f", GO_ON) == file.sum()
    assert sums.finish("other", GO_ON) is None


@pytest.mark.parametrize("seed", range(20))
def test_any_order_on_any_thread(tmp_path: Path, opened: Any, seed: int) -> None:
    """Chunks of random pieces, of two files, handed in by eight threads in any order of time."""
    chance = random.Random(seed)
    files = [File(tmp_path, name, [chance.randrange(1, 9000) for _ in range(9)]) for name in ("a", "b")]
    pieces = []
    for file in files:
        for ref in file.refs:
            cuts = sorted({0, ref.nbytes, *(chance.randrange(ref.nbytes) for _ in range(4))})
            pieces += [(file, ref, start, stop) for start, stop in itertools.pairwise(cuts)]
    if seed % 2:
        chance.shuffle(pieces)
    chunks = [pieces[at : at + 3] for at in range(0, len(pieces), 3)]
    sums = opened(*files)

    def convert(turn: int) -> None:
        written = []
        for file, *which in chunks[turn]:
            sink = Taped(file)
            sink.write(*file.piece(*which))
            written += sink.taken()
            assert sink.taken() == []
        sums.take(turn, written)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(convert, turn) for turn in range(len(chunks))]:
            done.result(30)
    assert [sums.finish(file.name, GO_ON) for file in files] == [file.sum() for file in files]


def test_nobody_waits_for_a_turn_that_will_not_come(tmp_path: Path, opened: Any) -> None:
    file = File(tmp_path, "f", [100])
    sums = opened(file)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(sums.take, 1, [file.piece(file.refs[0], 50, 100)])
        assert not waiting.done()
        sums.end()
        waiting.result(30)


def test_a_long_read_ends_with_the_run(tmp_path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written ahead is read back piece by piece, and no further once another thread has failed."""
    monkeypatch.setattr("weights_conversion.engine.sums.READ_BYTES", 10)
    file = File(tmp_path, "f", [10, 1000])
    file.path.write_bytes(file.content)
    sums, fill, read = opened(file), RunningSums._fill, list[int]()

    def slow(self: RunningSums, *asked: Any) -> int:
        read.append(fill(self, *asked))
        if sum(read) > HEADER + 100:
            sums.end()
        return read[-1]

    monkeypatch.setattr(RunningSums, "_fill", slow)
    sums.take(0, [file.piece(file.refs[1], 0, 1000)])
    sums.take(1, [file.piece(file.refs[0], 0, 10)])
    assert sum(read) < HEADER + 200


def test_files_are_closed_when_they_are_summed(tmp_path: Path, opened: Any) -> None:
    """An export has hundreds of them, and a process may have few descriptors."""
    files = [File(tmp_path, f"f{number}", [100, 60]) for number in range(20)]
    sums, before = opened(*files), len(os.listdir("/proc/self/fd"))
    for turn, file in enumerate(files):
        file.path.write_bytes(file.content)
        first, second = file.refs
        sums.take(turn, [file.piece(second, 0, 60), file.piece(first, 0, 100)])
        assert len(os.listdir("/proc/self/fd")) == before
    assert [sums.finish(file.name, GO_ON) for file in files] == [file.sum() for file in files]
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_a_thread_it_reads_by_itself(tmp_path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weights_conversion.engine.sums.READ_BYTES", 50)

    def refused(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    file = File(tmp_path, "f", [100, 60])
    file.path.write_bytes(file.content)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", refused)
    assert opened(file).finish("f", GO_ON) == file.sum()


CUT_OFF = r"f ends at byte 111; somebody has cut it off"


def test_a_file_that_is_cut_off_is_named(tmp_path: Path, opened: Any) -> None:
    file = File(tmp_path, "f", [100, 60])
    sums = opened(file)
    file.path.write_bytes(file.content[: HEADER + 100])
    sums.take(0, [file.piece(file.refs[1], 0, 60)])
    with pytest.raises(ConversionError, match=CUT_OFF):
        sums.take(1, [file.piece(file.refs[0], 0, 100)])


def test_a_file_that_is_cut_off_later_is_named(tmp_path: Path, opened: Any) -> None:
    """When all of it has been summed from memory."""
    file = File(tmp_path, "f", [100, 60])
    sums = opened(file)
    file.path.write_bytes(file.content)
    sums.take(0, [file.piece(file.refs[0], 0, 100), file.piece(file.refs[1], 0, 60)])
    file.path.write_bytes(file.content[: HEADER + 100])
    with pytest.raises(ConversionError, match=CUT_OFF):
        sums.finish("f", GO_ON)


def test_sums_of_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """In many chunks and three files, on several threads; each sum is the file's own, and most was not read back."""
    model = replace(tm.MODELS["llama2-gqa"], layers=4)
    hf = tm.write_huggingface(tmp_path / "hf", model)
    four = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
    assert hf_to_megatron.main(["llama2", "--model-path", str(hf), "--out", str(tmp_path / "mt"), *four]) == 0
    monkeypatch.setattr("weights_conversion.layouts.plan.Plan.chunks", small_chunks())
    read = counted(monkeypatch)
    line = ["--input_dir", str(tmp_path / "mt"), "--output_dir", str(tmp_path / "out"), "--num_output_shards", "3"]
    assert megatron_to_hf.main([*line, "--checksums", "--workers", "3"]) == 0
    lines = (tmp_path / "out" / "checksums.sha256").read_text().splitlines()
    sums = {name: value for value, _, name in (line.partition("  ") for line in lines)}
    weights = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(weights) == 3
    for path in weights:
        assert sums[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sum(read) < sum(path.stat().st_size for path in weights) / 2


def small_chunks() -> Any:
    from weights_conversion.layouts.plan import Plan

    chunks = Plan.chunks
    return lambda self: chunks(self, 8192)
