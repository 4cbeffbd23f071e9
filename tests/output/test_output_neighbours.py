"""Other users in the folder of OUT: nothing of the user's outside of it changes, nothing foreign is published.

Real user ids: forked children become user A, who converts, and B, who interferes.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
from neighbours import GROUP, A, B, Place, as_user, contents

from weights_conversion.output import finishing

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be several users")


def make(path: Path, content: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def empty(place: Place) -> None:
    place.partial.mkdir()


def linked_checkpoint(place: Place) -> None:
    place.partial.mkdir()
    (place.partial / "journal").mkdir()
    (place.partial / "checkpoint").symlink_to(place.home / "mine")


def linked_journal(place: Place) -> None:
    place.partial.mkdir()
    (place.partial / "journal").symlink_to(place.home / "mine")


def linked_notes(place: Place) -> None:
    for name in ("digest", "digest.new", "publishing", "publishing.new", "chunks.0"):
        (place.partial / "journal").mkdir(parents=True, exist_ok=True)
        (place.partial / "journal" / name).symlink_to(place.home / ".bashrc")


def linked_files(place: Place) -> None:
    (place.partial / "checkpoint").mkdir(parents=True)
    for name in ("conversion_manifest.json", "tokenizer.model", "latest_checkpointed_iteration.txt"):
        (place.partial / "checkpoint" / name).symlink_to(place.home / ".bashrc")


def linked_partial(place: Place) -> None:
    place.partial.symlink_to(place.home / "mine")


def linked_lock(place: Place) -> None:
    place.partial.mkdir()
    (place.partial / "lock").symlink_to(place.home / ".bashrc")


def pipes(place: Place) -> None:
    (place.partial / "journal").mkdir(parents=True)
    for name in ("lock", "journal/digest", "journal/publishing", "journal/chunks.0"):
        os.mkfifo(place.partial / name)


def finished(place: Place) -> None:
    """His finished output, with a note that it is about to be renamed."""
    shutil.copytree(place.reference, place.partial / "checkpoint")
    make(place.partial / "journal" / "digest", "d")
    make(place.partial / "journal" / "publishing", str((place.partial / "checkpoint").stat().st_ino))


def published(place: Place) -> None:
    """His OUT, by its inode in the note, in the old form of it and in the present one."""
    shutil.copytree(place.reference, place.out)
    inode = place.out.stat().st_ino
    make(place.partial / "journal" / "digest", "d")
    make(place.partial / "journal" / "publishing", f"{inode} {B}")


LEFT = [
    empty, linked_checkpoint, linked_journal, linked_notes, linked_files, linked_partial, linked_lock, pipes, finished,
    published,
]  # fmt: skip


def open_to_all(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o777)


@pytest.mark.parametrize("make", LEFT, ids=lambda make: make.__name__)
@pytest.mark.parametrize("options", [(), ("--overwrite", "--verify", "--checksums")])
def test_what_another_user_left_is_refused(make, options: tuple[str, ...], place: Place) -> None:
    """In /scratch (sticky, for all to write in) B has made OUT.partial beforehand."""
    place.mode(0o1777)

    def plant() -> None:
        make(place)
        if not place.partial.is_symlink():
            open_to_all(place.partial)

    code, said = as_user(B, 0, plant)
    if code and "PermissionError" in said:  # he may not look into A's home, so plant it for him
        plant()
    else:
        assert not code, said
    for path in (place.partial, *place.partial.rglob("*"), place.out, *place.out.rglob("*")):
        if path.exists() or path.is_symlink():
            os.lchown(path, B, GROUP)
    before = contents(place.folder)
    found = place.converts(*options).refused("out")
    assert "move it away" in found.err or "another place" in found.err or "name another" in found.err
    assert contents(place.folder) == before


@pytest.mark.parametrize("mode", [0o777, 0o2775])
@pytest.mark.parametrize(
    "make", [empty, pipes, linked_checkpoint, linked_notes, linked_files], ids=lambda f: f.__name__
)
def test_planted_in_a_partial_that_was_open(make, mode: int, place: Place) -> None:
    """A's own, which an older release or A left open to others: nothing in it is trusted or followed."""
    place.mode(0o2775)
    make(place)
    for path in place.partial.rglob("*"):
        os.lchown(path, B, GROUP)
    os.chown(place.partial, A, GROUP)
    place.partial.chmod(mode)
    found = place.converts()
    if make is empty:
        found.succeeded()
        place.is_right()
    else:
        found.refused("no conversion wrote", "move it away")
        assert not place.out.exists()


def test_a_lock_held_by_another_user(place: Place) -> None:
    """Taken through a descriptor that only reads, on a lock in a folder that A had left open."""
    place.mode(0o2775)
    place.partial.mkdir()
    make(place.partial / "lock")
    for path in (place.partial, place.partial / "lock"):
        os.chown(path, A, GROUP)
    with (place.partial / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        place.converts().succeeded()
    place.is_right()


def test_nothing_can_be_planted_during_the_work(place: Place) -> None:
    """A's group may write in the folder, and umask 002 lets it into what A makes; not into OUT.partial."""
    place.mode(0o2775)
    real = finishing.finish

    def waits(*arguments, **keywords) -> None:
        marker = place.folder / "ready"
        marker.touch()
        while marker.exists():
            time.sleep(0.01)
        real(*arguments, **keywords)

    def plant() -> str:
        while not (place.folder / "ready").exists():
            time.sleep(0.01)
        refused = 0
        for name in ("checkpoint/conversion_manifest.json", "journal/publishing", "lock", "x"):
            try:
                (place.partial / name).symlink_to(place.home / ".bashrc")
            except PermissionError:
                refused += 1
        (place.folder / "ready").unlink()
        return f"{refused} refused, mode {stat.S_IMODE(place.partial.stat().st_mode):o}"

    def patched() -> None:
        finishing.finish = waits

    child = os.fork()
    if not child:
        signal.alarm(60)
        code, said = as_user(B, 0o002, plant)
        sys.stderr.write(said)
        os._exit(code if said == "4 refused, mode 2700" else 1)
    place.converts(before=patched).succeeded()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    place.is_right()
    assert stat.S_IMODE(place.out.stat().st_mode) == 0o2775


@pytest.mark.parametrize("when", ["moved away", "replaced by B's", "parent moved"])
def test_folders_exchanged_during_the_work(when: str, place: Place) -> None:
    """In a group folder without the sticky bit B may rename OUT.partial: then nothing of B's is published."""
    place.mode(0o2775)
    real = finishing.finish

    def exchanged(*arguments, **keywords) -> None:
        if when == "parent moved":
            place.folder.rename(place.folder.with_name("moved"))
            place.folder.mkdir()
        else:
            place.partial.rename(place.folder / "gone")
        if when == "replaced by B's":
            shutil.copytree(place.source, place.partial / "checkpoint")
        real(*arguments, **keywords)

    def patched() -> None:
        finishing.finish = exchanged

    if when == "parent moved":
        os.chown(place.folder.parent, A, GROUP)
    place.converts(before=patched).refused("moved, removed or taken")
    assert not place.out.exists()


def test_a_note_in_an_out_of_another_user(place: Place) -> None:
    """B's OUT says of itself, as an extended attribute, that the very command has written it: it is not believed."""
    place.mode(0o2777)
    place.converts().succeeded()
    place.converts().succeeded()  # the group may write in it, so not its note is believed, but a comparison of bytes
    for path in (place.out, *place.out.rglob("*")):
        os.chown(path, B, GROUP)
    place.converts().refused("belongs to another user")
    place.converts("--dry-run").refused("belongs to another user")


def test_an_out_of_another_user(imported, place: Place) -> None:
    """Neither an empty one nor an earlier output of B's is replaced by A's."""
    place.mode(0o2777)
    for whole in (False, True):
        shutil.rmtree(place.out, ignore_errors=True)
        shutil.copytree(imported("llama2"), place.out) if whole else place.out.mkdir()
        for path in (place.out, *place.out.rglob("*")):
            os.chown(path, B, GROUP)
        place.converts("--overwrite").refused("belongs to another user")
        assert place.out.stat().st_uid == B


def test_a_parent_that_may_not_be_read(place: Place) -> None:
    place.mode(0o1777)
    os.chown(place.folder, A, GROUP)
    place.folder.chmod(0o300)
    place.converts().succeeded()
    place.folder.chmod(0o700)
    place.is_right()


def test_group_and_setgid_come_from_the_parent(place: Place) -> None:
    place.mode(0o2775)
    place.converts(umask=0o027).succeeded()
    place.is_right()
    found = {str(p.relative_to(place.out)): (p.stat().st_gid, stat.S_IMODE(p.stat().st_mode)) for p in
             (place.out, *place.out.rglob("*"))}  # fmt: skip
    assert found["."] == (GROUP, 0o2750)
    assert found["conversion_manifest.json"] == (GROUP, 0o640)
