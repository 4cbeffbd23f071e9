"""A dry run finds what a run finds, says it in the same words, exits 1 where the run would, and leaves no trace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result, Script

from weights_conversion.engine import memory
from weights_conversion.output import space

Line = Callable[..., Result]


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def problems(result: Result) -> list[str]:
    """The sentences of an error, in any order."""
    lines = [line for line in result.err.splitlines() if line.startswith(("error: ", "  - "))]
    return sorted(line.removeprefix("error: ").removeprefix("  - ") for line in lines)


def little_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(memory, "_left_on_machine", lambda root: iter([1 << 20]))
    patch.setattr(memory, "peak", lambda: 0)


def little_space(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(space, "free_space", lambda out: 1000)


def both(patch: pytest.MonkeyPatch) -> None:
    little_memory(patch)
    little_space(patch)


def foreign_out(root: Path) -> None:
    (root / "out").mkdir()
    (root / "out" / "thesis.txt").write_text("years")


def foreign_partial(root: Path) -> None:
    (root / "out.partial").mkdir()
    (root / "out.partial" / "thesis.txt").write_text("years")


def a_link(root: Path) -> None:
    (root / "elsewhere").mkdir()
    (root / "out").symlink_to(root / "elsewhere")


MACHINES = {"memory": (little_memory, 1), "space": (little_space, 1), "memory and space": (both, 2)}
PLACES = {"OUT": foreign_out, "OUT.partial": foreign_partial, "a link": a_link}


def same_refusal(line: Line, count: int, tmp_path: Path) -> Result:
    before = listing(tmp_path)
    dry = line("--dry-run").refused()
    assert listing(tmp_path) == before, "a dry run has left something"
    wet = line().refused()
    assert listing(tmp_path) == before, "the run has written before its checks had passed"
    assert problems(dry) == problems(wet)
    assert len([text for text in problems(wet) if not text.endswith("problems:")]) == count
    return dry


def importing(to_megatron: Script, source: Path, tmp_path: Path, *options: object) -> Line:
    return lambda *more: to_megatron(
        "llama2", "--model-path", source, "--out", tmp_path / "out", *options, *more
    )  # fmt: skip


@pytest.mark.parametrize("machine", MACHINES)
def test_the_machine(machine: str, sources, imported, to_megatron, to_hf, tmp_path: Path, monkeypatch) -> None:
    patch, count = MACHINES[machine]
    checkpoint = imported("llama2")
    patch(monkeypatch)
    dry = same_refusal(importing(to_megatron, sources("llama2"), tmp_path), count, tmp_path)
    assert "output      " in dry.out, "a dry run shows the plan that cannot be"
    export = ["--input_dir", checkpoint, "--output_dir", tmp_path / "out", "--no_tokenizer"]
    same_refusal(lambda *more: to_hf(*export, *more), count, tmp_path)


@pytest.mark.parametrize("place", PLACES)
def test_the_place(place: str, sources, to_megatron, tmp_path: Path) -> None:
    PLACES[place](tmp_path)
    same_refusal(importing(to_megatron, sources("llama2"), tmp_path), 1, tmp_path)


def test_arguments_and_place_together(sources, to_megatron, tmp_path: Path) -> None:
    foreign_out(tmp_path)
    options = ("--revision", "main", "--ckpt-format", "torch_dist", "--target", "megatron-llm")
    dry = same_refusal(importing(to_megatron, sources("llama2"), tmp_path, *options), 3, tmp_path)
    for words in ("thesis.txt", "--revision main", "torch_dist is Megatron-Core's"):
        assert words in dry.err


def test_the_source_as_a_whole(imported, to_hf, tmp_path: Path) -> None:
    """No tokenizer, and a tensor that is lacking: both are said."""
    broken = shutil.copytree(imported("llama2"), tmp_path / "broken")
    file = broken / "release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    del content["model"]["language_model"]["encoder"]["layers.0.mlp.dense_4h_to_h.weight"]
    torch.save(content, file)
    for name in ("tokenizer.model", "tokenizer.json"):
        (broken / name).unlink(missing_ok=True)
    export = ["--input_dir", broken, "--output_dir", tmp_path / "out"]
    dry = same_refusal(lambda *more: to_hf(*export, *more), 2, tmp_path)
    assert "dense_4h_to_h" in dry.err
    assert "no tokenizer" in dry.err


def test_copies_and_the_machine(imported, to_hf, tmp_path: Path, monkeypatch) -> None:
    """Ranks that differ are found by a dry run too, beside what the machine lacks."""
    torn = shutil.copytree(imported("llama2", "--tensor-model-parallel-size", 2), tmp_path / "torn")
    file = torn / "release/mp_rank_01/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    content["model"]["language_model"]["encoder"]["final_layernorm.weight"] += 1
    torch.save(content, file)
    little_space(monkeypatch)
    export = ["--input_dir", torn, "--output_dir", tmp_path / "out", "--no_tokenizer"]
    dry = same_refusal(lambda *more: to_hf(*export, *more), 2, tmp_path)
    assert "--allow-inconsistent" in dry.err
    assert "free" in dry.err


def test_a_dry_run_that_would_succeed(sources, to_megatron, tmp_path: Path) -> None:
    found = importing(to_megatron, sources("llama2"), tmp_path, "--json", tmp_path / "report.json")("--dry-run")
    found.succeeded()
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_text())["succeeded"] is True
