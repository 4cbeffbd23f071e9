"""What must be refused: exit 1, sentences on stderr that name the finding, and not a byte written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
from conftest import REPOSITORY, Result, Script
from megatron_files import Chunks, assert_same_tensors, load_rank, save_rank, write_checkpoint
from naive_layout import megatron_ranks
from safetensors.torch import load_file, save_file

LLAMA, FALCON = tm.MODELS["llama2"], tm.MODELS["falcon-40b"]
GQA = tm.MODELS["llama2-gqa"]


def listing(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in root.rglob("*")}


@pytest.fixture
def refuse_import(to_megatron: Script, tmp_path: Path) -> Callable[..., Result]:
    """Runs the import of `source`, expects a refusal that holds `words`, and that the disk is as it was."""

    def check(family: str, source: Path, *options: Any, words: tuple[str, ...] = (), meta: bool = False) -> Result:
        before = listing(tmp_path)
        where = "--cache-dir" if meta else "--model-path"
        result = to_megatron(family, where, source, "--out", tmp_path / "out", *options).refused(*words)
        assert listing(tmp_path) == before, "something was written"
        return result

    return check


@pytest.fixture
def refuse_export(to_hf: Script, tmp_path: Path) -> Callable[..., Result]:
    def check(checkpoint: Path, *options: Any, words: tuple[str, ...] = (), tokenizer: bool = False) -> Result:
        before = listing(tmp_path)
        common = [
            "--input_dir",
            checkpoint,
            "--output_dir",
            tmp_path / "out",
            *([] if tokenizer else ["--no_tokenizer"]),
        ]
        result = to_hf(*common, *options).refused(*words)
        assert listing(tmp_path) == before, "something was written"
        return result

    return check


def training(
    folder: Path, model: tm.Tiny, tp: int = 1, pp: int = 1, change: Callable[[Chunks], None] | None = None, **args: Any
) -> Path:
    """A checkpoint as training leaves it, with `change` made to its tensors."""
    rows = 512 if tp > 1 else model.vocab
    ranks = {
        key: {name: tensor.clone() for name, tensor in tensors.items()}
        for key, tensors in megatron_ranks(model.config(), model.tensors(), tp, pp, rows=rows).items()
    }
    if change:
        change(ranks)
    write_checkpoint(folder, ranks, tm.training_args(model, tp, pp, rows=rows) | args, 7)
    return folder


def edit_rank(path: Path, **changes: Any) -> None:
    save_rank(load_rank(path) | changes, path)


# --- the source's config ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name", "word"),
    [
        ("falcon", "llama2", "llama"),
        ("llama2", "falcon-7b", "falcon"),
        ("mistral", "llama2", "llama"),
        ("llama", "mistral-v0.1", "mistral"),
        ("codellama", "falcon-11b", "falcon"),
    ],
)
def test_wrong_family(family: str, name: str, word: str, sources, refuse_import) -> None:
    refuse_import(family, sources(name), words=(family, word))


@pytest.mark.parametrize(("family", "name", "size"), [("llama2", "llama2", 13), ("falcon", "falcon-7b", 7)])
def test_size_against_config(family: str, name: str, size: int, sources, refuse_import) -> None:
    """A size that is asked for is compared with the config, whose numbers are named."""
    refuse_import(family, sources(name), "--size", size, words=("--size", str(size), "64"))


def test_size_against_meta_params(tmp_path: Path, refuse_import) -> None:
    tm.write_meta(tmp_path / "meta", replace(LLAMA, heads=8, groups=8, head_dim=8), 1)
    refuse_import("llama2", tmp_path / "meta", "--size", "7", meta=True, words=("--size", "64"))


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 1024} | more


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("name", "spelling", "changes", "word"),
    [
        ("llama2", 5, {"attention_bias": True}, "attention_bias"),
        ("llama2", 5, {"mlp_bias": True}, "mlp_bias"),
        ("llama2", 5, {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("mistral-v0.1", 5, {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("llama2", 5, {"hidden_act": "gelu"}, "hidden_act"),
        ("llama2", 4, {"rope_scaling": rope("yarn")}, "yarn"),
        ("llama2", 4, {"rope_scaling": rope("llama3", **LLAMA3)}, "llama3"),
        ("llama2", 4, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("codellama", 5, {"rope_parameters": rope("yarn", rope_theta=1e6)}, "yarn"),
        ("llama2", 5, {"rope_parameters": rope("llama3", rope_theta=1e4, **LLAMA3)}, "llama3"),
        ("llama2", 5, {"rope_parameters": rope("dynamic", rope_theta=1e4)}, "dynamic"),
        ("falcon-7b", 5, {"alibi": True}, "alibi"),
        ("falcon-7b", 5, {"parallel_attn": False}, "parallel_attn"),
        ("falcon-7b", 5, {"bias": True}, "bias"),
        ("falcon-7b", 5, {"activation": "relu"}, "activation"),
        ("falcon-7b", 4, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ],
)
def test_features_megatron_lacks(name, spelling, changes, word, tmp_path: Path, refuse_import) -> None:
    model = tm.MODELS[name]
    source = tm.write_huggingface(tmp_path / "hf", model, spelling=spelling, changes=changes, tokenizer=False)
    refuse_import(model.family, source, words=(word,))


def test_two_rope_spellings_that_disagree(tmp_path: Path, refuse_import) -> None:
    """One says default, the other yarn: whichever is meant, it must not be guessed."""
    changes = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 10000.0}
    source = tm.write_huggingface(tmp_path / "hf", LLAMA, spelling=5, changes=changes, tokenizer=False)
    refuse_import("llama2", source, words=("rope",))


def test_no_config(tmp_path: Path, refuse_import) -> None:
    source = tm.write_huggingface(tmp_path / "hf", LLAMA, tokenizer=False)
    (source / "config.json").unlink()
    refuse_import("llama2", source, words=("config.json",))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "llama"}', '{"model_type": 3}'])
def test_unreadable_config(text: str, tmp_path: Path, refuse_import) -> None:
    source = tm.write_huggingface(tmp_path / "hf", LLAMA, tokenizer=False)
    (source / "config.json").write_text(text)
    refuse_import("llama2", source)


def test_absent_model_path(tmp_path: Path, refuse_import) -> None:
    refuse_import("llama2", tmp_path / "nowhere", words=("nowhere",))


# --- the source's weights ---------------------------------------------------------------------------------------------


def test_no_weights(tmp_path: Path, refuse_import) -> None:
    source = tm.write_huggingface(tmp_path / "hf", LLAMA, tokenizer=False)
    (source / "model.safetensors").unlink()
    refuse_import("llama2", source)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_missing_shard(kind: str, tmp_path: Path, refuse_import) -> None:
    source = tm.write_huggingface(tmp_path / "hf", LLAMA, parts=3, kind=kind, tokenizer=False)
    gone = sorted(source.glob(f"*-00002-of-00003.{kind}"))[0]
    gone.unlink()
    refuse_import("llama2", source, words=(gone.name,))


def test_missing_meta_part(tmp_path: Path, refuse_import) -> None:
    model = replace(LLAMA, heads=8, groups=8, head_dim=8)
    tm.write_meta(tmp_path / "meta", model, 4)
    (tmp_path / "meta" / "consolidated.02.pth").unlink()
    refuse_import("llama2", tmp_path / "meta", meta=True, words=("consolidated",))


def test_missing_last_meta_part(tmp_path: Path, refuse_import) -> None:
    """Without the last part no number is skipped; the shapes must tell."""
    model = replace(LLAMA, heads=8, groups=8, head_dim=8)
    tm.write_meta(tmp_path / "meta", model, 4)
    (tmp_path / "meta" / "consolidated.03.pth").unlink()
    refuse_import("llama2", tmp_path / "meta", meta=True)


def test_meta_norms_that_differ(tmp_path: Path, refuse_import) -> None:
    """Norms are copied into every part, so parts of two models can be told apart."""
    contents = tm.write_meta(tmp_path / "meta", replace(LLAMA, heads=8, groups=8, head_dim=8), 2)
    contents[1]["layers.1.ffn_norm.weight"] += 1
    torch.save(contents[1], tmp_path / "meta" / "consolidated.01.pth")
    refuse_import("llama2", tmp_path / "meta", meta=True, words=("ffn_norm",))


Edit = Callable[[tm.Tensors], Any]
UP = "model.layers.1.mlp.up_proj.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(UP), (UP,)),
        (lambda t: t.pop("lm_head.weight"), ("lm_head.weight",)),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[UP].clone()}),
            ("model.layers.2.mlp.up_proj.weight",),
        ),
        (lambda t: t.update({"model.extra.weight": torch.ones(3)}), ("model.extra.weight",)),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), ("q_proj.bias",)),
        (lambda t: t.update({UP: t[UP][:-1].clone()}), (UP, "79", "80")),
        (lambda t: t.update({UP: t[UP].t().contiguous()}), (UP,)),
        (lambda t: t.update({Q: t[Q].reshape(32, 128)}), (Q, "32", "128")),
        (lambda t: t.update({"model.norm.weight": torch.ones(65)}), ("model.norm.weight", "65")),
        (
            lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:-2].clone()}),
            ("318", "320"),
        ),
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_tensors_that_do_not_fit(
    kind: str, change: Edit, words: tuple[str, ...], tmp_path: Path, refuse_import
) -> None:
    tensors = dict(LLAMA.tensors())
    change(tensors)
    source = tm.write_huggingface(tmp_path / "hf", LLAMA, tensors=tensors, kind=kind, tokenizer=False)
    refuse_import("llama2", source, words=words)


def test_all_problems_at_once(tmp_path: Path, refuse_import) -> None:
    tensors = dict(LLAMA.tensors())
    tensors.pop(UP)
    tensors["model.extra.weight"] = torch.ones(3)
    tensors[Q] = tensors[Q][:-2].clone()
    source = tm.write_huggingface(tmp_path / "hf", LLAMA, tensors=tensors, tokenizer=False)
    refuse_import("llama2", source, words=(UP, "model.extra.weight", Q))


def test_tensor_in_two_shards(tmp_path: Path, refuse_import) -> None:
    source = tm.write_huggingface(tmp_path / "hf", LLAMA, parts=2, tokenizer=False)
    weight_map = tm.read_json(source / "model.safetensors.index.json")["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map["model.norm.weight"])
    both = load_file(source / other) | {"model.norm.weight": LLAMA.tensors()["model.norm.weight"] * 2}
    save_file(both, source / other, metadata={"format": "pt"})
    refuse_import("llama2", source, words=("model.norm.weight",))


def test_index_names_a_tensor_that_its_shard_lacks(tmp_path: Path, refuse_import) -> None:
    source = tm.write_huggingface(tmp_path / "hf", LLAMA, parts=2, tokenizer=False)
    path = source / "model.safetensors.index.json"
    index = tm.read_json(path)
    index["weight_map"][UP] = next(file for file in index["weight_map"].values() if file != index["weight_map"][UP])
    tm.write_json(path, index)
    refuse_import("llama2", source, words=(UP,))


@pytest.mark.parametrize("part", [0.999, 0.5, 0.01])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_truncated_huggingface(kind: str, part: float, tmp_path: Path, refuse_import) -> None:
    source = tm.write_huggingface(tmp_path / "hf", LLAMA, kind=kind, tokenizer=False)
    path = next(source.glob(f"*.{kind}"))
    os.truncate(path, int(path.stat().st_size * part))
    refuse_import("llama2", source, words=(path.name,))


def test_truncated_meta(tmp_path: Path, refuse_import) -> None:
    tm.write_meta(tmp_path / "meta", replace(LLAMA, heads=8, groups=8, head_dim=8), 2)
    path = tmp_path / "meta" / "consolidated.01.pth"
    os.truncate(path, path.stat().st_size - 1000)
    refuse_import("llama2", tmp_path / "meta", meta=True, words=(path.name,))


@pytest.mark.parametrize("junk", [b"", b"\x00" * 100, b"\xff" * 8 + b"{}", (1 << 62).to_bytes(8, "little") + b"{}"])
def test_junk_safetensors(junk: bytes, tmp_path: Path, refuse_import) -> None:
    source = tm.write_huggingface(tmp_path / "hf", LLAMA, tokenizer=False)
    (source / "model.safetensors").write_bytes(junk)
    refuse_import("llama2", source, words=("model.safetensors",))


def test_tied_head_that_differs(tmp_path: Path, refuse_import) -> None:
    """falcon says that its head is its embedding; a head that is another matrix would be lost."""
    table = FALCON.tensors()["transformer.word_embeddings.weight"]
    tensors = {**FALCON.tensors(), "lm_head.weight": table * 2}
    source = tm.write_huggingface(tmp_path / "hf", FALCON, tensors=tensors, tokenizer=False)
    refuse_import("falcon", source, words=("lm_head.weight",))


class Bomb:
    """Unpickling it creates a file, where the loader lets it."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("where", ["bin", "meta"])
def test_hostile_source(where: str, tmp_path: Path, refuse_import) -> None:
    target = tmp_path / "touched"
    if where == "bin":
        source = tm.write_huggingface(tmp_path / "src", LLAMA, kind="bin", tokenizer=False)
        torch.save({**LLAMA.tensors(), "bomb": Bomb(target)}, source / "pytorch_model.bin")
    else:
        source = tmp_path / "src"
        contents = tm.write_meta(source, replace(LLAMA, heads=8, groups=8, head_dim=8), 1)
        torch.save({**contents[0], "bomb": Bomb(target)}, source / "consolidated.00.pth")
    refuse_import("llama2", source, meta=where == "meta", words=(f"{os.mkdir.__module__}.mkdir",))
    assert not target.exists()


# --- the layout -------------------------------------------------------------------------------------------------------


def cut(tp: int = 1, pp: int = 1, virtual: int | None = None) -> list[Any]:
    options: list[Any] = ["--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp]
    return options + ([] if virtual is None else ["--num-layers-per-virtual-pipeline-stage", virtual])


@pytest.mark.parametrize(
    ("name", "changes", "options", "words"),
    [
        ("llama2-gqa", {}, cut(tp=8), ("4", "8")),  # k % TP: 8 heads, 4 groups
        ("llama2", {"heads": 6, "groups": 6, "head_dim": 8}, cut(tp=4), ("6", "4")),  # n % TP
        ("llama2", {"ffn": 81}, cut(tp=2), ("81", "2")),  # F % TP
        ("llama2", {"layers": 3}, cut(pp=2), ("3", "2")),  # L % PP
        ("llama2-gqa", {}, cut(pp=2, virtual=3), ("4", "2", "3")),  # L % (PP x VPP)
        ("llama2", {"layers": 6}, cut(pp=2, virtual=2), ("6", "2")),
        (
            "llama2-gqa",
            {},
            cut(virtual=2),
            ("--num-layers-per-virtual-pipeline-stage", "--pipeline-model-parallel-size"),
        ),
        ("falcon-7b", {}, cut(tp=2), ("1", "2")),
        ("falcon-40b", {}, cut(tp=4), ("2", "4")),
        ("llama2", {}, cut(pp=4), ("2", "4")),
    ],
)
def test_layouts_that_do_not_divide(name, changes, options, words, tmp_path: Path, refuse_import) -> None:
    model = replace(tm.MODELS[name], **changes)
    source = tm.write_huggingface(tmp_path / "hf", model, tokenizer=False)
    refuse_import(model.family, source, *options, words=words)


@pytest.mark.parametrize("option", ["tensor-model-parallel-size", "pipeline-model-parallel-size", "true-vocab-size"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_sizes_below_one(option: str, value: str, to_megatron, sources, tmp_path: Path) -> None:
    result = to_megatron("llama2", "--model-path", sources("llama2"), "--out", tmp_path / "out", f"--{option}={value}")
    assert result.code in (1, 2)
    assert "Traceback" not in result.text
    assert result.err
    assert not list(tmp_path.iterdir())


# --- the output -------------------------------------------------------------------------------------------------------


def test_existing_output(sources, tmp_path: Path, refuse_import) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    refuse_import("llama2", sources("llama2"), words=("mine", "no conversion wrote"))


def test_existing_output_is_refused_before_the_source_is_read(tmp_path: Path, refuse_import) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    refuse_import("llama2", tmp_path / "nowhere", words=("mine", "no conversion wrote"))


def test_existing_export(imported, tmp_path: Path, refuse_export) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    refuse_export(imported("llama2"), words=("mine", "no conversion wrote"))


@pytest.mark.parametrize("out", ["hf", ".", "hf/inner"])
def test_output_on_top_of_the_source(out: str, to_megatron, tmp_path: Path) -> None:
    """--overwrite must not replace what is being read: the source itself, or a folder that it stands in."""
    base = tmp_path / "base"
    source = tm.write_huggingface(base / "hf", LLAMA, tokenizer=False)
    before = listing(source)
    result = to_megatron("llama2", "--model-path", source, "--out", base / out, "--overwrite")
    assert {path: size for path, size in listing(source).items() if path in before} == before, "the source was replaced"
    if out != "hf/inner":  # a new folder within the source harms nothing
        result.refused()


@pytest.mark.parametrize("out", ["mt", ".", "mt/iter_0000007"])
def test_export_on_top_of_the_checkpoint(out: str, to_hf, tmp_path: Path) -> None:
    base = tmp_path / "base"
    root = training(base / "mt", LLAMA)
    before = listing(root)
    result = to_hf("--input_dir", root, "--output_dir", base / out, "--no_tokenizer", "--overwrite")
    assert listing(root) == before, "the checkpoint was replaced"
    result.refused()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file system has a kilobyte left, whoever asks."""
    real = os.statvfs

    def little(path: Any) -> os.statvfs_result:
        values = list(real(path))
        values[0] = values[1] = 1024  # block size
        values[3] = values[4] = 1  # free blocks
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", little)
    monkeypatch.setattr(os, "fstatvfs", little)


def test_disk_too_small(sources, imported, tmp_path: Path, refuse_import, refuse_export, request) -> None:
    source, checkpoint = sources("llama2"), imported("llama2")
    request.getfixturevalue("full_disk")
    refuse_import("llama2", source, words=("free",))
    refuse_export(checkpoint, words=("free",))


def test_write_error(sources, tmp_path: Path) -> None:
    """The file system says no in the middle: a sentence, exit 1, and no OUT that looks finished."""
    resource = pytest.importorskip("resource")
    command = [
        sys.executable,
        REPOSITORY / "hf_to_megatron.py",
        "llama2",
        "--model-path",
        sources("llama2"),
        "--out",
        "out",
    ]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1, done.stderr
    assert done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_more_shards_than_tensors(imported, refuse_export) -> None:
    refuse_export(imported("llama2"), "--num_output_shards", 22, words=("22", "21"))


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def test_no_tracker(tmp_path: Path, refuse_export) -> None:
    """One iteration needs no tracker; of two, nothing says which is meant."""
    root = training(tmp_path / "mt", LLAMA)
    (root / "latest_checkpointed_iteration.txt").unlink()
    (one,) = root.glob("iter_*")
    shutil.copytree(one, root / "iter_0000900")
    refuse_export(root, words=("latest_checkpointed_iteration.txt", one.name, "iter_0000900", "--load_iters"))


def test_absent_checkpoint(tmp_path: Path, refuse_export) -> None:
    refuse_export(tmp_path / "nowhere", words=("nowhere",))


@pytest.mark.parametrize("text", ["8", "release", "", "seven", "-7", "0"])
def test_tracker_without_its_iteration(text: str, tmp_path: Path, refuse_export) -> None:
    root = training(tmp_path / "mt", LLAMA)
    (root / "latest_checkpointed_iteration.txt").write_text(text)
    refuse_export(root)


def test_absent_iteration(tmp_path: Path, refuse_export) -> None:
    refuse_export(training(tmp_path / "mt", LLAMA), "--load_iters", 99, words=("99",))


@pytest.mark.parametrize(
    "gone", [["mp_rank_01_001"], ["mp_rank_01_000", "mp_rank_01_001"], ["mp_rank_00_001", "mp_rank_01_001"]]
)
def test_missing_rank(gone: list[str], tmp_path: Path, refuse_export) -> None:
    """One rank, the last tensor rank of every stage, and the whole last stage."""
    root = training(tmp_path / "mt", GQA, 2, 2)
    for name in gone:
        shutil.rmtree(root / "iter_0000007" / name)
    refuse_export(root, words=(gone[0],))


def test_stale_ranks(tmp_path: Path, refuse_export) -> None:
    """Rank files that another layout left in the same folder."""
    root = training(tmp_path / "mt", GQA, 2, 1)
    other = training(tmp_path / "other", GQA, 2, 2)
    for path in (other / "iter_0000007").iterdir():
        shutil.copytree(path, root / "iter_0000007" / path.name)
    refuse_export(root)


def test_two_model_files_in_one_rank(tmp_path: Path, refuse_export) -> None:
    """One with, one without the distributed optimizer: which is the newer, nobody can tell."""
    root = training(tmp_path / "mt", LLAMA)
    path = next(root.rglob("model_optim_rng.pt"))
    shutil.copy(path, path.with_name("model_rng.pt"))
    refuse_export(root, words=("model_rng.pt",))


def test_ranks_of_two_iterations(tmp_path: Path, refuse_export) -> None:
    root = training(tmp_path / "mt", GQA, 2, 1)
    edit_rank(root / "iter_0000007" / "mp_rank_01" / "model_optim_rng.pt", iteration=8)
    refuse_export(root, words=("7", "8"))


def test_ranks_of_two_layouts(tmp_path: Path, refuse_export) -> None:
    """A rank that a run with another tensor parallel size left behind."""
    root = training(tmp_path / "mt", GQA, 2, 1)
    path = root / "iter_0000007" / "mp_rank_01" / "model_optim_rng.pt"
    args = load_rank(path)["args"]
    args.tensor_model_parallel_size = 4
    edit_rank(path, args=args)
    refuse_export(root)


@pytest.mark.parametrize("how", ["swapped", "copied", "swapped stages"])
def test_ranks_in_each_others_folders(how: str, to_hf, tmp_path: Path, refuse_export) -> None:
    """Shapes are the same, so that nothing but the writer's number in the args tells."""
    root = training(tmp_path / "mt", GQA, 2, 2)
    folder = root / "iter_0000007"
    for stage in range(2):
        for tp in range(2):
            path = folder / f"mp_rank_{tp:02d}_{stage:03d}" / "model_optim_rng.pt"
            args = load_rank(path)["args"]
            args.rank = 8 * stage + tp  # four replicas between the stages
            edit_rank(path, args=args)
    assert to_hf("--input_dir", root, "--output_dir", tmp_path / "right", "--no_tokenizer").code == 0
    one, other = folder / "mp_rank_00_000", folder / ("mp_rank_00_001" if how == "swapped stages" else "mp_rank_01_000")
    if how == "copied":
        shutil.copy(one / "model_optim_rng.pt", other / "model_optim_rng.pt")
    else:
        one.rename(folder / "x")
        other.rename(one)
        (folder / "x").rename(other)
    refuse_export(root, words=("was written by process", "args.rank"))


def change_norm(ranks: Chunks) -> None:
    ranks[1, 1, 0]["encoder.layers.0.input_layernorm.weight"] += 1


def test_norms_that_differ(to_hf, tmp_path: Path, refuse_export) -> None:
    root = training(tmp_path / "mt", GQA, 2, 2, change_norm)
    refuse_export(root, words=("input_layernorm.weight", "--allow-inconsistent"))
    options = ["--no_tokenizer", "--allow-inconsistent", "--true_vocab_size", GQA.vocab]
    to_hf("--input_dir", root, "--output_dir", tmp_path / "hf", *options).succeeded()
    assert_same_tensors(tm.read_huggingface(tmp_path / "hf"), GQA.tensors())


def test_tied_copy_that_differs(to_hf, tmp_path: Path, refuse_export) -> None:
    def change(ranks: Chunks) -> None:
        ranks[1, 1, 0]["word_embeddings_for_head.weight"][3] += 1

    root = training(tmp_path / "mt", FALCON, 2, 2, change)
    refuse_export(root, "--model", "falcon", words=("word_embeddings_for_head", "--allow-inconsistent"))
    options = ["--model", "falcon", "--no_tokenizer", "--allow-inconsistent", "--true_vocab_size", FALCON.vocab]
    to_hf("--input_dir", root, "--output_dir", tmp_path / "hf", *options).succeeded()
    assert_same_tensors(tm.read_huggingface(tmp_path / "hf"), FALCON.tensors())


DOWN = "encoder.layers.1.mlp.dense_4h_to_h.weight"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda rank: rank.pop(DOWN), "layers.1.mlp.dense_4h_to_h.weight"),
        (lambda rank: rank.update({DOWN: rank[DOWN][:, :-1].clone()}), "dense_4h_to_h.weight"),
        (lambda rank: rank.update({"encoder.layers.1.mlp.dense_4h_to_h.bias": torch.ones(64)}), "dense_4h_to_h.bias"),
        (lambda rank: rank.update({"encoder.layers.7.mlp.dense_4h_to_h.weight": rank[DOWN].clone()}), "layers.7."),
        (lambda rank: rank.pop("encoder.final_layernorm.weight"), "final_layernorm.weight"),
        (lambda rank: rank.pop("lm_head"), "lm_head"),
        (lambda rank: rank.update({"lm_head": rank["lm_head"][:-1].clone()}), "lm_head"),
    ],
)
@pytest.mark.parametrize("tp", [1, 2])
def test_checkpoint_tensors_that_do_not_fit(tp: int, change: Edit, word: str, tmp_path: Path, refuse_export) -> None:
    root = training(tmp_path / "mt", GQA if tp > 1 else LLAMA, tp, 1, lambda ranks: change(ranks[tp - 1, 0, 0]))
    refuse_export(root, words=(word,))


@pytest.mark.parametrize(
    ("family", "name"),
    [("falcon", "llama2"), ("llama2", "falcon-40b"), ("mistral", "llama2"), ("llama2", "mistral-v0.1")],
)
def test_export_of_the_wrong_family(family: str, name: str, tmp_path: Path, refuse_export) -> None:
    model = tm.MODELS[name]
    root = training(tmp_path / "mt", model)
    refuse_export(root, "--model", family, words=(family, model.family))


@pytest.mark.parametrize(("family", "name"), [("llama2", "codellama"), ("codellama", "llama2"), ("llama", "llama2")])
def test_export_of_a_sister_family(family: str, name: str, tmp_path: Path, refuse_export) -> None:
    """Same tensors, other numbers: the name that training recorded decides."""
    model = tm.MODELS[name]
    refuse_export(training(tmp_path / "mt", model), "--model", family, words=(family, model.family))


@pytest.mark.parametrize("change", [{"hidden_size": 128}, {"num_layers": 4}, {"num_query_groups": 1}])
def test_manifest_of_another_model(change: dict[str, Any], imported, tmp_path: Path, refuse_export) -> None:
    shutil.copytree(imported("llama2"), tmp_path / "mt")
    paths = [path for path in (tmp_path / "mt").glob("*.json") if "model" in tm.read_json(path)]
    manifest = next(
        path for path in paths if isinstance(tm.read_json(path)["model"], dict) and "family" in tm.read_json(path)
    )
    content = tm.read_json(manifest)
    content["model"] |= change
    tm.write_json(manifest, content)
    refuse_export(tmp_path / "mt", words=("manifest",))


def test_manifest_with_half_a_character(imported, to_hf, tmp_path: Path) -> None:
    """JSON can spell a lone surrogate, UTF-8 cannot: it is kept as it was spelled."""
    shutil.copytree(imported("llama2"), tmp_path / "mt")
    path = tmp_path / "mt" / "conversion_manifest.json"
    content = tm.read_json(path)
    content["config"]["note"] = "\ud800"
    tm.write_json(path, content)
    assert to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "out", "--no_tokenizer").code == 0
    assert tm.read_json(tmp_path / "out" / "config.json")["note"] == "\ud800"


@pytest.mark.parametrize(
    "change",
    [{"rope_theta": []}, {"rope_theta": "a\0b"}, {"rope_theta": 10**400}, {"rope_theta": True},
     {"rope_parameters": "linear"}, {"rope_parameters": {"rope_type": "linear", "factor": None}},
     {"rope_scaling": {"type": "linear", "factor": -1}}],
)  # fmt: skip
def test_manifest_with_a_garbled_config(change: dict[str, Any], imported, tmp_path: Path, refuse_export) -> None:
    """It is compared with what is written, field by field."""
    shutil.copytree(imported("llama2"), tmp_path / "mt")
    path = tmp_path / "mt" / "conversion_manifest.json"
    content = tm.read_json(path)
    content["config"] |= change
    tm.write_json(path, content)
    refuse_export(tmp_path / "mt", words=("conversion_manifest.json", "rope"))


@pytest.mark.parametrize("version", [None, 0, 1.0, 2.0])
def test_old_checkpoint_versions(version: float | None, to_hf, tmp_path: Path) -> None:
    """Before version 3 another order of QKV was possible: it is refused, or at least said, never assumed in silence."""
    root = training(tmp_path / "mt", LLAMA)
    path = next(root.rglob("model_optim_rng.pt"))
    content = load_rank(path)
    content.pop("checkpoint_version")
    save_rank(content | ({} if version is None else {"checkpoint_version": version}), path)
    result = to_hf("--input_dir", root, "--output_dir", tmp_path / "hf", "--no_tokenizer")
    assert "checkpoint_version" in result.text


def test_true_vocabulary_smaller_than_the_source(sources, to_megatron, tmp_path: Path) -> None:
    """Fewer tokens than rows: refused, or every row of the source is still there."""
    options = ["--out", tmp_path / "out", "--true-vocab-size", 300]
    result = to_megatron("llama2", "--model-path", sources("llama2"), *options)
    if result.code:
        result.refused("300", "320")
        return
    table = next((tmp_path / "out").rglob("model_optim_rng.pt"))
    found = load_rank(table)["model"]["language_model"]["lm_head"]
    assert torch.equal(found[:320], LLAMA.tensors()["lm_head.weight"])


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ({"glu_activation": "geglu"}, "geglu"),
        ({"position_embedding_type": "absolute"}, "position_embedding_type"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ({"parallel_attn": True}, "parallel_attn"),
        ({"num_attention_heads_kv": 2}, "query_key_value"),
        ({"num_layers": 3}, "layers.2."),
    ],
)
def test_args_that_the_family_lacks(args: dict[str, Any], word: str, tmp_path: Path, refuse_export) -> None:
    """A checkpoint that computes something else than its family would come out as another model."""
    refuse_export(training(tmp_path / "mt", LLAMA, **args), words=(word,))


def test_too_many_true_rows(tmp_path: Path, refuse_export) -> None:
    refuse_export(training(tmp_path / "mt", LLAMA), "--true_vocab_size", 400, words=("400", "320"))


@pytest.mark.parametrize("part", [0.99, 0.3])
def test_truncated_rank(part: float, tmp_path: Path, refuse_export) -> None:
    root = training(tmp_path / "mt", LLAMA)
    path = next(root.rglob("model_optim_rng.pt"))
    os.truncate(path, int(path.stat().st_size * part))
    refuse_export(root, words=("model_optim_rng.pt",))


def test_missing_tokenizer(tmp_path: Path, refuse_export) -> None:
    """Not an oversight that exits 0: the error names both flags."""
    refuse_export(training(tmp_path / "mt", LLAMA), tokenizer=True, words=("--vocab_file", "--no_tokenizer"))


@pytest.mark.parametrize("place", ["args", "optimizer", "model"])
def test_hostile_checkpoint(place: str, tmp_path: Path, refuse_export) -> None:
    root, target = training(tmp_path / "mt", LLAMA), tmp_path / "touched"
    path = next(root.rglob("model_optim_rng.pt"))
    content = load_rank(path)
    if place == "args":
        content["args"].data_path = Bomb(target)
    else:
        content[place] = {**content.get(place, {}), "bomb": Bomb(target)}
    save_rank(content, path)
    refuse_export(root, words=(f"{os.mkdir.__module__}.mkdir",))
    assert not target.exists()


def test_hostile_plain_pickle(tmp_path: Path, refuse_export) -> None:
    """Not even a zip file."""
    root, target = training(tmp_path / "mt", LLAMA), tmp_path / "touched"
    next(root.rglob("model_optim_rng.pt")).write_bytes(pickle.dumps({"model": Bomb(target)}))
    refuse_export(root, words=("model_optim_rng.pt",))
    assert not target.exists()


def test_no_secret_and_no_path_is_kept(imported, sources, to_hf, tmp_path: Path) -> None:
    root = imported("llama2")
    text = "".join(path.read_text() for path in root.glob("*.json"))
    assert text, "the manifest stands beside the tracker"
    json_texts = [json.loads(path.read_text()) for path in root.glob("*.json")]
    assert json_texts
    assert str(sources("llama2")) not in text
    assert str(root) not in text
    to_hf("--input_dir", root, "--output_dir", tmp_path / "out").succeeded()
    for path in (tmp_path / "out").glob("*.json"):
        text = path.read_text()
        for place in (root, sources("llama2")):
            assert str(place) not in text, path.name
