"""The number of threads that convert: tried in turn, and changed only where more are clearly faster."""

from __future__ import annotations

import errno
import hashlib
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
from tiny_models import MODELS, write_huggingface

import weights_conversion
from weights_conversion.engine import crew
from weights_conversion.engine.crew import Crew
from weights_conversion.engine.streams import Target
from weights_conversion.layouts.plan import Plan


class Disk:
    """A clock that each conversion of 16 MB moves on by the rate of the threads that work."""

    def __init__(self, rates: dict[int, list[float]]) -> None:
        """`rates`: of each number of threads, in GB/s, window by window."""
        self.now, self._rates = 0.0, rates

    def __call__(self) -> float:
        return self.now

    def convert(self, one: Crew, nbytes: int) -> None:
        windows = self._rates[one.limit]
        before = one.limit
        self.now += (16 << 20) / (windows[0] * 1e9)
        one.count(nbytes)
        if one.limit != before and len(windows) > 1:
            windows.pop(0)


def tried(rates: dict[int, list[float]]) -> Crew:
    disk = Disk(rates)
    one = Crew(2, 8 << 30, disk)
    for _ in range(80):
        disk.convert(one, 16 << 20)
    return one


def test_more_streams_stay_where_they_are_faster() -> None:
    one = tried({4: [1.0], 6: [1.9]})
    assert (one.limit, one.admits(5)) == (6, True)
    assert one.says() == ("6 threads, as measured on the first gigabyte: 4 converted 1.00 GB/s, 6 converted 1.90 GB/s")


@pytest.mark.parametrize("rates", [{4: [1.0], 6: [1.05]}, {4: [1.0, 3.0], 6: [2.0]}, {4: [1.5], 6: [0.9]}])
def test_a_disk_that_varies_changes_nothing(rates: dict[int, list[float]]) -> None:
    """A small gain, one that its own variation explains, and a loss."""
    one = tried(rates)
    assert (one.limit, one.admits(3), one.admits(4)) == (4, True, False)


def test_small_outputs_are_not_tried_upon() -> None:
    one = Crew(2, 1 << 30)
    assert (one.limit, one.most, one.says()) == (4, 4, "")


def test_who_waits_is_sent_away_at_the_end() -> None:
    one, said = Crew(1, 8 << 30), list[bool]()
    waiting = threading.Thread(target=lambda: said.append(one.admits(3)))
    waiting.start()
    one.end()
    waiting.join()
    assert said == [False]


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_trial_leaves_every_byte_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_huggingface(tmp_path / "model", MODELS["llama2-gqa"])
    weights_conversion.hf_to_megatron("llama2", tmp_path / "model", out=tmp_path / "out", workers=2)
    once = digests(tmp_path / "out")
    for name in ("LEAST_BYTES", "SETTLE_BYTES", "WINDOW_BYTES"):
        monkeypatch.setattr(crew, name, 1)
    monkeypatch.setattr(Plan.chunks, "__defaults__", (4096,))
    report = weights_conversion.hf_to_megatron("llama2", tmp_path / "model", out=tmp_path / "tried", workers=2)
    assert digests(tmp_path / "tried") == once
    assert any("threads, as measured on the first gigabyte" in note for note in report.notes)


@pytest.mark.parametrize("window", [1, 1 << 30])
def test_a_failure_within_a_trial_ends_all_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    """Those that wait for their turn too; whichever number of threads is being tried."""
    write_huggingface(tmp_path / "model", MODELS["llama2-gqa"])
    for name, value in (("LEAST_BYTES", 1), ("SETTLE_BYTES", 1), ("WINDOW_BYTES", window)):
        monkeypatch.setattr(crew, name, value)
    monkeypatch.setattr(Plan.chunks, "__defaults__", (4096,))
    write, count = Target.write, itertools.count()

    def failing(*arguments: Any) -> None:
        if next(count) == 9:
            raise OSError(errno.EIO, "input/output error")
        write(*arguments)

    monkeypatch.setattr(Target, "write", failing)
    with pytest.raises(OSError, match="input/output error"):
        weights_conversion.hf_to_megatron("llama2", tmp_path / "model", out=tmp_path / "out", workers=2)
    assert not [each for each in threading.enumerate() if each.name.startswith("convert")]
