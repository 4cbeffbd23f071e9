"""What is typed: abbreviations, near misses, empty variables, ~, names of outputs and of types, --json, --version."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from conftest import run

from weights_conversion import __version__
from weights_conversion.cli import siblings

IMPORT, EXPORT = "hf_to_megatron", "megatron_to_hf"


@pytest.mark.parametrize(
    ("script", "line", "words"),
    [
        (IMPORT, ["llama2", "--tp", "2"], "--tensor-model-parallel-size"),
        (IMPORT, ["llama2", "--pp=2"], "--pipeline-model-parallel-size"),
        (IMPORT, ["llama2", "--tensor-modle-parallel-size", "2"], "--tensor-model-parallel-size"),
        (IMPORT, ["llama2", "--dtpye", "bf16"], "mean --dtype"),
        (IMPORT, ["llama2", "--t", "2"], "--t could be"),
        (EXPORT, ["--input", "a", "--outptu_dir", "b"], "--output_dir"),
        (EXPORT, ["--input_dir", "a"], "--output_dir"),
        (IMPORT, ["lama2"], "llama2"),
        (IMPORT, ["llama2", "--workers", "0"], "not a positive number"),
        (IMPORT, ["llama2", "--model-path", ""], "--model-path is empty"),
        (IMPORT, ["llama2", "--model_path="], "--model-path is empty"),
        (IMPORT, ["llama2", "--dry-run", ""], "argument 3 is empty"),
        (IMPORT, [""], "argument 1 is empty"),
        (EXPORT, ["--input_dir", "", "--output_dir", "b"], "--input_dir is empty"),
        (
            IMPORT,
            ["llama2", "--vocab_extra_ids_list", "a"],
            "here: --vocab_extra_ids_list is an option of megatron_to_hf.py",
        ),
        (IMPORT, ["llama2", "--no-tokenizer"], "here: --no_tokenizer is an option of megatron_to_hf.py;"),
        (IMPORT, ["llama2", "--exact_only"], "here: --exact-only is an option of verify.py;"),
        (EXPORT, ["--target=megatron-core"], "here: --target is an option of hf_to_megatron.py;"),
        (
            EXPORT,
            ["--tensor_model_parallel_size", "2"],
            "--tensor-model-parallel-size is an option of hf_to_megatron.py;",
        ),
        ("weights_conversion.verify", ["a", "b", "--rope_theta", "1"], "of hf_to_megatron.py and megatron_to_hf.py;"),
        ("weights_conversion.verify", ["a", "b", "--overwrite"], "of hf_to_megatron.py and megatron_to_hf.py;"),
        ("weights_conversion.verify", ["a", "b", "--exact"], ""),
        ("weights_conversion.verify", ["a", ""], "argument 2 is empty"),
    ],
)
def test_errors_are_one_sentence(script: str, line: list[str], words: str) -> None:
    result = run(script, *line)
    assert result.code == 2, result.text
    if words:
        (sentence,) = result.err.splitlines()
        assert words in sentence
        assert sentence.endswith("see --help")


def test_whose_options_are_known() -> None:
    """The table says of each option which commands have it, and of those that all have, nothing."""
    modules = {siblings.IMPORT: IMPORT, siblings.EXPORT: EXPORT, siblings.VERIFY: "weights_conversion.verify"}
    has = {
        command: {
            option.replace("_", "-")
            for action in importlib.import_module(module).build_parser()._actions
            for option in action.option_strings[-1:]
        }
        for command, module in modules.items()
    }
    owners = {
        option: tuple(command for command, options in has.items() if option in options)
        for option in set().union(*has.values())
    }
    expected = {option: commands for option, commands in owners.items() if len(commands) < len(has)}
    table = {option.replace("_", "-"): commands for commands, options in siblings.OPTIONS.items() for option in options}
    assert table == expected


def test_abbreviations_and_short_types(sources, to_megatron, to_hf, tmp_path: Path) -> None:
    out = tmp_path / "out"
    to_megatron(
        "llama2", "--model-p", sources("llama2"), "--out", out, "--tensor-m", 2, "--dt=bf16", "--dry_r"
    ).succeeded()
    found = to_megatron("llama2", "--model-path", sources("llama2"), "--out", out, "--dty", "fp16").succeeded()
    assert "release" in found.out
    to_hf("--mod", "llama2", "--inp", out, "--outp", tmp_path / "hf", "--no_tok", "--dtype", "fp32").succeeded()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float32"


def test_a_home_that_the_shell_left_alone(sources, to_megatron, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    to_megatron("llama2", "--model-path", sources("llama2"), "--out=~/x").succeeded()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_out_is_named_after_a_local_folder(sources, to_megatron, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    to_megatron("llama2", "--model-path", sources("llama2"), "--dtype", "fp32").succeeded()
    assert [path.name for path in tmp_path.iterdir()] == ["llama2-megatron"]


def test_a_linked_out_is_named(sources, to_megatron, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    line = ["llama2", "--model-path", sources("llama2"), "--out", tmp_path / "out"]
    to_megatron(*line).refused("symbolic link", str(tmp_path / "real"))


def test_json(sources, to_megatron, to_hf, tmp_path: Path) -> None:
    file, out = tmp_path / "report.json", tmp_path / "out"
    line = ["llama2", "--model-path", sources("llama2"), "--out", out, "--json", file]
    to_megatron(*line).succeeded()
    report = json.loads(file.read_text())
    assert report["succeeded"] is True
    assert report["output"] == str(out)
    assert report["files"] == ["release/mp_rank_00/model_optim_rng.pt"]
    assert report["already_complete"] is False
    assert report["seconds"] > 0
    to_hf("--input_dir", tmp_path / "no", "--output_dir", tmp_path / "hf", "--json", file).refused()
    report = json.loads(file.read_text())
    assert report["succeeded"] is False
    assert len(report["problems"]) == 1
    to_megatron(*line[:-1], tmp_path / "no" / "report.json").refused("does not exist", code=2)


@pytest.mark.parametrize("script", [IMPORT, EXPORT, "weights_conversion.verify", "weights_conversion.demo"])
def test_version(script: str) -> None:
    result = run(script, "--version")
    assert result.code == 0
    assert __version__ in result.out
