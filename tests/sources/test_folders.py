"""Paths that are off by a step: followed where they can mean one checkpoint, else one sentence says what they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_models as tm
import torch
from conftest import REPOSITORY, run
from megatron_files import assert_same_tensors
from safetensors.torch import save_file

from weights_conversion.errors import ConversionError
from weights_conversion.sources.detect import Found, Kind, detect

NAME = "llama2"
TRACKER = "latest_checkpointed_iteration.txt"


def export(to_hf, root: Path, out: Path, *options: object):
    return to_hf("--input_dir", root, "--output_dir", out, "--no_tokenizer", *options)


def write(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def root(imported, tmp_path: Path) -> Path:
    """A rank-file checkpoint of TP 2 in tmp_path/in/ckpt."""
    return Path(shutil.copytree(imported(NAME, "--tensor-model-parallel-size", 2), tmp_path / "in" / "ckpt"))


def renamed(root: Path) -> Path:
    """release/ as iteration 800, under another name, outside of any root."""
    there = root.parents[1] / "lone" / "best"
    shutil.copytree(root / "release", there)
    shutil.copy(root / "conversion_manifest.json", there)
    return there


@pytest.mark.parametrize(
    "path",
    [
        lambda root: root / "release",
        lambda root: root / "release" / "mp_rank_01",
        lambda root: root.parent,
        lambda root: root.parents[1],
        renamed,
    ],
    ids=["iteration", "rank", "parent", "grandparent", "renamed iteration"],
)
def test_paths_that_mean_one_checkpoint(path, root: Path, sources, to_hf, tmp_path: Path) -> None:
    export(to_hf, path(root), tmp_path / "out", "--verify", "--model", "llama2").succeeded()
    assert_same_tensors(tm.read_huggingface(tmp_path / "out"), tm.read_huggingface(sources(NAME)))


def test_iteration_folder_as_source_of_another_layout(root: Path, to_megatron, tmp_path: Path) -> None:
    said = to_megatron("llama2", "--model-path", root / "release", "--out", tmp_path / "out", "--verify").succeeded()
    assert "the iteration that is read" in said.out


def test_iteration_folder_of_another_iteration_than_asked(root: Path, to_hf, tmp_path: Path) -> None:
    export(to_hf, root / "release", tmp_path / "out", "--load_iters", 5).refused("--load_iters 5", str(root))


def test_several_iterations_and_no_tracker(root: Path, to_hf, tmp_path: Path) -> None:
    """The advice to name one works."""
    (root / TRACKER).unlink()
    shutil.copytree(root / "release", root / "iter_0000007")
    export(to_hf, root, tmp_path / "out").refused("iter_0000007", "release", "--load_iters")
    export(to_hf, root, tmp_path / "out", "--load_iters", "release").succeeded()


def test_root_that_holds_a_config_is_megatrons_for_every_command(root: Path, sources, to_megatron, tmp_path) -> None:
    """Several trainers leave config.json in the root; --verify took it for a Hugging Face folder."""
    shutil.copy(sources(NAME) / "config.json", root)
    to_megatron("llama2", "--model-path", root, "--out", tmp_path / "out", "--verify").succeeded()
    assert not (tmp_path / "out.unverified").exists()
    shutil.copy(sources(NAME) / "config.json", tmp_path / "out")
    assert run("weights_conversion.verify", root, tmp_path / "out", "--exact-only").succeeded()


def test_several_checkpoints_below(root: Path, to_hf, tmp_path: Path) -> None:
    shutil.copytree(root, root.parent / "other")
    export(to_hf, root.parent, tmp_path / "out").refused("2 checkpoints", "ckpt", "other")


def test_hub_cache(sources, to_megatron, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    shutil.copytree(sources(NAME), cache / "snapshots" / ("0" * 40))
    write(cache / "refs" / "main", b"0" * 40)
    to_megatron("llama2", "--model-path", cache, "--out", tmp_path / "out").succeeded()
    shutil.copytree(sources(NAME), cache / "snapshots" / ("1" * 40))
    said = to_megatron("llama2", "--model-path", cache, "--out", tmp_path / "out2")
    said.refused("hub's cache", "snapshots/" + "0" * 40, "snapshots/" + "1" * 40, "main is")


def quantised(folder: Path) -> None:
    write(folder / "config.json", json.dumps({"quantization_config": {"quant_method": "gptq", "bits": 4}}).encode())
    write(folder / "model.safetensors")


CASES = {
    "adapter": (lambda f: write(f / "adapter_config.json", b'{"base_model_name_or_path": "org/base"}'), "org/base"),
    "deepspeed": (lambda f: write(f / "zero_to_fp32.py"), "DeepSpeed"),
    "deepspeed beside a config": (
        lambda f: (write(f / "config.json", b"{}"), write(f / "global_step8" / "mp_rank_00_model_states.pt")),
        "DeepSpeed",
    ),
    "orbax": (lambda f: write(f / "_CHECKPOINT_METADATA"), "Orbax"),
    "nvrx": (lambda f: write(f / "iter_0000010_0_local.pt"), "nvidia-resiliency-ext"),
    "nvrx of a rank": (lambda f: write(f / "0" / "iter_0000010_0_local.pt"), "nvidia-resiliency-ext"),
    "gptq": (quantised, "quantised model (gptq, 4 bits)"),
    "mistral": (lambda f: write(f / "consolidated.safetensors"), "Mistral's own files"),
    "mistral pth": (
        lambda f: (write(f / "consolidated.00.pth"), write(f / "params.json", b'{"hidden_dim": 8}')),
        "Mistral's own files",
    ),
    "gguf": (lambda f: write(f / "model-q4.gguf"), "GGUF"),
    "weights without a config": (lambda f: write(f / "model.safetensors"), "no config.json"),
    "tokenizer alone": (lambda f: write(f / "tokenizer.json"), "tokenizer"),
    "empty": (lambda f: f.mkdir(parents=True), "empty"),
    "something else": (lambda f: write(f / "notes.txt"), "notes.txt"),
}


@pytest.mark.parametrize("case", CASES)
def test_folders_of_other_programs(case: str, tmp_path: Path) -> None:
    make, words = CASES[case]
    folder = tmp_path / "given"
    make(folder)
    with pytest.raises(ConversionError) as error:
        detect(folder)
    (sentence,) = str(error.value).splitlines()
    assert words in sentence
    assert str(folder) in sentence


def test_every_command_says_the_same(to_megatron, to_hf, tmp_path: Path) -> None:
    folder = tmp_path / "given"
    write(folder / "adapter_config.json", b"{}")
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    to_megatron("llama2", "--model-path", folder, "--out", tmp_path / "out").refused("an adapter alone", "merge")
    export(to_hf, folder, tmp_path / "out").refused("an adapter alone", "merge")
    proof = run("weights_conversion.verify", folder, folder)
    assert proof.code == 2, "trouble, not a difference"
    assert "an adapter alone" in proof.err


def test_files_and_paths_that_are_not_there(root: Path, tmp_path: Path) -> None:
    for path, words in (
        (root / TRACKER, f"give the folder of its checkpoint, {root}"),
        (root / "nowhere", f"{root} is there"),
        (write(tmp_path / "a.gguf"), "GGUF"),
    ):
        with pytest.raises(ConversionError, match=words):
            detect(path)


def test_relative_path_of_an_iteration(root: Path, monkeypatch) -> None:
    monkeypatch.chdir(root / "release")
    found = detect(Path())
    assert (found.kind, found.root.resolve(), found.iteration) == (Kind.MEGATRON, root, "release")
    monkeypatch.chdir(REPOSITORY)


def test_missing_rank_folders_are_one_sentence(imported, to_hf, tmp_path: Path) -> None:
    sizes = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
    root = Path(shutil.copytree(imported("llama2-gqa", *sizes), tmp_path / "in"))
    shutil.rmtree(root / "release" / "mp_rank_01_001")
    export(to_hf, root, tmp_path / "out").refused("mp_rank_01_001 is missing", "was the copy complete?")
    shutil.rmtree(root / "release" / "mp_rank_00_001")
    shutil.rmtree(root / "release" / "mp_rank_01_000")
    said = export(to_hf, root, tmp_path / "out")
    said.refused("3 of 4 rank folders are missing", "(mp_rank_00_001 .. mp_rank_01_001)", "was the copy complete?")
    assert len(said.err.strip().splitlines()) == 1


def test_metas_folder_with_its_tokenizer(tmp_path: Path) -> None:
    for name in ("consolidated.00.pth", "tokenizer.model", "params.json"):
        write(tmp_path / name, b'{"dim": 8, "multiple_of": 16}')
    assert detect(tmp_path) == Found(Kind.META, tmp_path)


def test_huggingface_folder_with_a_config_alone_is_one(tmp_path: Path) -> None:
    write(tmp_path / "config.json", b"{}")
    assert detect(tmp_path) == Found(Kind.HUGGINGFACE, tmp_path)
