"""--overwrite, a failed proof and a rerun replace what a conversion wrote, and nothing else."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from weights_conversion.errors import ConversionError
from weights_conversion.output import descriptors, ownership, publish
from weights_conversion.output.ownership import Kind
from weights_conversion.tokenizer.files import TOKENIZER_FILES

MODEL = "llama2-gqa"


def listing(folder: Path) -> dict[str, object]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def line(sources, out: Path, *further: object) -> list[object]:
    return ["llama2", "--model-path", sources(MODEL), "--out", out, *further]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ([], Kind.MEGATRON),
        (["--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2, "--checksums"], Kind.MEGATRON),
        (["--target", "megatron-core"], Kind.MEGATRON),
        (["--target", "megatron-core", "--ckpt-format", "torch"], Kind.MEGATRON),
    ],
)
def test_every_import_is_known_again(options: list[object], kind: Kind, imported) -> None:
    found = ownership.output_in(imported(MODEL, *options))
    assert (found.kind, found.foreign) == (kind, ())
    assert "latest_checkpointed_iteration.txt" in found.files


def test_every_export_is_known_again(imported, to_hf, tmp_path: Path) -> None:
    for number, options in enumerate(([], ["--num_output_shards", 3, "--checksums"], ["--no_tokenizer"])):
        out = tmp_path / str(number)
        to_hf("--input_dir", imported(MODEL), "--output_dir", out, *options).succeeded()
        found = ownership.output_in(out)
        assert (found.kind, found.foreign) == (Kind.HUGGINGFACE, ())


def test_tokenizer_files_are_known() -> None:
    assert set(TOKENIZER_FILES) <= ownership._TOKENIZER


def trained(out: Path) -> None:
    (out / "iter_0000200" / "mp_rank_00").mkdir(parents=True)
    (out / "iter_0000200" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"years of work")


def moved_on(out: Path) -> None:
    trained(out)
    (out / "latest_checkpointed_iteration.txt").write_text("200")


def notes(out: Path) -> None:
    (out / "release" / "notes.txt").write_text("mine")


def optimizer(out: Path) -> None:
    (out / "release" / "mp_rank_00" / "distrib_optim.pt").write_text("mine")


def linked(out: Path) -> None:
    (out / "tokenizer.model").unlink()
    (out / "tokenizer.model").symlink_to("/etc/hostname")


def linked_release(out: Path) -> None:
    (out / "release").rename(out.parent / "elsewhere")
    (out / "release").symlink_to(out.parent / "elsewhere")


def other_models(out: Path) -> None:
    shutil.rmtree(out)
    (out / "mistral-7b").mkdir(parents=True)
    (out / "mistral-7b" / "model.safetensors").write_bytes(b"another model")


def without_manifest(out: Path) -> None:
    (out / "conversion_manifest.json").unlink()


def empty_folder(out: Path) -> None:
    (out / "logs").mkdir()


FOREIGN = {
    trained: "iter_0000200", moved_on: "iter_0000200", notes: "release/notes.txt", optimizer: "distrib_optim.pt",
    linked: "tokenizer.model", linked_release: "release", other_models: "mistral-7b", empty_folder: "logs",
    without_manifest: "release",
}  # fmt: skip


@pytest.mark.parametrize("add", FOREIGN, ids=lambda add: add.__name__)
@pytest.mark.parametrize("dry", [True, False])
def test_what_is_foreign_stays(add, dry: bool, imported, sources, to_megatron, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(imported(MODEL), out)
    add(out)
    before = listing(tmp_path)
    for options in ([], ["--overwrite"]):
        dry_run = ["--dry-run"] if dry else []
        found = to_megatron(*line(sources, out, *options, *dry_run)).refused(FOREIGN[add], "no conversion wrote")
        assert "--overwrite" not in found.err
    assert listing(tmp_path) == before


@pytest.mark.parametrize("change", ["saved again", "a readme", "weights of training"])
def test_a_model_that_others_saved_stays(change: str, imported, to_hf, tmp_path: Path) -> None:
    """An export is known by its files, until another program writes into them."""
    out = tmp_path / "hf"
    command = ["--input_dir", imported(MODEL), "--output_dir", out, "--no_tokenizer", "--overwrite"]
    to_hf(*command).succeeded()
    if change == "saved again":
        save_file(load_file(out / "model.safetensors"), out / "model.safetensors", metadata={"format": "pt"})
    elif change == "a readme":
        (out / "README.md").write_text("mine")
    else:
        (out / "optimizer.pt").write_bytes(b"mine")
    before = listing(tmp_path)
    to_hf(*command).refused("no conversion wrote")
    assert listing(tmp_path) == before


def test_a_dry_run_lists_what_would_go(imported, sources, to_megatron, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(imported(MODEL, "--tensor-model-parallel-size", 2), out)
    before = listing(tmp_path)
    said = to_megatron(*line(sources, out, "--overwrite", "--dry-run")).succeeded().out
    for name, content in listing(out).items():
        assert content is False or f"replaces {name}" in said
    assert listing(tmp_path) == before
    assert "replaces" in to_megatron(*line(sources, out, "--overwrite")).succeeded().out


def test_what_comes_during_the_run_stays(imported, sources, to_megatron, tmp_path: Path, monkeypatch) -> None:
    """Foreign files in an OUT that --overwrite was to replace, put there after the first look."""
    out = tmp_path / "out"
    shutil.copytree(imported(MODEL), out)
    real = publish.publish

    def late(*arguments, **keywords) -> None:
        (out / "thesis.txt").write_text("years")
        real(*arguments, **keywords)

    monkeypatch.setattr(publish, "publish", late)
    to_megatron(*line(sources, out, "--overwrite")).refused("thesis.txt", "meantime")
    assert (out / "thesis.txt").read_text() == "years"
    assert ownership.output_in(out).foreign == ("thesis.txt",)


@pytest.mark.parametrize("exchange", [True, False])
def test_what_comes_while_folders_are_exchanged_stays(
    exchange: bool, imported, sources, to_megatron, tmp_path: Path, monkeypatch
) -> None:  # fmt: skip
    out = tmp_path / "out"
    shutil.copytree(imported(MODEL), out)
    real = publish.exchange

    def late(*arguments) -> bool:
        if not (out / "thesis.txt").exists():
            (out / "thesis.txt").write_text("years")
        return exchange and real(*arguments)

    monkeypatch.setattr(publish, "exchange", late)
    to_megatron(*line(sources, out, "--overwrite")).refused("thesis.txt")
    assert (out / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("place", ["checkpoint/thesis.txt", "thesis.txt", "journal/thesis.txt", "replaced/thesis.txt"])
def test_foreign_things_in_partial(place: str, sources, to_megatron, tmp_path: Path) -> None:
    path = tmp_path / "out.partial" / place
    path.parent.mkdir(parents=True)
    path.write_text("years")
    before = listing(tmp_path)
    for options in ([], ["--overwrite"], ["--dry-run"]):
        to_megatron(*line(sources, tmp_path / "out", *options)).refused("thesis.txt", "move it away")
    assert listing(tmp_path) == before


def test_a_users_own_unverified_stays(sources, to_megatron, tmp_path: Path, monkeypatch) -> None:
    aside = tmp_path / "out.unverified"
    aside.mkdir()
    (aside / "thesis.txt").write_text("years")
    before = listing(tmp_path)
    to_megatron(*line(sources, tmp_path / "out", "--verify")).refused("thesis.txt", "out.unverified")
    assert listing(tmp_path) == before
    to_megatron(*line(sources, tmp_path / "out")).succeeded()


def test_unverified_that_comes_during_the_run(sources, to_megatron, tmp_path: Path, monkeypatch) -> None:
    from weights_conversion.verbs import to_megatron as module

    def fails(*_: object, **__: object):
        def prove(folder: Path) -> str:
            (tmp_path / "out.unverified").mkdir()
            (tmp_path / "out.unverified" / "thesis.txt").write_text("years")
            raise ConversionError("the output has failed its proof")

        return prove

    monkeypatch.setattr(module, "proof", fails)
    to_megatron(*line(sources, tmp_path / "out", "--verify")).refused("failed its proof", "out.partial")
    assert (tmp_path / "out.unverified" / "thesis.txt").read_text() == "years"
    assert not (tmp_path / "out").exists()


def layout_again(source: Path, out: Path) -> list[object]:
    return ["llama2", "--model-path", source, "--out", out, "--overwrite"]


@pytest.mark.parametrize("place", ["out", "out.partial/checkpoint", "out.partial/replaced", "out.unverified"])
def test_a_source_inside_is_refused(place: str, imported, to_hf, to_megatron, tmp_path: Path) -> None:
    source = tmp_path / place
    shutil.copytree(imported(MODEL), source)
    before = listing(tmp_path)
    to_hf("--input_dir", source, "--output_dir", tmp_path / "out", "--overwrite", "--no_tokenizer").refused(str(source))
    to_megatron(*layout_again(source, tmp_path / "out")).refused(str(source))
    assert listing(tmp_path) == before


def test_a_source_inside_through_links(imported, to_megatron, tmp_path: Path) -> None:
    """A link to OUT, and one from outside through a link that stands in OUT."""
    out = tmp_path / "out"
    shutil.copytree(imported(MODEL), out)
    (tmp_path / "alias").symlink_to(out)
    to_megatron(*layout_again(tmp_path / "alias", out)).refused("holds the source")
    real, unverified = tmp_path / "real", tmp_path / "out.unverified"
    shutil.copytree(imported(MODEL), real)
    unverified.mkdir()
    (unverified / "step").symlink_to(real)
    (tmp_path / "chain").symlink_to(unverified / "step")
    before = listing(tmp_path)
    to_megatron(*layout_again(tmp_path / "chain", out)).refused("holds the source")
    assert listing(tmp_path) == before


def test_weights_that_are_links_elsewhere(imported, to_megatron, tmp_path: Path) -> None:
    """OUT is the source: its tracker, manifest and tokenizer stay."""
    out, weights = tmp_path / "out", tmp_path / "weights"
    shutil.copytree(imported(MODEL), out)
    (out / "release" / "mp_rank_00").rename(weights)
    (out / "release" / "mp_rank_00").symlink_to(weights)
    before = listing(tmp_path)
    to_megatron(*layout_again(out, out)).refused()
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["latest_checkpointed_iteration.txt", "conversion_manifest.json"])
def test_an_output_that_cannot_be_read_is_not_foreign(name: str, imported, tmp_path: Path, monkeypatch) -> None:
    """A server that is gone for a moment says nothing about whose the files are: the sentence is about the reading."""
    shutil.copytree(imported("llama2-gqa"), tmp_path / "out")
    opened = descriptors.open_regular

    def open_regular(wanted: str, within: int, flags: int) -> int:
        if wanted == name:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), wanted)
        return opened(wanted, within, flags)

    monkeypatch.setattr(descriptors, "open_regular", open_regular)
    with pytest.raises(OSError, match="Stale"):
        ownership.output_in(tmp_path / "out")
