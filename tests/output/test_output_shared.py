"""A finished OUT in which others may write: the same command again compares every byte before it calls it complete."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from neighbours import B, Place, as_user

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.output import finished, partial

MODEL = "llama2-gqa"
IMPORTS = {
    "rank files": ("--tensor-model-parallel-size", 2),
    "torch_dist": ("--target", "megatron-core"),
    "sums": ("--checksums",),
}


def opened(folder: Path) -> None:
    """As umask 002 in a group's folder leaves it, with the note of the run that wrote it."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & 0o777 | 0o020)


def rewritten(path: Path, at: int) -> None:
    """One byte is another, and size and time are what they were."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(params=[*IMPORTS, "export"])
def again(request, sources, imported, to_megatron, to_hf, tmp_path: Path):
    """The same command, as often as it is called; its OUT is `tmp_path / "out"`, written and open to the group."""
    out = tmp_path / "out"
    if request.param == "export":
        script, line = to_hf, ("--input_dir", imported(MODEL), "--output_dir", out)
    else:
        script, line = to_megatron, ("llama2", "--model-path", sources(MODEL), "--out", out, *IMPORTS[request.param])
    script(*line).succeeded()
    opened(out)
    return lambda *more: script(*line, *more)


def test_what_is_the_same_is_complete(again, tmp_path: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files(tmp_path / "out")}
    done = again().succeeded().text
    assert "already complete" in done
    assert "every byte was compared" in done
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files(tmp_path / "out")} == before
    assert "seems complete" in again("--dry-run").succeeded().text


def test_a_changed_byte_anywhere_is_found(again, tmp_path: Path) -> None:
    """Of tensors, of headers, of what stands around them, of small files; each with the size and time of before."""
    out = tmp_path / "out"
    for path in files(out):
        size = path.stat().st_size
        for at in sorted({0, size // 3, size // 2, size - 1}):
            rewritten(path, at)
            again().refused("has been changed since", path.name, "--overwrite")
            rewritten(path, at)
    assert "already complete" in again().succeeded().text


def test_another_models_weights_are_found(imported, sources, to_megatron, tmp_path: Path) -> None:
    """With the note, written anew for them, of the run that is repeated."""
    out = tmp_path / "out"
    line = ("llama2", "--model-path", sources(MODEL), "--out", out)
    to_megatron(*line).succeeded()
    note = finished.read(out)
    assert note is not None
    weights = next(out.rglob("*.pt"))
    shutil.copyfile(next(imported("llama2").rglob("*.pt")), weights)
    opened(out)
    top = os.open(out, os.O_RDONLY)
    finished.mark(top, note.run_digest)
    os.close(top)
    assert finished.read(out) == finished.Note(note.run_digest, sure=False)
    to_megatron(*line).refused("has been changed since", weights.name)


def test_a_killed_clean_up_trusts_no_shared_output(sources, to_megatron, tmp_path: Path, monkeypatch) -> None:
    """OUT.partial says that OUT is finished; whoever may write in OUT had all the time since."""
    out = tmp_path / "out"
    line = ("llama2", "--model-path", sources(MODEL), "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(partial.Partial, "remove", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        to_megatron(*line)
    assert out.is_dir()
    assert (tmp_path / "out.partial" / "journal" / "publishing").is_file()
    opened(out)
    weights = next(out.rglob("*.pt"))
    rewritten(weights, weights.stat().st_size // 2)
    to_megatron(*line).refused("has been changed since", weights.name)
    rewritten(weights, weights.stat().st_size // 2)
    to_megatron(*line).succeeded()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be several users")
def test_a_requeued_job_in_a_groups_folder(place: Place) -> None:
    place.mode(0o2775)
    for _ in range(2):
        place.converts(umask=0o002).succeeded()
    place.is_right()

    target = place.out / "conversion_manifest.json"
    content = target.read_bytes()

    def his() -> None:
        target.unlink()
        target.write_bytes(content)

    assert as_user(B, 0o002, his)[0] == 0
    place.converts(umask=0o002).refused("--overwrite")
    place.converts("--overwrite", umask=0o002).succeeded()
    place.is_right()


def test_folders_without_end_and_pipes_are_no_output(sources, to_megatron, tmp_path: Path) -> None:
    """Made in OUT by somebody who may write in it: a sentence, and no wait."""
    out = tmp_path / "out"
    line = ("llama2", "--model-path", sources(MODEL), "--out", out, "--checksums")
    to_megatron(*line).succeeded()
    opened(out)
    (out / "/".join("a" * 50)).mkdir(parents=True)
    to_megatron(*line).refused("exists")
    shutil.rmtree(out / "a")
    to_megatron(*line).succeeded()
    for name in ("checksums.sha256", "conversion_manifest.json"):
        content = (out / name).read_bytes()
        (out / name).unlink()
        os.mkfifo(out / name)
        to_megatron(*line).refused("exists")
        (out / name).unlink()
        (out / name).write_bytes(content)


def test_a_sum_waits_for_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConversionError, match="a pipe"):
        fileio.sha256(tmp_path / "pipe")
