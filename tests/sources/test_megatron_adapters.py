"""Megatron's LoRA on the way back: what Megatron-Bridge itself merged and exported, bit for bit; its errors by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dist_files
import pytest
import tiny_models as tm
import torch
import yaml
from conftest import GOLDEN, Result, run
from golden_core import Reader, dcp, root_of
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

CASES = {"bridge-lora": "qwen3", "bridge-lora-canonical": "llama3", "bridge-lora-experts": "qwen3-moe"}
FOLDERS = sorted(f"{path.parent.name}/{path.name}" for path in GOLDEN.glob("bridge-lora*/megatron-adapters*"))
ALPHA = ("--adapter_alpha", 6)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
Script = Callable[..., Result]


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def bases(tmp_path_factory, to_megatron: Script) -> dict[str, Path]:
    """The base models as Megatron checkpoints."""
    made = {}
    for case, family in CASES.items():
        made[case] = tmp_path_factory.mktemp(case) / "m"
        to_megatron(family, "--model-path", GOLDEN / case / "base", "--out", made[case]).succeeded()
    return made


@pytest.mark.parametrize("folder", FOLDERS)
def test_merged(folder: str, bases: dict[str, Path], to_hf: Script, tmp_path: Path) -> None:
    case = folder.split("/")[0]
    where = ("--input_dir", bases[case], "--adapter", GOLDEN / folder, "--output_dir", tmp_path / "out")
    dense = CASES[case] != "qwen3-moe"  # the proof's forward pass is one of dense models
    said = to_hf(*where, "--no_tokenizer", *(["--verify"] if dense else [])).succeeded()
    assert ("equal after rounding" in said.out.lower()) == dense
    assert same(tm.read_huggingface(tmp_path / "out"), tm.read_huggingface(GOLDEN / case / "hf"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_as_peft(folder: str, to_hf: Script, tmp_path: Path) -> None:
    """Adapters alone: run_config.yaml beside them says what model they belong to."""
    case = folder.split("/")[0]
    to_hf("--input_dir", GOLDEN / folder, "--output_dir", tmp_path / "out", "--adapter_as", "peft",
          "--model", CASES[case]).succeeded()  # fmt: skip
    wanted = GOLDEN / case / "peft"
    assert same(adapter_of(tmp_path / "out"), adapter_of(wanted))
    one, two = (tm.read_json(place / "adapter_config.json") for place in (tmp_path / "out", wanted))
    assert one | {"base_model_name_or_path": "base"} == two


@pytest.mark.parametrize("case", CASES)
def test_base_and_adapters_in_one(case: str, to_hf: Script, tmp_path: Path) -> None:
    where = ("--input_dir", GOLDEN / case / "megatron-full", "--model", CASES[case], "--no_tokenizer")
    to_hf(*where, "--output_dir", tmp_path / "out").refused("alpha", "--adapter_alpha")
    to_hf(*where, "--output_dir", tmp_path / "out", *ALPHA).succeeded()
    assert same(tm.read_huggingface(tmp_path / "out"), tm.read_huggingface(GOLDEN / case / "hf"))
    to_hf(*where, "--output_dir", tmp_path / "peft", *ALPHA, "--adapter_as", "peft").succeeded()
    assert same(adapter_of(tmp_path / "peft"), adapter_of(GOLDEN / case / "peft"))


@pytest.mark.parametrize("case", CASES)
def test_the_round(case: str, to_hf: Script, to_megatron: Script, tmp_path: Path) -> None:
    """Written as PEFT's, merged from there into the base: the same as merged at once."""
    to_hf("--input_dir", GOLDEN / case / "megatron-adapters", "--output_dir", tmp_path / "peft",
          "--adapter_as", "peft", "--model", CASES[case]).succeeded()  # fmt: skip
    to_megatron(CASES[case], "--model-path", GOLDEN / case / "base", "--adapter", tmp_path / "peft",
                "--out", tmp_path / "m").succeeded()  # fmt: skip
    to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out", "--no_tokenizer").succeeded()
    assert same(tm.read_huggingface(tmp_path / "out"), tm.read_huggingface(GOLDEN / case / "hf"))


# ---- other folders and spellings


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    entries = Reader(folder).read_metadata().state_dict_metadata
    found = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=Reader(folder), no_dist=True)
    return found


def rewritten(to: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """bridge-lora's adapters with `change` done to the tensors."""
    source = root_of(GOLDEN / "bridge-lora" / "megatron-adapters")
    tensors = change(tensors_of(source))
    folder = dist_files.write(to / source.name, {key: dist_files.whole(tensor) for key, tensor in tensors.items()})
    torch.save({"iteration": 7301}, folder / "common.pt")
    shutil.copy(source / "run_config.yaml", folder)
    (to / "latest_checkpointed_iteration.txt").write_text("7301")
    return to


def per_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        key.replace("layers.", f"layers.{number}.", 1): part
        for key, tensor in tensors.items()
        for number, part in enumerate(tensor)
    }


def test_layers_by_themselves(bases: dict[str, Path], to_hf: Script, tmp_path: Path) -> None:
    adapter = rewritten(tmp_path / "a", per_layer)
    to_hf("--input_dir", bases["bridge-lora"], "--adapter", adapter, "--output_dir", tmp_path / "out",
          "--no_tokenizer").succeeded()  # fmt: skip
    assert same(tm.read_huggingface(tmp_path / "out"), tm.read_huggingface(GOLDEN / "bridge-lora" / "hf"))


def test_nemo_2_adapters(bases: dict[str, Path], to_hf: Script, tmp_path: Path) -> None:
    """weights/ with module. in front of every name, alpha in context/model.yaml."""
    run_folder = tmp_path / "run-last"
    moved = rewritten(tmp_path / "a", lambda tensors: {f"module.{key}": tensor for key, tensor in tensors.items()})
    shutil.move(moved / "iter_0007301", run_folder / "weights")
    section = yaml.load((run_folder / "weights" / "run_config.yaml").read_text(), Loader=yaml.BaseLoader)["model"]
    plain = yaml.safe_load(yaml.safe_dump({k: v for k, v in section.items() if isinstance(v, str)}))
    config = {key: yaml.safe_load(value) for key, value in plain.items()}
    config |= {"normalization": "RMSNorm", "gated_linear_unit": True, "num_layers": 2}
    (run_folder / "weights" / "run_config.yaml").unlink()
    (run_folder / "context").mkdir()
    lora = {"_target_": "nemo.collections.llm.peft.lora.LoRA", "dim": 4, "alpha": 6}
    text = yaml.safe_dump({"config": config, "model_transform": lora})
    (run_folder / "context" / "model.yaml").write_text(text)
    to_hf("--input_dir", bases["bridge-lora"], "--adapter", run_folder, "--output_dir", tmp_path / "out",
          "--no_tokenizer").succeeded()  # fmt: skip
    assert same(tm.read_huggingface(tmp_path / "out"), tm.read_huggingface(GOLDEN / "bridge-lora" / "hf"))


# ---- faults

QKV = "decoder.layers.self_attention.linear_qkv.adapter"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t | {"decoder.layers.mlp.router.adapter.linear_in.weight": torch.ones(2, 4, 32)},
         ("router.adapter", "fits no weight")),
        (lambda t: {k: v for k, v in t.items() if k != f"{QKV}.linear_out.weight"}, ("without the other",)),
        (lambda t: t | {f"{QKV}.linear_out.weight": torch.ones(2, 95, 4)}, ("linear_qkv.adapter", "make no")),
        (lambda t: t | {f"{QKV}.linear_in.weight": torch.ones(1, 4, 32)}, ("linear_qkv.adapter", "factor per layer")),
        (lambda t: t | {f"{QKV}.weight_magnitude": torch.ones(2, 96)}, ("weight_magnitude", "fits no weight")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["merged", "peft"])
def test_what_does_not_fit(
    form: str, change: Any, words: Any, bases: dict[str, Path], to_hf: Script, tmp_path: Path
) -> None:
    adapter = rewritten(tmp_path / "a", change)
    to_hf("--input_dir", bases["bridge-lora"], "--adapter", adapter, "--output_dir", tmp_path / "out",
          "--no_tokenizer", "--adapter_as", form).refused(*words)  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_another_method_is_named(bases: dict[str, Path], to_hf: Script, tmp_path: Path) -> None:
    adapter = rewritten(tmp_path / "a", lambda tensors: tensors)
    path = adapter / "iter_0007301" / "run_config.yaml"
    path.write_text(path.read_text().replace("megatron.bridge.peft.lora.LoRA", "megatron.bridge.peft.dora.DoRA"))
    to_hf("--input_dir", bases["bridge-lora"], "--adapter", adapter, "--output_dir", tmp_path / "out",
          "--no_tokenizer").refused("DoRA")  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("alpha: 6", "alpha: .inf", ("alpha 'inf'",)),
        ("alpha: 6", "alpha: .nan", ("alpha 'nan'",)),
        ("alpha: 6", f"alpha: 1{'0' * 400}", ("alpha '1",)),
        ("dim: 4", "dim: 8", ("run_config.yaml says rank 8", "has rank 4")),
        ("alpha: 6", "beta: 6", ("what run_config.yaml says of them lacks alpha", "--adapter_alpha")),
        ("peft:", "tfep:", ("no section peft", "--adapter_alpha")),
        (None, None, ("holds no run_config.yaml", "--adapter_alpha")),
    ],
)
def test_what_the_yaml_says_of_adapters(
    before: str | None, after: str, words: Any, bases: dict[str, Path], to_hf: Script, tmp_path: Path
) -> None:
    """Each is refused for what it is: another scale makes another model, of the same shapes."""
    adapter = rewritten(tmp_path / "a", lambda tensors: tensors)
    path = adapter / "iter_0007301" / "run_config.yaml"
    if before is None:
        path.unlink()
    else:
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))
    to_hf("--input_dir", bases["bridge-lora"], "--adapter", adapter, "--output_dir", tmp_path / "out",
          "--no_tokenizer").refused(*words)  # fmt: skip


def test_an_alpha_that_the_file_contradicts_is_warned_of(bases: dict[str, Path], to_hf: Script, tmp_path: Path) -> None:
    where = ("--input_dir", bases["bridge-lora"], "--adapter", GOLDEN / "bridge-lora" / "megatron-adapters")
    plain = (*where, "--no_tokenizer")
    said = to_hf(*plain, "--output_dir", tmp_path / "out", "--adapter_alpha", 5).succeeded()
    assert "--adapter_alpha 5 is used, but" in said.text
    assert "run_config.yaml says alpha 6" in said.text
    said = to_hf(*plain, "--output_dir", tmp_path / "six", *ALPHA).succeeded()
    assert "says alpha" not in said.text


def test_folders_that_are_something_else(bases: dict[str, Path], to_hf: Script, to_megatron: Script, tmp_path) -> None:
    base, case, out = bases["bridge-lora"], GOLDEN / "bridge-lora", tmp_path / "out"
    plain = ("--output_dir", out, "--no_tokenizer")
    to_hf("--input_dir", case / "megatron-adapters", *plain).refused("adapters alone", "/checkpoints/base", "--adapter")
    to_hf("--input_dir", base, "--adapter", base, *plain).refused("holds no adapters")
    to_hf("--input_dir", base, "--adapter", case / "peft", *plain).refused("PEFT's", "hf_to_megatron.py")
    to_hf("--input_dir", base, "--adapter_as", "peft", *plain).refused("holds no adapters")
    alone = ("--input_dir", case / "megatron-adapters", "--adapter_as", "peft", "--verify")
    to_hf(*alone, *plain).refused("--verify compares whole models")  # it is not left out in silence
    to_hf("--input_dir", base, *ALPHA, *plain).refused("--adapter_alpha 6", "holds none")
    to_hf("--input_dir", case / "megatron-full", "--adapter", case / "megatron-adapters", *plain).refused("too many")
    to_megatron("qwen3", "--model-path", case / "megatron-full", "--out", out).refused("adapters", "--adapter_as peft")
    found = run("weights_conversion.verify", case / "hf", case / "megatron-full")
    assert found.code == 2
    assert not out.exists()


def test_canonical_adapters_of_several_ranks_are_warned_of(bases, to_hf: Script, tmp_path: Path) -> None:
    adapter = tmp_path / "a"
    shutil.copytree(GOLDEN / "bridge-lora-canonical" / "megatron-adapters", adapter)
    path = root_of(adapter) / "run_config.yaml"
    text = path.read_text()
    assert "  tensor_model_parallel_size: 1\n" in text
    path.write_text(text.replace("tensor_model_parallel_size: 1\n", "tensor_model_parallel_size: 2\n"))
    said = to_hf("--input_dir", bases["bridge-lora-canonical"], "--adapter", adapter, "--output_dir",
                 tmp_path / "out", "--no_tokenizer", "--json", tmp_path / "report.json").succeeded()  # fmt: skip
    assert "CanonicalLoRA, trained at TP 2" in said.text
    assert json.loads((tmp_path / "report.json").read_text())
