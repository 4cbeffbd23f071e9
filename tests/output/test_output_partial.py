"""OUT.partial: what continues it, what takes it over, and filesystems that lack things. One user, real conversions."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
from failing import failing

from weights_conversion.errors import ConversionError
from weights_conversion.output import beginning, descriptors, finishing, imitate, locks, partial
from weights_conversion.output.journal import Journal
from weights_conversion.sources.checkpoint import open_checkpoint  # noqa: F401 imported before anything is patched

MODEL = "llama2-gqa"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def line(sources, tmp_path: Path) -> list[object]:
    return ["llama2", "--model-path", sources(MODEL), "--out", tmp_path / "out"]


@pytest.fixture
def interrupted(line, to_megatron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """OUT.partial of a run that was interrupted when all was written but the small files."""

    def stops(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finishing, "finish", stops)
        assert to_megatron(*line).code == 130
    return tmp_path / "out.partial"


# --- whose it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flock", "removed"), [(True, True), (False, True), (False, False)])
def test_a_run_that_wakes_up_publishes_nothing_of_another(
    flock: bool, removed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """It hung, its user (removed OUT.partial and) started again: what the second one has begun is not published."""
    if not flock:
        monkeypatch.setattr(locks.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "none")))
    out = tmp_path / "out"
    with beginning.prepare(out, "one") as first:
        first.write("config.json", b"1")
        if removed:
            shutil.rmtree(tmp_path / "out.partial")
        with beginning.prepare(out, "two") as second:
            second.write("generation_config.json", b"2")
            with pytest.raises(ConversionError, match="moved, removed or taken"):
                first.publish(overwrite=True)
            assert not out.exists()
            second.publish(overwrite=False)
    assert contents(out) == {"generation_config.json": b"2"}
    assert os.listdir(tmp_path) == ["out"]


def test_it_is_private_until_it_is_published(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with beginning.prepare(tmp_path / "out", "one") as held:
            assert stat.S_IMODE((tmp_path / "out.partial").stat().st_mode) == 0o700
            held.write("folder/a", b"1")
            held.publish(overwrite=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777
    assert stat.S_IMODE((tmp_path / "out" / "folder" / "a").stat().st_mode) == 0o666


def test_ids_that_a_server_maps(line, interrupted, to_megatron, imported, tmp_path: Path, monkeypatch) -> None:
    """What this process calls itself is not what the filesystem calls it: its own OUT.partial is continued."""
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    assert "continued an interrupted run" in to_megatron(*line).succeeded().out
    to_megatron(*line, "--overwrite").succeeded()
    assert contents(tmp_path / "out") == contents(imported(MODEL))


def test_a_partial_that_was_opened_to_others_starts_over(line, interrupted, to_megatron, imported) -> None:
    interrupted.chmod(0o777)
    assert "open to other users: starting over" in to_megatron(*line).succeeded().text
    assert contents(interrupted.with_name("out")) == contents(imported(MODEL))


# --- filesystems ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        (errno.EINVAL, OSError, "out.partial/lock"),
        (errno.EAGAIN, ConversionError, "has just begun to write {}/out.partial"),
    ],
)
def test_a_lock_that_cannot_be_shared_is_named(
    code: int, kind: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other process is blamed for what the filesystem refuses (flock(2): EWOULDBLOCK alone is another's lock)."""
    monkeypatch.setattr(locks.fcntl, "flock", failing(code))
    with pytest.raises(kind) as caught:
        locks.share(3, tmp_path / "out.partial")
    assert said.format(tmp_path) in str(caught.value)
    locks.share(-1, tmp_path / "out.partial")  # there are no locks


@pytest.mark.parametrize("lacking", ["locks", "access lists", "files without a name", "modes", "syncing folders"])
def test_what_a_filesystem_may_lack(
    lacking: str, line, interrupted, to_megatron, imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    fsync, stat_of = os.fsync, os.fstat
    if lacking == "locks":
        monkeypatch.setattr(locks.fcntl, "flock", failing(errno.ENOSYS))
    elif lacking == "access lists":
        monkeypatch.setattr(imitate.os, "getxattr", failing(errno.ENOTSUP), raising=False)
        monkeypatch.setattr(imitate.os, "setxattr", failing(errno.ENOTSUP), raising=False)
    elif lacking == "files without a name":
        monkeypatch.delattr(descriptors.os, "O_TMPFILE")
    elif lacking == "modes":
        interrupted.chmod(0o777)

        def all_rights(descriptor: int) -> os.stat_result:
            found = stat_of(descriptor)
            return os.stat_result([found[0] | 0o777, *found[1:]]) if stat.S_ISDIR(found.st_mode) else found

        looked = os.stat
        monkeypatch.setattr(os, "fchmod", failing(errno.EPERM))
        monkeypatch.setattr(partial.os, "fstat", all_rights)
        monkeypatch.setattr(os, "stat", lambda at, **how: all_rights(at) if isinstance(at, int) else looked(at, **how))
    else:
        monkeypatch.setattr(
            os, "fsync", lambda file: failing(errno.EINVAL)() if stat.S_ISDIR(stat_of(file).st_mode) else fsync(file)
        )
    assert "continued an interrupted run" in to_megatron(*line).succeeded().out
    to_megatron(*line, "--overwrite").succeeded()
    assert contents(tmp_path / "out") == contents(imported(MODEL))


# --- small state files ------------------------------------------------------------------------------------------------


GARBAGE = [
    b"",
    b"\0" * 4096,
    b"\xff\xfe garbage",
    b"[[[[" * 50_000,
    b"9" * 5000,
    b"1 2 3",
    b"null",
    b"{}",
    b"-1",
    b"NaN",
]


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
@pytest.mark.parametrize("name", ["digest", "publishing", "chunks.0"])
def test_a_damaged_note_is_none(
    name: str, content: bytes, line, interrupted, to_megatron, imported
) -> None:  # fmt: skip
    """Of no run, of no folder (what stands in OUT.partial may be what OUT was before), of no chunk."""
    (interrupted / "journal" / name).write_bytes(content)
    text = to_megatron(*line).succeeded().text
    assert ("continued an interrupted run" in text) == (name == "chunks.0")
    assert contents(interrupted.with_name("out")) == contents(imported(MODEL))
    assert not interrupted.exists()


@pytest.mark.parametrize("line_", [b"[0, []]", b"[0, [[0, 0, 1, 1]]]", b"[99, [[99, 0, 1, 1]]]", b"[]", b"true"])
def test_plausible_lines_of_the_journal_are_no_entries(line_: bytes, line, interrupted, to_megatron, imported) -> None:
    """An entry without its sum is not believed, though it reads like one."""
    notes = interrupted / "journal" / "chunks.0"
    notes.write_bytes(notes.read_bytes()[:40] + b"\n" + line_ + b"\n")
    to_megatron(*line).succeeded()
    assert contents(interrupted.with_name("out")) == contents(imported(MODEL))


def test_a_damaged_layout_starts_over(line, interrupted, to_megatron, imported) -> None:
    (interrupted / "checkpoint" / "release" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"cut off")
    to_megatron(*line).succeeded()
    assert contents(interrupted.with_name("out")) == contents(imported(MODEL))


def test_the_old_journal_is_read_by_nobody_else(tmp_path: Path) -> None:
    """A link at the journal's name is not followed, neither to read nor to write."""
    import torch

    from weights_conversion.layouts.placement import TensorRef, Written

    ref = TensorRef("x.pt", "a", torch.float32, (4, 4))
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "chunks.0").symlink_to(tmp_path / "mine")
    journal = Journal(tmp_path, [ref])
    assert journal.load() == {}
    journal.add(0, [Written(ref, 0, 64, 1)])
    with pytest.raises(OSError):  # noqa: PT011 which one depends on the system
        journal.note(journal.take())
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_note_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with descriptors.folder(tmp_path) as top:
        descriptors.write_note(top, "note", b"old")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(errno.EIO))
            with pytest.raises(OSError, match="Input/output"):
                descriptors.write_note(top, "note", b"new")
        assert descriptors.read_note(top, "note", 100) == b"old"
        descriptors.write_note(top, "note", b"newer")
        assert os.listdir(tmp_path) == ["note"]
        assert descriptors.read_note(top, "note", 100) == b"newer"
        assert descriptors.read_note(top, "note", 4) is None


# --- a finished OUT with its clean-up left ----------------------------------------------------------------------------


@pytest.fixture
def unclean(line, to_megatron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """OUT, made with --verify, whose OUT.partial could not be removed any more."""
    with monkeypatch.context() as patch:
        patch.setattr(partial.Partial, "remove", lambda self: None)
        to_megatron(*line, "--verify", "--checksums").succeeded()
    return tmp_path / "out"


def test_a_finished_output_is_proven_again(line, unclean: Path, to_megatron, tmp_path: Path) -> None:
    """--verify proves or fails, also where only the clean-up was left."""
    assert "IDENTICAL" in to_megatron(*line, "--verify", "--checksums").succeeded().out
    assert os.listdir(tmp_path) == ["out"]


def test_a_finished_output_that_was_changed_fails(line, unclean: Path, to_megatron, tmp_path: Path) -> None:
    weights = unclean / "release" / "mp_rank_00" / "model_optim_rng.pt"
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        file.write(b"\xff" * 64)
    to_megatron(*line, "--verify", "--checksums").refused("failed its proof", "out.unverified")
    assert os.listdir(tmp_path) == ["out.unverified"]


def test_a_finished_output_that_lost_a_file_is_refused(line, unclean: Path, to_megatron) -> None:
    (unclean / "checksums.sha256").unlink()
    to_megatron(*line, "--verify", "--checksums").refused("checksums.sha256", "--overwrite")
    to_megatron(*line, "--verify", "--checksums", "--overwrite").succeeded()


def test_another_folder_with_the_inode_of_the_note(line, unclean: Path, to_megatron, tmp_path: Path) -> None:
    """The note names OUT by inode and owner; a foreign folder that has both is still not taken for the output."""
    shutil.rmtree(unclean / "release")
    to_megatron(*line, "--verify", "--checksums").refused("not whole any more", "--overwrite")


# --- sentences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir", "unlink", "listdir"])
def test_an_error_names_its_file(call: str, line, to_megatron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call fails once, at its first, second ... time in OUT.partial; the rerun ends right."""
    real, ends = getattr(os, call), []
    for number in range(1, 200):
        seen = 0

        def fails(*arguments, number=number, **keywords):
            nonlocal seen
            seen += 1
            if seen == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(descriptors.os, call, fails)
            found = to_megatron(*line, "--overwrite")
        ends.append(found.code)
        if found.code:
            found.refused("Input/output error", str(tmp_path.parent))  # the source's folder stands beside it
        elif seen < number:
            break
    to_megatron(*line, "--overwrite").succeeded()
    assert os.listdir(tmp_path) == ["out"]
    assert ends[-1] == 0


@pytest.mark.parametrize("call", ["open", "stat", "rename"])
def test_removed_while_it_is_written(call: str, line, to_megatron, imported, tmp_path: Path, monkeypatch) -> None:
    """OUT.partial goes away at any moment: a sentence without OUT, or the right output."""
    real, out = getattr(os, call), tmp_path / "out"
    for number in range(1, 200, 7):
        seen = 0

        def removes(*arguments, number=number, **keywords):
            nonlocal seen
            seen += 1
            if seen == number:
                shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
            return real(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(descriptors.os, call, removes)
            found = to_megatron(*line)
        if found.code:
            found.refused(str(tmp_path))
            assert not out.exists()
        else:
            assert contents(out) == contents(imported(MODEL))
            shutil.rmtree(out)
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        if seen < number:
            break
