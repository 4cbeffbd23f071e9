"""What the points of tests/robustness look at finds what is wrong, and lets pass what is right."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPOSITORY

from tests.robustness import access, copies, faults, points
from tests.robustness.access import Access
from tests.robustness.faults import FAIL, Fault
from tests.robustness.warm import Ended
from weights_conversion.output import descriptors, finished, place

ROOT = Path("/x/ground")
READ = f"read {ROOT}/place/out.partial/journal/digest"


def failed(sentence: str, value: int = errno.EIO, hit: str = READ, sticky: bool = False) -> str | None:
    return points.unsaid(Ended(1, f"error: {sentence}", {}, hit), ROOT, Fault("read", 1, FAIL, value, sticky))


def test_what_a_sentence_lacks() -> None:
    where = f"{ROOT}/place/out.partial"
    for named in (f"{where}/journal/digest", f"{where}/journal", f"{where}", f"'{where}/journal/digest'"):
        assert failed(f"reading {named}: Input/output error") is None
    assert failed(f"reading {where}/journal/digests: Input/output error") == "the sentence does not name the file"
    assert failed(f"reading {ROOT}/place/out: Input/output error") == "the sentence does not name the file"
    assert failed(f"{where} is not yours") == "the sentence does not say why"
    assert failed(f"{where} is not yours", errno.EACCES) is None
    assert failed(f"{ROOT}/src is gone", sticky=True) is None


@pytest.mark.parametrize(
    ("name", "value", "lost"),
    [
        ("fsync", errno.EIO, True), ("fdatasync", errno.EINVAL, True), ("fsync", errno.EINTR, False),
        ("fsyncdir", errno.EIO, True), ("fsyncdir", errno.EINVAL, False), ("write", errno.EIO, False),
    ],
)  # fmt: skip
def test_a_sync_that_failed_is_lost(name: str, value: int, lost: bool) -> None:
    assert points.is_lost(Fault("sync", 1, FAIL, value), f"{name} {ROOT}/place/out") == lost


SHARED = access.SHARED
OLD = Access(0o750, 0, 4242, SHARED, None)


@pytest.mark.parametrize(
    ("new", "said", "problem"),
    [
        (OLD, "", None),
        (replace(OLD, list=None), "cannot be kept", "gives rights"),  # the mask has become what the group may do
        (replace(OLD, list=None, mode=0o700), "cannot be kept", None),
        (replace(OLD, list=None, mode=0o700), "", "nothing says so"),
        (replace(OLD, list=None, mode=0o750, group=0), "cannot be kept", "gives rights"),
        (replace(OLD, inherited=SHARED), "", "nothing says so"),
    ],
)
def test_access_to_what_was_there(new: Access, said: str, problem: str | None) -> None:
    found = access.taken_over(OLD, new, said, True)
    assert found is None if problem is None else problem in str(found)


def test_less_access_needs_a_failure() -> None:
    assert "lost rights" in str(access.taken_over(OLD, replace(OLD, list=None, mode=0o700), "cannot be kept", False))


def test_what_a_kill_has_left_is_copied(tmp_path: Path) -> None:
    """The copies are told by the notes as what they are copied of was: which is OUT, and which run wrote it."""
    before, after, kept = (tmp_path / name for name in ("before", "after", "kept"))
    (before / "out").mkdir(parents=True)
    (before / "out" / "weights").write_text("x")
    access.dress(before / "out")
    with descriptors.folder(before / "out") as top:
        finished.mark(top, "run")
    (before / "out.partial" / "journal").mkdir(parents=True)
    found = (before / "out").stat()
    (before / "out.partial" / "journal" / "publishing").write_text(f"{found.st_ino} {found.st_uid}")
    wanted = Access.of(before / "out")
    copies.keep(before, kept)
    assert os.listdir(before) == []
    after.mkdir()
    copies.put_back(kept, after)
    assert place.is_published(after / "out.partial", after / "out")
    assert (after / "out").stat().st_ino != found.st_ino
    assert Access.of(after / "out") == wanted
    if finished._NAME in os.listxattr(after / "out"):
        note = finished.read(after / "out")
        assert note is not None
        assert note.run_digest == "run"


@pytest.mark.skipif(faults.lacking() is not None, reason=str(faults.lacking()))
@pytest.mark.parametrize(
    ("lacks", "further", "found"),
    [
        ("sync-errors", ("--kind", "sync", "--action", "fail"), "it went on after a failed sync"),
        ("mark", ("--kind", "advise"), "the rerun ended with exit 1"),
    ],
)
def test_a_broken_converter_is_found(lacks: str, further: tuple[str, ...], found: str) -> None:
    call = [sys.executable, "-m", "tests.robustness", "--case", "export", "--exactly", "--sample", "12", "--jobs", "1"]
    done = subprocess.run(
        [*call, *further, "--without", lacks], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert found in done.stdout
