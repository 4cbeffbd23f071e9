"""What is written gets onto the disk beside the work, and is noted only then; how often a run waits for the disk."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models as tm
import torch
from conftest import Script

from weights_conversion.layouts.placement import TensorRef, Written
from weights_conversion.output import durability, finishing
from weights_conversion.output.durability import Durability
from weights_conversion.output.journal import Journal
from weights_conversion.output.together import together

ONE, TWO = (TensorRef(f"{name}.pt", "a", torch.float32, (4, 4)) for name in ("one", "two"))
PATIENCE = 30.0  # seconds, after which a test has failed


class Synced:
    """Files whose syncs are noted, with what the journal says of them then; a sync may wait, or fail."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.fails = folder, [], False
        self.may, self.begun = threading.Event(), threading.Semaphore(0)
        self.may.set()

    def sync(self, file: str) -> None:
        self.begun.release()
        assert self.may.wait(PATIENCE)
        if self.fails:
            raise OSError(errno.EIO, "lost", file)
        self.calls.append((file, noted(self.folder)))

    def close(self) -> None:
        pass


def noted(folder: Path) -> list[int]:
    return sorted(Journal(folder, [ONE, TWO]).load())


def whole(ref: TensorRef) -> list[Written]:
    return [Written(ref, 0, ref.nbytes, 1)]


@pytest.fixture
def files(tmp_path: Path) -> Synced:
    return Synced(tmp_path)


@pytest.fixture
def held(files: Synced, tmp_path: Path) -> Durability:
    return Durability(Journal(tmp_path, [ONE, TWO]), files, [ONE.file, TWO.file])


def test_entries_follow_the_sync_of_their_data(held: Durability, files: Synced, tmp_path: Path) -> None:
    """And only what was written since is synced."""
    held.add(0, whole(ONE))
    held.flush()
    held.add(1, whole(TWO))
    held.flush()
    held.flush()
    assert files.calls == [("one.pt", []), ("two.pt", [0])]
    assert noted(tmp_path) == [0, 1]


def test_the_layout_is_durable_before_the_run_can_be_continued(files: Synced, tmp_path: Path) -> None:
    said: list[str] = []
    journal = Journal(tmp_path, [ONE, TWO])

    def note() -> None:
        said.append(f"digest after {len(files.calls)} files")

    held = Durability(journal, files, [ONE.file, TWO.file], [lambda: said.append("folders")], note)
    held.flush()
    held.add(0, whole(ONE))
    held.flush()
    assert sorted(said) == ["digest after 2 files", "folders"]
    assert sorted(file for file, _ in files.calls) == ["one.pt", "one.pt", "two.pt"]


def test_after_a_failed_sync_nothing_is_noted(held: Durability, files: Synced, tmp_path: Path) -> None:
    """The kernel says once that data are lost: a later sync that succeeds vouches for nothing."""
    held.add(0, whole(ONE))
    held.flush()
    files.fails = True
    held.add(1, whole(TWO))
    with pytest.raises(OSError, match="lost"):
        held.flush()
    files.fails = False
    held.add(2, whole(ONE))
    held.flush()
    assert noted(tmp_path) == [0]


def test_work_goes_on_while_a_sync_waits(held: Durability, files: Synced, tmp_path: Path, often: None) -> None:
    """What is added meanwhile waits for the next one."""
    files.may.clear()
    with held:
        held.add(0, whole(ONE))
        assert files.begun.acquire(timeout=PATIENCE)
        held.add(1, whole(TWO))
        assert noted(tmp_path) == []
        files.may.set()
        held.stop()
        held.flush()
    assert files.calls[0] == ("one.pt", [])
    assert noted(tmp_path) == [0, 1]


def test_an_error_of_the_thread_ends_the_work(held: Durability, files: Synced, tmp_path: Path, often: None) -> None:
    files.fails = True

    def work() -> None:
        with held:
            held.add(0, whole(ONE))
            assert files.begun.acquire(timeout=PATIENCE)
            held.stop()

    with pytest.raises(OSError, match="lost"):
        work()
    with pytest.raises(OSError, match="lost"):
        held.add(1, whole(TWO))
    assert noted(tmp_path) == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_what_is_written_is_noted_whatever_ends_the_work(kind, held: Durability, tmp_path: Path) -> None:

    def work() -> None:
        with held:
            held.add(0, whole(ONE))
            raise kind

    with pytest.raises(kind):
        work()
    assert noted(tmp_path) == [0]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durability, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(durability, "SYNC_SECONDS", 0.0)


def test_tasks_at_one_time_and_their_first_error() -> None:
    meet, done = threading.Barrier(3, timeout=PATIENCE), []
    together([meet.wait] * 3)  # none would come back if they ran one after the other
    together([lambda number=number: done.append(number) for number in range(9)], threads=1)
    assert done == list(range(9))

    def fails(text: str) -> Callable[[], None]:
        def task() -> None:
            meet.wait()
            raise OSError(text)

        return task

    with pytest.raises(OSError, match="first"):
        together([fails("first"), fails("second"), meet.wait], threads=3)
    with pytest.raises(ZeroDivisionError):
        together([lambda: 1 / 0, lambda: done.append(9)], threads=1)
    assert done == list(range(9)), "none is begun after an error"


# --- a whole run ------------------------------------------------------------------------------------------------------


class Rounds:
    """An fsync that lasts until no further one has begun for a moment: how often one waits for another is counted."""

    def __init__(self, fsync: Callable[[int], None]) -> None:
        self._fsync, self._changed, self.count, self._arrived = fsync, threading.Condition(), 0, 0

    def __call__(self, descriptor: int) -> None:
        with self._changed:
            self._arrived += 1
            mine, seen = self.count, -1
            while mine == self.count and seen != self._arrived:
                seen = self._arrived
                self._changed.wait(0.1)
            if mine == self.count:
                self.count += 1
                self._changed.notify_all()
        self._fsync(descriptor)


@pytest.mark.parametrize(("layout", "most"), [((1, 1), 6), ((8, 4), 13)])
def test_how_often_a_run_waits_for_the_disk(
    layout: tuple[int, int], most: int, to_megatron: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Whatever one fsync costs, a run costs a few of them more, and not one for each file."""
    model = tm.Tiny("wide", "llama2", layers=4, hidden=128, ffn=256, heads=8, groups=8)
    source = tm.write_huggingface(tmp_path / "hf", model, tokenizer=False)
    rounds = Rounds(os.fsync)
    monkeypatch.setattr(os, "fsync", rounds)
    tp, pp = map(str, layout)
    line = ("--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp)
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out", *line).succeeded()
    assert 0 < rounds.count <= most


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> str:
    """fsync of one of the files of tensors fails, in whatever thread."""
    fsync, name = os.fsync, "mp_rank_00/model_optim_rng.pt"

    def fails(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(name):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    return name


@pytest.mark.parametrize("when", ["at the end", "beside the work"])
def test_a_failing_sync_ends_the_run(
    when: str, failing: str, sources, to_megatron: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request
) -> None:  # fmt: skip
    """With the file's name, and nothing is published."""
    if when == "beside the work":
        request.getfixturevalue("often")
        monkeypatch.setattr(finishing, "finish", lambda *_, **__: pytest.fail("the thread's error was not heard"))
        waited = threading.Event()
        real = Durability.stop
        monkeypatch.setattr(Durability, "stop", lambda self: (waited.wait(1.0), real(self)))
    result = to_megatron("llama2", "--model-path", sources("llama2-gqa"), "--out", tmp_path / "out")
    assert result.code == 1
    assert f"syncing {tmp_path / 'out.partial' / 'checkpoint' / 'release' / failing}: Input/output error" in result.text
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial" / "journal").iterdir())
