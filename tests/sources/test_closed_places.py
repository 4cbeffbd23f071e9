"""Places that this user may not look into: folders that the args name, and iterations."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run
from megatron_files import load_rank, save_rank
from neighbours import A, B, as_user

from weights_conversion.errors import ConversionError
from weights_conversion.files import owners
from weights_conversion.formats import iterations

MODEL = "llama2-gqa"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user may enter, which tmp_path is not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@as_root
@pytest.mark.parametrize(("owner", "why"), [(0, "lies where you may not look"), (B, f"another user ({B})")])
def test_training_by_somebody_else(owner: int, why: str, imported, shared: Path) -> None:
    """As a container's root, or a colleague, has trained: what they named is told and passed over."""
    root, home = shared / "trained", shared / "home"
    (home / "start").mkdir(parents=True)
    os.chown(home, owner, -1)
    shutil.copytree(imported(MODEL), root, copy_function=shutil.copyfile)
    (root / "conversion_manifest.json").unlink()
    path = root / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content = load_rank(path)
    content["args"].load = str(home / "start")
    content["args"].vocab_file = str(home / "start" / "tokenizer.model")
    save_rank(content, path)
    home.chmod(0o700)
    (shared / "a").mkdir()
    os.chown(shared / "a", A, -1)

    def export() -> str:
        found = run("megatron_to_hf", "--input_dir", root, "--output_dir", shared / "a" / "out", "--no_tokenizer",
                    "--model", "llama2")  # fmt: skip
        return f"{found.code}\n{found.text}"

    failed, said = as_user(A, 0o022, export)
    assert not failed, said
    assert said.startswith("0\n"), said
    assert f"{home / 'start'}, which the args name, " in said
    assert why in said


@as_root
def test_whose_it_is(shared: Path) -> None:
    """In a closed folder, everything is that folder's owner's: it may open it at any moment."""
    (shared / "closed" / "inner").mkdir(parents=True)
    os.chown(shared / "closed", B, -1)
    (shared / "closed").chmod(0o700)
    for name, found in (("closed/inner/file", (B, True)), ("nothing/file", (None, False)), ("closed", (B, False))):
        path = shared / name
        failed, said = as_user(A, 0o022, lambda path=path: (owners.stranger(path), owners.is_closed(path)))
        assert not failed, said
        assert said == str(found)


def test_whose_it_is_cannot_be_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stat(path: Path, **_: bool) -> os.stat_result:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(owners.os, "stat", stat)
    with pytest.raises(OSError, match="Input/output"):
        owners.stranger(tmp_path)


def test_an_iteration_that_may_not_be_read_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, an older one would be the only one, and be converted."""
    for number in (1, 2):
        (tmp_path / f"iter_000000{number}" / "mp_rank_00").mkdir(parents=True)
    real = Path.iterdir

    def iterdir(path: Path):
        if path.name == "iter_0000002":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(ConversionError, match=r"iter_0000001, iter_0000002.*--load_iters"):
        iterations.find_iteration(tmp_path, None)
    assert iterations.find_iteration(tmp_path, 1) == (tmp_path / "iter_0000001", 1)


def exports(source: Path, out: Path, *options: object) -> str:
    """As user A: the exit code and what was said."""

    def work() -> str:
        found = run("megatron_to_hf", "--input_dir", source, "--output_dir", out, *options)
        return f"{found.code}\n{found.text}"

    failed, said = as_user(A, 0o022, work)
    assert not failed, said
    return said


@pytest.fixture
def place(shared: Path, imported) -> Path:
    """`run`, an import that all may read, and `a`, a folder of A's."""
    shutil.copytree(imported(MODEL), shared / "run", copy_function=shutil.copyfile)
    (shared / "a").mkdir()
    os.chown(shared / "a", A, -1)
    return shared


@as_root
@pytest.mark.parametrize("named", ["run", "run/release"])
def test_a_root_that_may_not_be_listed(named: str, place: Path) -> None:
    """Its tracker, or the path, names the iteration."""
    (place / "run").chmod(0o711)
    said = exports(place / named, place / "a" / "out")
    assert said.startswith("0\n"), said


@as_root
@pytest.mark.parametrize("mode", [0o711, 0o700])
def test_a_closed_folder_beside_the_only_checkpoint(mode: int, place: Path) -> None:
    (place / "shared" / "alice").mkdir(parents=True)
    (place / "run").rename(place / "shared" / "llama")
    (place / "shared" / "alice").chmod(mode)
    said = exports(place / "shared", place / "a" / "out")
    assert said.startswith("0\n"), said


@as_root
@pytest.mark.parametrize("closed", ["policy", "policy/weights", "weights"])
def test_a_closed_folder_in_a_model(closed: str, place: Path, sources) -> None:
    """The names of other programs' folders, in one of Hugging Face's form."""
    shutil.copytree(sources(MODEL), place / "hf", copy_function=shutil.copyfile)
    (place / "hf" / "context").mkdir()
    (place / "hf" / closed).mkdir(parents=True)
    (place / "hf" / closed).chmod(0o700)

    def work() -> str:
        found = run("hf_to_megatron", "llama2", "--model-path", place / "hf", "--out", place / "a" / "out")
        return f"{found.code}\n{found.text}"

    failed, said = as_user(A, 0o022, work)
    assert not failed, said
    assert said.startswith("0\n"), said


@as_root
@pytest.mark.parametrize("name", ["tokenizer_model", "vocab_file"])
@pytest.mark.parametrize("fails", ["closed", "gone"])
def test_no_other_tokenizer_for_one_that_cannot_be_looked_at(
    name: str, fails: str, place: Path, to_hf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named in a warning; a mount that is gone is an error, until --vocab_file chooses."""
    path = place / "run" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content = load_rank(path)
    wanted = place / "tokenizer" / "tokenizer.model"
    wanted.parent.mkdir()
    shutil.copy(place / "run" / "tokenizer.model", wanted)
    content["args"].load = None
    content["args"].vocab_file = None
    setattr(content["args"], name, str(wanted))
    save_rank(content, path)
    path.chmod(0o644)
    if fails == "closed":
        wanted.parent.chmod(0o700)
        said = exports(place / "run", place / "a" / "out")
        assert str(wanted.parent if name == "vocab_file" else wanted) in said
        assert "--vocab_file" in said
        return
    real = os.stat

    def stat(path: object, **keywords: object) -> os.stat_result:
        if str(path) == str(wanted):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path, **keywords)  # type: ignore[arg-type]

    line = ["--input_dir", place / "run", "--output_dir", place / "a" / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        to_hf(*line).refused("Stale file handle", str(wanted))
    assert not (place / "a" / "out").exists()


def test_a_link_loop_that_the_args_name(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert owners.stranger(tmp_path / "loop" / "file") is None
    assert not owners.is_closed(tmp_path / "loop")
