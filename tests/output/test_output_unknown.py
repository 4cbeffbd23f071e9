"""What cannot be known is not taken for what is not there: an unreadable note, a failed look, a list not copied.

Each of these went on as if nothing were there, and ended with exit 0: with the earlier model at OUT, without the
source, or with rights that OUT did not give.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from access_lists import NOBODY, access_list
from failing import failing
from safetensors.torch import load_file, save_file

from weights_conversion.errors import ConversionError
from weights_conversion.output import (
    descriptors,
    finished,
    finishing,
    imitate,
    journal,
    locks,
    ownership,
    partial,
    publish,
)

MODEL = "llama2-gqa"
FAILED = [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def line(sources, tmp_path: Path) -> list[object]:
    return ["llama2", "--model-path", sources(MODEL), "--out", tmp_path / "out", "--overwrite"]


@pytest.fixture
def exchanged(line, sources, to_megatron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """OUT has just been replaced, and its OUT.partial, which holds another model of the same layout, not removed."""
    older = tmp_path / "older"
    shutil.copytree(sources(MODEL), older)
    for path in older.glob("*.safetensors"):
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    to_megatron("llama2", "--model-path", older, "--out", tmp_path / "out").succeeded()
    with monkeypatch.context() as patch:
        patch.setattr(partial.Partial, "remove", lambda self: None)
        to_megatron(*line).succeeded()
    return tmp_path / "out"


# --- the note of which folder is the new output -----------------------------------------------------------------------


@pytest.mark.parametrize("code", FAILED)
@pytest.mark.parametrize("name", ["publishing", "digest", "journal"])
def test_the_older_output_is_never_published_again(
    name: str, code: int, line, exchanged: Path, imported, to_megatron, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Whichever look at the notes fails: OUT stays the new one, and the same command ends right."""
    call = "open_folder" if name == "journal" else "open_regular"
    real, seen, codes = getattr(descriptors, call), [0], []
    for number in range(1, 30):

        def is_due(wanted: str, *_: object, number: int = number) -> bool:
            seen[0] += wanted == name
            return wanted == name and seen[0] == number

        seen[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(partial.Partial, "remove", lambda self: None)
            patch.setattr(descriptors, call, failing(code, is_due, real))
            found = to_megatron(*line)
        codes.append(found.code)
        assert contents(exchanged) == contents(imported(MODEL))
        if seen[0] < number:
            break
        if found.code:
            found.refused("out.partial", *([] if code == errno.EACCES else [os.strerror(code)]))
    assert 1 in codes
    assert codes[-1] == 0
    to_megatron(*line).succeeded()
    assert contents(exchanged) == contents(imported(MODEL))
    assert not exchanged.with_name("out.partial").exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"1 2 3"])
def test_a_damaged_note_lets_nothing_continue(content: bytes, line, exchanged: Path, imported, to_megatron) -> None:
    (exchanged.with_name("out.partial") / "journal" / "publishing").write_bytes(content)
    to_megatron(*line).succeeded()
    assert contents(exchanged) == contents(imported(MODEL))


def test_unreadable_entries_of_the_journal_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may say that hours of work are done."""
    (tmp_path / "chunks.0").write_bytes(b"")
    monkeypatch.setattr(journal.descriptors, "open_regular", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        journal.Journal(tmp_path, []).load()


# --- whether the source stands in OUT ---------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("code", FAILED)
def test_a_source_that_is_out_is_never_replaced(
    code: int, link: bool, imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, source = tmp_path / "out", tmp_path / ("link" if link else "out")
    shutil.copytree(imported(MODEL), out)
    if link:
        source.symlink_to(out)
    for call in ("stat", "lstat", "readlink"):
        real, refused, seen = getattr(os, call), [], [0]
        for number in range(1, 40):

            def is_due(*_: object, number: int = number, seen: list[int] = seen) -> bool:
                seen[0] += 1
                return seen[0] == number

            seen[0] = 0
            with monkeypatch.context() as patch:
                patch.setattr(ownership.os, call, failing(code, is_due, real))
                try:
                    ownership.check_apart([out, tmp_path / "out.partial"], [source])
                    refused.append(False)
                except Exception:
                    refused.append(True)
            if seen[0] < number:
                break
        assert all(refused)


# --- rights -----------------------------------------------------------------------------------------------------------


# user::rwx, user:2001:r-x, group::---, mask::r-x, other::---: the mode is 0750, and its group has no right at all
LIST = access_list((1, 7, NOBODY), (2, 5, 2001), (4, 0, NOBODY), (0x10, 5, NOBODY), (0x20, 0, NOBODY))


@pytest.fixture
def with_list(imported, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    shutil.copytree(imported(MODEL), out)
    try:
        os.setxattr(out, "system.posix_acl_access", LIST)
    except OSError:
        pytest.skip("there are no access lists here")
    return out


@pytest.mark.parametrize(("code", "ends"), [(errno.EIO, 1), (errno.EPERM, 0), (errno.ENOTSUP, 0)])
@pytest.mark.parametrize("call", ["getxattr", "setxattr"])
def test_a_list_that_is_not_copied_widens_nothing(
    call: str, code: int, ends: int, line, with_list: Path, to_megatron, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (call, code) == ("getxattr", errno.ENOTSUP):
        pytest.skip("there are no lists then")
    real = getattr(os, call)
    monkeypatch.setattr(imitate.os, call, failing(code, lambda _, name, *rest: name == "system.posix_acl_access", real))
    found = to_megatron(*line)
    monkeypatch.undo()
    assert found.code == (ends if call == "setxattr" else 1)
    if found.code:
        assert os.getxattr(with_list, "system.posix_acl_access") == LIST
    else:
        assert "cannot be kept" in found.text
        assert with_list.stat().st_mode & 0o070 == 0
    to_megatron(*line).succeeded()


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EROFS])
@pytest.mark.parametrize("call", ["fchmod", "fchown"])
def test_a_mode_or_an_owner_that_could_not_be_set_is_told(
    call: str, code: int, line, imported, to_megatron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(imported(MODEL), out)
    out.chmod(0o750)
    if call == "fchown":
        if os.geteuid():
            pytest.skip("needs root, to make a folder of another group")
        os.chown(out, -1, 3000)
    before = out.stat()
    with monkeypatch.context() as patch:
        patch.setattr(imitate.os, call, failing(code))
        to_megatron(*line).refused(os.strerror(code), "out.partial")
    assert (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)
    to_megatron(*line).succeeded()


def test_a_partial_that_stays_open_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weights_conversion.output import beginning

    (tmp_path / "out.partial").mkdir(mode=0o755)
    with monkeypatch.context() as patch:
        patch.setattr(beginning.os, "fchmod", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            beginning.prepare(tmp_path / "out", "one")
    beginning.prepare(tmp_path / "out", "one").close()


# --- locks, names, exchanges ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOSPC])
def test_a_lock_that_has_failed_is_not_a_disk_without_locks(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, descriptors.folder(tmp_path) as top:
        patch.setattr(locks.fcntl, "flock", failing(code))
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            locks.take_alone(top, tmp_path)
        assert caught.value.filename == str(tmp_path / "lock")
        patch.setattr(locks.fcntl, "flock", failing(errno.ENOLCK))
        assert locks.take_alone(top, tmp_path) == -1


def test_what_stands_at_a_name_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with descriptors.folder(tmp_path) as top:
        assert not descriptors.is_at("nothing", top, top)
        monkeypatch.setattr(descriptors.os, "stat", failing(errno.EIO))
        for look in (lambda: descriptors.is_at("name", top, top), lambda: descriptors.is_place(tmp_path, top)):
            with pytest.raises(OSError, match="Input/output"):
                look()


@pytest.mark.parametrize(("code", "falls_back"), [(errno.EINVAL, True), (errno.ENOSYS, True), (errno.EIO, False)])
def test_a_failed_exchange_is_not_a_filesystem_without_it(
    code: int, falls_back: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been done: two further renames would put the earlier output back."""

    class Library:
        @staticmethod
        def renameat2(*_: object) -> int:
            return -1

    monkeypatch.setattr(publish.ctypes, "CDLL", lambda *_, **__: Library)
    monkeypatch.setattr(publish.ctypes, "get_errno", lambda: code)
    if falls_back:
        assert not publish.exchange(3, "a", 3, "b")
    else:
        with pytest.raises(OSError, match="Input/output"):
            publish.exchange(3, "a", 3, "b")


def test_the_note_of_a_finished_output_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(finished.os, "getxattr", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            finished.read(tmp_path)
        patch.setattr(finished.os, "getxattr", failing(errno.ENODATA))
        assert finished.read(tmp_path) is None


def test_notes_that_come_late_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network filesystem may have lost sight of one for a moment; where it does so for good, that is said."""
    looks = []

    def load(_: object) -> dict[int, list[object]]:
        looks.append(1)
        if len(looks) < 3:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "chunks.1")
        return {0: [], 1: []}

    notes = journal.Journal(tmp_path, [])
    monkeypatch.setattr(journal.Journal, "load", load)
    monkeypatch.setattr(journal.time, "sleep", lambda _: None)
    assert notes.load_all(2) == {0: [], 1: []}
    looks.clear()
    monkeypatch.setattr(journal, "VISIBLE_SECONDS", -1.0)
    with pytest.raises(OSError, match="Stale"):
        notes.load_all(2)


# --- half-way ---------------------------------------------------------------------------------------------------------


def test_ctrl_c_between_two_renames(line, to_megatron, imported, tmp_path: Path, monkeypatch) -> None:
    """What a user may remove then must not hold the only earlier output."""
    to_megatron(*line).succeeded()
    rename = publish._rename

    def stopped(held: partial.Partial, inner: str, name: str) -> None:
        if inner == "checkpoint":
            raise KeyboardInterrupt
        rename(held, inner, name)

    with monkeypatch.context() as patch:
        patch.setattr(publish, "exchange", lambda *_: False)
        patch.setattr(publish, "_rename", stopped)
        assert to_megatron(*line).code == 130
    assert contents(tmp_path / "out") == contents(imported(MODEL))
    to_megatron(*line).succeeded()
    assert os.listdir(tmp_path) == ["out"]


def test_a_source_with_dots_behind_a_link(imported, to_megatron, tmp_path: Path, monkeypatch) -> None:
    """The way is the system's: what a `..` would lead to in words alone is not looked at."""
    (tmp_path / "disk" / "big" / "deep").mkdir(parents=True)
    (tmp_path / "disk" / "models").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "data").symlink_to(tmp_path / "disk" / "big" / "deep")
    (tmp_path / "work" / "model").symlink_to("data/../../models/llama")
    shutil.copytree(imported(MODEL), tmp_path / "disk" / "models" / "llama")
    ways = list(ownership._passed(tmp_path / "work" / "model"))
    assert str(tmp_path / "disk" / "models" / "llama") in ways
    assert not [way for way in ways if way.startswith((str(tmp_path / "work" / "models"), str(tmp_path / "models")))]
    with pytest.raises(ConversionError, match="holds the source"):
        ownership.check_apart([tmp_path / "disk" / "models"], [tmp_path / "work" / "data" / ".." / ".." / "models"])


def test_a_damaged_layout_is_named_as_the_user_knows_it(line, to_megatron, tmp_path: Path, monkeypatch) -> None:
    def stops(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finishing, "finish", stops)
        assert to_megatron(*line).code == 130
    file = "release/mp_rank_00/model_optim_rng.pt"
    os.truncate(tmp_path / "out.partial" / "checkpoint" / file, 30)
    said = to_megatron(*line).succeeded().text
    assert f"is damaged ({file}" in said
    assert "/tmp" not in said.partition("is damaged (")[2].partition(")")[0]


@pytest.mark.parametrize("name", ["chunks.0", "digest", "publishing"])
def test_a_clean_up_that_fails_is_ended_by_the_same_command(
    name: str, line, to_megatron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the disk has no attributes that say whose OUT is: the notes that do so go last."""
    unlink = os.unlink
    monkeypatch.setattr(finished.os, "setxattr", failing(errno.ENOTSUP))
    line = [word for word in line if word != "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", failing(errno.EIO, lambda wanted, *_: wanted == name, unlink))
        assert "could not be removed completely" in to_megatron(*line).succeeded().text
    assert (tmp_path / "out.partial" / "journal" / name).exists()
    found = to_megatron(*line)
    assert found.code == (name == "publishing")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_a_mode_that_is_refused_gives_no_more(
    code: int, line, to_megatron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OUT was closed to others: where the new one cannot be made so, it does not come into its place."""
    to_megatron(*line).succeeded()
    out = tmp_path / "out"
    out.chmod(0o700)
    before = out.stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr(imitate.os, "fchmod", failing(code))
        to_megatron(*line).refused(os.strerror(code))
    assert (out.stat().st_ino, out.stat().st_mode & 0o777) == (before, 0o700)


def test_the_path_of_an_open_file_is_no_look_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was laid out before is found by it, and a failed look at "/proc/self/fd/13" would name nothing."""
    (tmp_path / "file").write_bytes(b"what is in it")
    with open(tmp_path / "file", "rb") as file, monkeypatch.context() as patch:
        patch.setattr(os, "stat", failing(errno.EIO))
        path = descriptors.path_of(file.fileno())
        patch.undo()
        assert path.read_bytes() == b"what is in it"
