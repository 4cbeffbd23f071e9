"""A source that changes while it is read, or between two runs, never becomes a mixture of two models."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
from conftest import Script, run

from tests.robustness import sources
from weights_conversion.engine import run as engine
from weights_conversion.errors import ConversionError
from weights_conversion.output import finishing
from weights_conversion.verification import exact, together
from weights_conversion.verify import verify

verify_module = sys.modules["weights_conversion.verify"]  # the package has a function of that name

GQA = tm.MODELS["llama2-gqa"]


def in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"8 others")


def same_times(path: Path) -> None:
    """As rsync --inplace --times leaves it: the sizes and times are those of before."""
    times = os.stat(path)
    in_place(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replaced(path: Path) -> None:
    """By a file of the same bytes, size and times: whoever replaces one file replaces others."""
    shutil.copy2(path, path.with_name("new"))
    path.with_name("new").replace(path)


def renamed_away(path: Path) -> None:
    path.rename(path.with_name("old"))


def truncated_and_filled(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b" ")


CHANGES = {f.__name__: f for f in (in_place, same_times, replaced, renamed_away, truncated_and_filled, grown)}


def copied(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "source"))


def after_reading(monkeypatch: pytest.MonkeyPatch, change: Callable[[], Any]) -> None:
    """`change` happens when all tensors have been read and written, before the output is finished."""
    execute = engine.execute

    def changed(*arguments: Any) -> None:
        execute(*arguments)
        change()

    monkeypatch.setattr(engine, "execute", changed)


KINDS = {
    "huggingface": ("model.safetensors", ()),
    "config": ("config.json", ()),
    "tokenizer": ("tokenizer.model", ()),
    "ranks": ("release/mp_rank_01/model_optim_rng.pt", ("--tensor-model-parallel-size", 2)),
    "torch_dist": ("release/__0_1.distcp", ("--target", "megatron-core")),
    "metadata": ("release/.metadata", ("--target", "megatron-core")),
    "manifest": ("conversion_manifest.json", ()),
}


def line(kind: str, source: Path, out: Path) -> tuple[Any, ...]:
    if kind in ("huggingface", "config", "tokenizer"):
        return ("hf_to_megatron", "llama2", "--model-path", source, "--out", out)
    return ("megatron_to_hf", "--input_dir", source, "--output_dir", out, "--no_tokenizer")


def source_of(kind: str, sources: Callable[[str], Path], imported: Callable[..., Path]) -> Path:
    hf = kind in ("huggingface", "config", "tokenizer")
    return sources("llama2-gqa") if hf else imported("llama2-gqa", *KINDS[kind][1])


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_changes_while_it_is_read(
    kind: str, change: str, sources, imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copied(source_of(kind, sources, imported), tmp_path)
    file = source / KINDS[kind][0]
    after_reading(monkeypatch, lambda: CHANGES[change](file))
    said = run(*line(kind, source, tmp_path / "out")).refused("has changed while it was read", file.name)
    errors = [text for text in said.err.splitlines() if not text.startswith(("reading ", "writing "))]
    assert len(errors) == 1
    assert not (tmp_path / "out").exists()


def test_between_opening_and_reading(sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to_megatron: Script):
    """The headers were read of one file, the data would be another's."""
    source = copied(sources("llama2-gqa"), tmp_path)
    plan = engine.inconsistencies

    def changed(*arguments: Any) -> list[str]:
        replaced(source / "model.safetensors")
        return plan(*arguments)

    monkeypatch.setattr(engine, "inconsistencies", changed)
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out").refused("has changed while it was read")
    assert not (tmp_path / "out").exists()


def test_training_goes_on(imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to_hf: Script) -> None:
    """The tracker moves on, and the next iteration appears: neither is this one."""
    source = copied(imported("llama2-gqa"), tmp_path)

    def next_iteration() -> None:
        (source / "latest_checkpointed_iteration.txt").write_text("200")
        shutil.copytree(source / "release", source / "iter_0000200")

    after_reading(monkeypatch, next_iteration)
    to_hf("--input_dir", source, "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()


@pytest.mark.parametrize("change", ["same_times", "replaced"])
def test_between_two_runs(change: str, sources, tmp_path: Path, to_megatron: Script) -> None:
    """Of equal sizes and times: what has been written of the one is no beginning of the other."""
    source = copied(sources("llama2-gqa"), tmp_path)
    arguments = ("llama2", "--model-path", source, "--out", tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(finishing, "finish", interrupted)
        assert to_megatron(*arguments).code == 130
    CHANGES[change](source / "model.safetensors")
    assert "starting over" in to_megatron(*arguments).succeeded().text
    to_megatron(*arguments[:-1], tmp_path / "undisturbed").succeeded()
    assert sources_tree(tmp_path / "out") == sources_tree(tmp_path / "undisturbed")


def sources_tree(folder: Path) -> dict[str, str]:
    return sources.tree(folder)


@pytest.mark.parametrize("moment", ["before it is opened", "after it is compared"])
@pytest.mark.parametrize("change", ["in_place", "renamed_away"])
def test_a_source_that_moves_in_a_proof_has_not_failed_it(
    change: str, moment: str, sources, imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to_megatron: Script
) -> None:
    """The output may be right: it is not set aside as one that differs, and the same command goes on."""
    source = copied(sources("llama2-gqa"), tmp_path)
    arguments = ("llama2", "--model-path", source, "--out", tmp_path / "out", "--verify")
    module, name = (verify_module, "verify") if moment.startswith("before") else (together, "compare")
    function = getattr(module, name)

    def changed(*arguments: Any, **named: Any) -> Any:
        if moment.startswith("before"):
            CHANGES[change](source / "model.safetensors")
            return function(*arguments, **named)
        found = function(*arguments, **named)
        CHANGES[change](source / "model.safetensors")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(module, name, changed)
        said = to_megatron(*arguments).refused("model.safetensors has changed while it was read")
    assert "failed its proof" not in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "source"]
    shutil.copy2(sources("llama2-gqa") / "model.safetensors", source)
    (source / "old").unlink(missing_ok=True)
    assert "starting over" in to_megatron(*arguments).succeeded().text
    assert sources_tree(tmp_path / "out") == sources_tree(imported("llama2-gqa"))


def test_a_proof_is_of_what_stands_still(sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the same nor different."""
    one, two = sources("llama2-gqa"), copied(sources("llama2-gqa"), tmp_path)
    compare = exact.compare

    def changed(*arguments: Any) -> Any:
        found = compare(*arguments)
        in_place(two / "model.safetensors")
        return found

    monkeypatch.setattr(exact, "compare", changed)
    with pytest.raises(ConversionError, match=r"has changed while it was read.*; nothing is proven"):
        verify(one, two, exact_only=True)
