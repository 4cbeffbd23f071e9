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
