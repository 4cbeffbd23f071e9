"""A sample of the points of `python -m tests.robustness`, and what it has found, each by itself."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, Script

import weights_conversion.verify  # noqa: F401  (the package has a function of that name)
from tests.robustness import faults
from tests.robustness import sources as samples
from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio, watch
from weights_conversion.formats import archives, huggingface
from weights_conversion.launch import line
from weights_conversion.output import beginning, descriptors, finishing, ownership, publish
from weights_conversion.output.partial import Partial
from weights_conversion.verification import whole


@pytest.mark.skipif(faults.lacking() is not None, reason=str(faults.lacking()))
@pytest.mark.parametrize(
    "options",
    [
        ("--sample", "2"),
        ("--ranks", "2", "--sample", "4", "--case", "export"),
        ("--ranks", "2", "--kind", "lock", "--action", "fail", "--case", "export", "--exactly"),
    ],
)
def test_a_sample_of_points(options: tuple[str, ...]) -> None:
    call = [sys.executable, "-m", "tests.robustness", *options]
    done = subprocess.run(call, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "; 0 wrong ends" in done.stdout.splitlines()[-1]


@pytest.mark.skipif(faults.lacking() is not None, reason=str(faults.lacking()))
@pytest.mark.parametrize(
    ("lacks", "found"), [("watch", "it has moved): exit 0"), ("stamps", "on what has moved: the rerun's bytes differ")]
)
def test_a_converter_that_trusts_a_moving_source_is_found(lacks: str, found: str) -> None:
    """One that publishes without a last look at the source, and one that continues on other files of equal sizes."""
    case = "moving, import TP2 PP2: a weight file rewritten in place"
    call = [sys.executable, "-m", "tests.robustness", "--case", case, "--exactly", "--sample", "16", "--action", "fail"]
    done = subprocess.run(
        [*call, "--jobs", "1", "--without", lacks], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert found in done.stdout


def failing(number: int, path: object = None):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number), path)

    return fails


def test_trouble_in_a_proof_is_no_failed_proof(sources, imported, tmp_path: Path, to_megatron: Script, monkeypatch):
    """What could not be read may be right: it is not set aside, and the same command proves it again."""
    call = ("llama2", "--model-path", sources("llama2-gqa"), "--out", tmp_path / "out", "--verify")

    def verify(*_, **__):
        try:
            failing(errno.EIO, "/x/y")()
        except OSError as error:
            raise ConversionError("/x/y cannot be read (Input/output error)") from error

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["weights_conversion.verify"], "verify", verify)
        to_megatron(*call).refused("/x/y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial"]
    to_megatron(*call).succeeded()
    assert samples.tree(tmp_path / "out") == samples.tree(imported("llama2-gqa"))


def test_an_error_after_the_rename_says_so(sources, imported, tmp_path: Path, to_megatron: Script, monkeypatch):
    call = ("llama2", "--model-path", sources("llama2-gqa"), "--out", tmp_path / "out")
    sync = descriptors.sync_folder

    def fails_at_the_end(name, within=None):
        if (tmp_path / "out").exists():
            failing(errno.EIO)()
        sync(name, within)

    with monkeypatch.context() as patch:
        patch.setattr(descriptors, "sync_folder", fails_at_the_end)
        said = to_megatron(*call).refused("out is complete", "Input/output error", "the same command")
    assert "nothing that was there is changed" not in said.err
    assert samples.tree(tmp_path / "out") == samples.tree(imported("llama2-gqa"))
    to_megatron(*call).succeeded()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_leftovers_of_a_finished_output_go(sources, tmp_path: Path, to_megatron: Script, monkeypatch) -> None:
    """Killed when all but the folder itself was removed: the same command, which finds OUT complete, removes it."""
    call = ("llama2", "--model-path", sources("llama2-gqa"), "--out", tmp_path / "out")
    to_megatron(*call).succeeded()
    (tmp_path / "out.partial").mkdir(mode=0o700)
    (tmp_path / "out.partial" / "lock").touch()
    to_megatron(*call).succeeded()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with monkeypatch.context() as patch:
        patch.setattr(Partial, "remove", lambda self: None)
        to_megatron(*call, "--overwrite").succeeded()
    (tmp_path / "out.partial" / "journal" / "publishing").unlink()  # killed a little before
    to_megatron(*call).succeeded()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EINTR, errno.ESTALE])
def test_what_cannot_be_looked_for_is_not_absent(number: int, imported, tmp_path: Path, to_hf: Script, monkeypatch):
    """An import's manifest that the filesystem does not show at this moment: the export without it would be another."""
    look = os.lstat

    def lstat(path, *rest, **named):
        if str(path).endswith("conversion_manifest.json"):
            failing(number, path)()
        return look(path, *rest, **named)

    monkeypatch.setattr(os, "lstat", lstat)
    call = ("--input_dir", imported("llama2-gqa"), "--output_dir", tmp_path / "back")
    to_hf(*call).refused("conversion_manifest.json", os.strerror(number))


def test_an_error_in_a_folder_gets_a_whole_path(tmp_path: Path) -> None:
    """By a descriptor, by a name in it, or without any name: the sentence has the path."""
    (tmp_path / "a").mkdir()
    for name, shown in ((7, tmp_path / "a"), ("b", tmp_path / "a" / "b"), (None, tmp_path / "a")):
        with (
            pytest.raises(OSError, match="Input") as error,
            descriptors.shown_as("looking into", tmp_path),
            descriptors.folder(tmp_path / "a"),
        ):
            failing(errno.EIO, name)()
        assert fileio.failed(error.value) == f"looking into {tmp_path} ({shown}): Input/output error"


def test_a_signal_after_the_rename_finds_the_work_done(sources, tmp_path: Path, to_megatron: Script, monkeypatch):
    """While the folder is synced, which may take long on a disk that is busy."""
    sync, seen = descriptors.sync_folder, []

    def interrupted(name, within=None):
        if (tmp_path / "out").exists() and not seen:
            seen.append(name)
            raise KeyboardInterrupt
        sync(name, within)

    monkeypatch.setattr(descriptors, "sync_folder", interrupted)
    to_megatron("llama2", "--model-path", sources("llama2-gqa"), "--out", tmp_path / "out").succeeded()
    assert seen == ["."]
    assert not (tmp_path / "out.partial").exists()


def test_what_another_run_left_stays(tmp_path: Path) -> None:
    """A finished OUT, and beside it what a killed --overwrite has taken away, or work that another can continue."""
    (tmp_path / "out").mkdir()
    held = beginning.prepare(tmp_path / "other", "a plan")
    held.note_digest("a plan")
    held.close()
    (tmp_path / "other.partial").rename(tmp_path / "out.partial")
    beginning.clear_away(tmp_path / "out", "of OUT")
    assert (tmp_path / "out.partial" / "journal" / "digest").exists()
    (tmp_path / "out.partial" / "journal" / "digest").unlink()
    (tmp_path / "out.partial" / "replaced").mkdir()
    beginning.clear_away(tmp_path / "out", "of OUT")
    assert (tmp_path / "out.partial" / "replaced").exists()


def test_trouble_after_the_exchange(sources, imported, tmp_path: Path, to_megatron: Script, monkeypatch) -> None:
    """What stood at OUT cannot be looked into any more: OUT is the new one, and the sentence says so, with a path."""
    call = ("llama2", "--model-path", sources("llama2-gqa"), "--out", tmp_path / "out", "--overwrite")
    samples.write_older(tmp_path / "out")
    looked, lists = [], os.listdir

    def listdir(path="."):
        if isinstance(path, int) and (tmp_path / "out" / "tokenizer.model").exists():
            looked.append(path)
            failing(errno.EACCES)()
        return lists(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", listdir)
        to_megatron(*call).refused(f"{tmp_path / 'out'} is complete", f"{tmp_path / 'out.partial'}", "cannot be read")
    assert looked
    assert samples.tree(tmp_path / "out") == samples.tree(imported("llama2-gqa"))
    to_megatron(*call).succeeded()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_store_that_is_gone_is_a_sentence() -> None:
    """Rank 0 is killed while the others wait for all to come."""

    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("Connection reset by peer\nException raised from recvBytes")

    with pytest.raises(ConversionError, match=r"the connection to rank 0 is lost \(Connection reset by peer\)"):
        line.Store(Gone(), "a job").has("joined")  # pyright: ignore[reportArgumentType]


def test_a_source_that_cannot_be_looked_at_has_not_failed_its_proof(tmp_path: Path, monkeypatch) -> None:
    """The sentence's cause is the system's error, by which a proof knows trouble from a difference."""
    (tmp_path / "weights").write_text("x")
    with watch.watching() as seen:
        fileio.open_file(tmp_path / "weights").close()
        monkeypatch.setattr(os, "stat", failing(errno.ESTALE, str(tmp_path / "weights")))
        with pytest.raises(ConversionError, match="Stale file handle") as error:
            seen.check()
    assert isinstance(error.value.__cause__, OSError)


@pytest.mark.parametrize("said", ["unable to mmap: Invalid argument (22)", "Invalid argument (os error 22)"])
def test_what_a_library_says_of_the_system_is_trouble(said: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Invalid argument") as error, whole._read_by("safetensors", tmp_path / "x"):
        raise RuntimeError(said)
    assert (error.value.errno, error.value.filename) == (errno.EINVAL, str(tmp_path / "x"))


def test_a_weight_file_that_cannot_be_mapped_is_a_sentence(
    sources, to_megatron: Script, tmp_path: Path, monkeypatch
) -> None:
    """torch opens it once more for safetensors, and says what the system said in words of its own."""

    def refuses(*_: object, **__: object) -> None:
        raise RuntimeError("unable to open file <model.safetensors> in read-only mode: Operation not supported (95)")

    monkeypatch.setattr(huggingface, "safe_open", refuses)
    line = ("llama2", "--model-path", sources("llama2-gqa"), "--out", tmp_path / "out")
    to_megatron(*line).refused("model.safetensors cannot be read", "Operation not supported")


def test_what_becomes_out_cannot_be_looked_at(sources, tmp_path: Path, to_megatron: Script, monkeypatch) -> None:
    """While it is noted as what will be OUT: the sentence names the folder, not only the note."""
    look = os.fstat

    def fstat(descriptor):
        found = look(descriptor)
        if sys._getframe(1).f_code.co_filename == publish.__file__:
            failing(errno.EACCES)()
        return found

    monkeypatch.setattr(os, "fstat", fstat)
    line = ("llama2", "--model-path", sources("llama2-gqa"), "--out", tmp_path / "out")
    to_megatron(*line).refused(f"{tmp_path / 'out.partial' / 'checkpoint'}", "Permission denied")


def test_a_weight_file_that_cannot_be_mapped_has_not_failed_its_proof(sources, monkeypatch) -> None:
    """The sentence's cause is the system's error also where torch has put it into words of its own."""

    def refuses(*_: object, **__: object) -> None:
        raise RuntimeError("unable to open file <model.safetensors> in read-only mode: Disk quota exceeded (122)")

    monkeypatch.setattr(huggingface, "safe_open", refuses)
    with pytest.raises(ConversionError, match="Disk quota exceeded") as error:
        huggingface.read_safetensors(next(sources("llama2-gqa").glob("*.safetensors")))
    assert isinstance(error.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("raised", "number"),
    [
        (FileNotFoundError("No such file or directory: x"), errno.EIO),  # safetensors' word for any refusal
        (RuntimeError("unable to mmap 56 bytes from file <x>: Cannot allocate memory (12)"), errno.ENOMEM),
        (RuntimeError("unable to stat the file <x>: Interrupted system call (4)"), errno.EINTR),
        (MemoryError(), errno.ENOMEM),
    ],
)
@pytest.mark.parametrize("reader", ["ours", "the proof's"])
def test_trouble_of_a_library_is_trouble(reader: str, raised: Exception, number: int, sources, monkeypatch) -> None:
    """A source that cannot be opened once more while an output is proven: no verdict, and the file is named."""

    def refuses(*_: object, **__: object) -> None:
        raise raised

    path = sources("llama2-gqa") / "model.safetensors"
    with pytest.raises((ConversionError, OSError), match=r"model\.safetensors") as error:  # noqa: PT012
        if reader == "ours":
            monkeypatch.setattr(huggingface, "safe_open", refuses)
            huggingface.read_safetensors(path)
        with whole._read_by("safetensors", path):
            refuses()
    assert finishing._is_trouble(error.value)
    failed = error.value.__cause__ if reader == "ours" else error.value
    assert isinstance(failed, OSError)
    assert (failed.errno, failed.filename) == (number, str(path))


def test_a_read_error_in_an_archive_is_no_damage(imported, monkeypatch) -> None:
    """zipfile calls it a broken archive."""
    path = next(imported("llama2-gqa").rglob("*.pt"))
    reads = archives._Heard.read

    def read(self, size: int = -1) -> bytes:
        monkeypatch.setattr(self, "_file", type("Failing", (), {"read": failing(errno.ESTALE, str(path))})())
        return reads(self, size)

    monkeypatch.setattr(archives._Heard, "read", read)
    with path.open("rb") as file, pytest.raises(OSError, match="Stale file handle"):
        archives.directory(file, path.stat().st_size, path)


@pytest.mark.parametrize("unseen", [True, False])
def test_the_file_that_tells_who_we_are_is_named(unseen: bool, tmp_path: Path, monkeypatch) -> None:
    with descriptors.folder(tmp_path) as folder, monkeypatch.context() as patch:
        patch.setattr(os, "fstat", failing(errno.EACCES))
        with pytest.raises(OSError, match="Permission denied") as error:
            descriptors.who_am_i_unseen(tmp_path) if unseen else descriptors.who_am_i(folder)
    assert str(tmp_path) in fileio.failed(error.value)


def test_a_refusal_to_open_is_not_another_kind_of_file(tmp_path: Path, monkeypatch) -> None:
    """EINVAL of an open says nothing of what stands there: an OUT in which it meets one is not foreign."""
    samples.write_older(tmp_path / "out")
    opens = os.open

    def opening(name, *rest, **named):
        return failing(errno.EINVAL)() if str(name).endswith("iteration.txt") else opens(name, *rest, **named)

    monkeypatch.setattr(os, "open", opening)
    with pytest.raises(OSError, match="Invalid argument"):
        ownership.output_in(tmp_path / "out")
