"""The benchmark's own parts: what it measures is what it says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import contenders, raw, report, simulate, slow
from benchmarks.measure import REPOSITORY
from benchmarks.shapes import SHAPES


def run_of(name: str, setting: str, number: int, seconds: float) -> dict[str, object]:
    costs = dict.fromkeys(("user", "system", "resident", "private", "storage_read", "storage_written"), 1)
    return {"name": name, "setting": setting, "round": number, "seconds": seconds, **costs}


def test_ratios_are_to_the_limit_of_the_same_round_and_setting() -> None:
    seconds = {
        ("raw-write", "warm"): (1, 2, 4), ("import-tp1", "warm"): (2, 4, 4), ("start-up", "warm"): (1, 1, 1),
        ("raw-copy", "cold"): (5, 5, 5), ("import-tp1", "cold"): (5, 10, 15),
    }  # fmt: skip
    runs = [run_of(*key, number, value) for key, values in seconds.items() for number, value in enumerate(values)]
    summary = report.summarise({"cap": 1e9, "runs": runs})
    assert summary["warm"]["import-tp1"]["ratios"] == [2, 2, 1]
    assert summary["warm"]["import-tp1"]["ratio"] == 2
    assert summary["warm"]["import-tp1"]["ratio_started"] == (4 - 1) / 2
    assert (summary["cold"]["import-tp1"]["ratio"], summary["cold"]["import-tp1"]["added"]) == (2, 10 - 4)


def test_pages_get_what_was_measured(tmp_path: Path) -> None:
    """Between their marks, within a line or on lines of their own."""
    page = tmp_path / "page.md"
    for before, after in (
        ("a <!-- measured -->x<!-- /measured --> b", "a <!-- measured -->y<!-- /measured --> b"),
        ("<!-- measured -->\nx\n<!-- /measured -->", "<!-- measured -->\ny\n<!-- /measured -->"),
    ):
        page.write_text(before)
        report.update(page, "y")
        assert page.read_text() == after
    for page in ("README.md", "docs/speed.md"):
        text = (REPOSITORY / page).read_text()
        assert [text.count(mark) for mark in report.MARKS] == [1, 1]


def test_slow_runs_are_few() -> None:
    """What is promised runs in every round; its limits with it."""
    assert contenders.rounds_of("warm", "import-tp1", 5) == contenders.rounds_of("warm", "raw-write", 5) == 5
    assert contenders.rounds_of("cold", "raw-copy", 5) == 5
    assert contenders.rounds_of("sync", "import-tp1", 5) == contenders.rounds_of("cold", "verify", 5) == 5
    assert contenders.rounds_of("warm", "layout", 5) == 2
    assert contenders.rounds_of("cap", "export-1", 5) == contenders.rounds_of("cap", "raw-write", 5) == 1


def test_raw_copies_and_writes(tmp_path: Path) -> None:
    """Every byte of every file, of whatever size."""
    (tmp_path / "in" / "a").mkdir(parents=True)
    contents = [os.urandom(size) for size in (1, 4096, raw.PIECE + 5)]
    for name, content in zip(("a/x", "a/y", "z"), contents, strict=True):
        (tmp_path / "in" / name).write_bytes(content)
    raw.copy(tmp_path / "out", [tmp_path / "in"])
    copied, at = (tmp_path / "out").read_bytes(), 0
    for content in contents:
        assert copied[at : at + len(content)] == content
        at += -(-len(content) // raw.PAGE) * raw.PAGE
    assert len(copied) == at
    raw.write(tmp_path / "written", raw.PIECE + 1)
    assert (tmp_path / "written").stat().st_size == raw.PIECE + raw.PAGE


def test_every_limit_is_measured() -> None:
    names = {one.name for one in contenders.contenders(SHAPES["tiny"])}
    assert {one.limit for one in contenders.contenders(SHAPES["tiny"])} - {None} <= names
    assert {setting.limit for setting in contenders.settings(1e9)} <= names


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LD_PRELOAD")
def test_a_slower_disk(tmp_path: Path) -> None:
    """Its time comes from a clock of its own, which says at least what was asked for."""
    library = slow.Library(tmp_path)
    program = f"import os; d = os.open({str(tmp_path / 'x')!r}, os.O_CREAT | os.O_RDWR); os.write(d, bytes(1 << 20))"
    for code, asked, least in (
        (program, slow.Slow(rate=5e6), 0.1),
        (f"{program}; os.fsync(d)", slow.Slow(sync_seconds=0.3), 0.3),
    ):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", code], env=library.environment(asked), check=True)
        assert time.monotonic() - began > least


def test_simulated_conversions_take_what_their_slowest_part_takes() -> None:
    """One thread: its own calls one after the other. Many ranks: the servers' rate, or one server's."""
    gigabyte = 10**9
    model = simulate.Model("m", 4 * gigabyte, 4 * gigabyte, 4, 4)
    node = simulate.Node(threads=1)
    fast = simulate.Filesystem("fast", 100, 1000 * gigabyte, latency=0.0)
    alone = 4 * gigabyte * (2 / node.stream + 1 / node.arithmetic)
    assert simulate.convert(model, fast, node, 1) == pytest.approx(alone, rel=0.1)
    slow_one = simulate.Filesystem("slow", 4, gigabyte, latency=0.0)
    assert simulate.convert(model, slow_one, node, 16) == pytest.approx(8 / 4, rel=0.1)
    narrow = simulate.Filesystem("narrow", 1, gigabyte, latency=0.0)
    assert simulate.convert(model, narrow, node, 16) == pytest.approx(8, rel=0.1)


def test_where_ranks_stop_helping() -> None:
    assert simulate.stops_helping({1: 100, 2: 50, 4: 46, 8: 60}) == 2
