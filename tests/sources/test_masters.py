"""--weights master: the optimizer's float32 weights, in every format that stores them, and why not in the others."""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dist_files
import pytest
import tiny_models as tm
import torch
from conftest import GOLDEN, Result
from golden_core import Reader, dcp, read_torch_dist, root_of, unpickle
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

CASE = GOLDEN / "core-llama3-masters"
STORED = CASE / "megatron-torch_dist"
ROWS = ("--true_vocab_size", 118, "--no_tokenizer")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
Script = Callable[..., Result]


def same(folder: Path, wanted: Path) -> bool:
    found, expected = tm.read_huggingface(folder), tm.read_huggingface(wanted)
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--weights", "master"), "hf-master"),
        (("--weights", "master", "--dtype", "bfloat16"), "hf"),
        (("--weights", "model"), "hf"),
    ],
)
def test_what_megatron_wrote(options: tuple[str, ...], wanted: str, tmp_path: Path, to_hf: Script) -> None:
    to_hf("--input_dir", STORED, "--output_dir", tmp_path / "out", *ROWS, *options, "--verify").succeeded()
    assert same(tmp_path / "out", CASE / wanted)
    dtype = tm.read_json(tmp_path / "out" / "config.json")["torch_dtype"]
    assert dtype == ("float32" if wanted == "hf-master" else "bfloat16")


def everything(folder: Path) -> dict[str, torch.Tensor]:
    entries = Reader(folder).read_metadata().state_dict_metadata
    kept = {key: e for key, e in entries.items() if isinstance(e, TensorStorageMetadata) and "exp_avg" not in key}
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in kept.items()}
    dcp.load(tensors, storage_reader=Reader(folder), no_dist=True)
    return tensors


def rewritten(root: Path, change: Callable[[str, torch.Tensor], dict[str, dist_files.Parts]], shapes: bool) -> Path:
    """The golden checkpoint with `change` done to each of the optimizer's tensors."""
    tensors: dict[str, dist_files.Parts] = {}
    noted = {}
    for key, tensor in everything(root_of(STORED)).items():
        if key.startswith("optimizer."):
            tensors |= change(key, tensor)
            noted[key] = {"nd_reformulated_orig_global_shape": torch.Size(tensor.shape)}
        else:
            tensors[key] = dist_files.whole(tensor)
    folder = dist_files.write(root / "iter_0000321", tensors, mcore_data=noted if shapes else None)
    _, args = read_torch_dist(STORED)
    plain = {name: value for name, value in args.items() if isinstance(value, (int, float, str, type(None)))}
    torch.save({"args": Namespace(**plain), "iteration": 321}, folder / "common.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("321")
    return root


def flattened(key: str, tensor: torch.Tensor) -> dict[str, dist_files.Parts]:
    """As fully_sharded_model_space (to Megatron-Core 0.15) stores it at TP 2 and three data-parallel ranks."""
    stacked = key.split("fp32_param.")[1].startswith("decoder.layers.")
    counts = [tensor.shape[0] if stacked else 1, *[1] * (tensor.dim() - 1)]
    axis = tensor.dim() - (1 if key.endswith(("linear_proj.weight", "linear_fc2.weight")) else 2)
    if tensor.dim() - stacked == 2:
        counts[axis] = 4 if key.endswith("linear_fc1.weight") else 2
    local = [size // count for size, count in zip(tensor.shape, counts, strict=True)]
    numel = torch.Size(local).numel()
    parts = []
    for block in torch.cartesian_prod(*(torch.arange(count) for count in counts)).view(-1, tensor.dim()).tolist():
        place = tuple(slice(i * n, (i + 1) * n) for i, n in zip(block, local, strict=True))
        flat = tensor[place].flatten()
        cuts = [0, numel // 3 - 1, numel // 2 + 3, numel]
        for first, last in itertools.pairwise(cuts):
            parts.append(((*block, first), flat[first:last].view(*[1] * len(block), -1)))
    return {key: ((*counts, numel), parts)}


def test_flattened_weights_are_put_together(tmp_path: Path, to_hf: Script) -> None:
    source = rewritten(tmp_path / "m", flattened, shapes=True)
    options = ("--model", "llama3", "--weights", "master", "--verify")
    to_hf("--input_dir", source, "--output_dir", tmp_path / "out", *ROWS, *options).succeeded()
    assert same(tmp_path / "out", CASE / "hf-master")


def renamed(key: str, tensor: torch.Tensor) -> dict[str, dist_files.Parts]:
    return {f"chained_0.{key.replace('fp32_param', 'param')}": dist_files.whole(tensor)}


def test_the_names_of_fully_reshardable(tmp_path: Path, to_hf: Script) -> None:
    source = rewritten(tmp_path / "m", renamed, shapes=False)
    options = ("--model", "llama3", "--weights", "master")
    to_hf("--input_dir", source, "--output_dir", tmp_path / "out", *ROWS, *options).succeeded()
    assert same(tmp_path / "out", CASE / "hf-master")


BUCKET = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.param"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda key, tensor: {BUCKET: dist_files.whole(torch.zeros(64))}, ("buckets", "fully-reshardable")),
        (lambda key, tensor: {}, ("stores no optimizer",)),
        (lambda key, tensor: {} if "linear_fc1.weight" in key else {key: dist_files.whole(tensor)},
         ("no float32 weights of decoder.layers.mlp.linear_fc1.weight", "fully-reshardable")),
        (lambda key, tensor: {key: dist_files.whole(tensor[..., :-1])}, ("has shape",)),
    ],
)  # fmt: skip
def test_what_is_not_stored_is_said(change: Any, words: tuple[str, ...], tmp_path: Path, to_hf: Script) -> None:
    source = rewritten(tmp_path / "m", change, shapes=False)
    options = ("--model", "llama3", "--weights", "master")
    to_hf("--input_dir", source, "--output_dir", tmp_path / "out", *ROWS, *options).refused(*words)
    assert not (tmp_path / "out").exists()


# ---- rank files


def with_optimizer(root: Path, masters: Path, groups: Callable[[list[torch.Tensor]], list[list[torch.Tensor]]]) -> None:
    """Gives each rank file of `root` the optimizer of a run whose float32 weights `masters` (the same layout) holds."""
    for path in sorted(root_of(root).glob("mp_rank_*/model_optim_rng.pt")):
        content, other = (unpickle(p) for p in (path, masters / path.relative_to(root)))
        values = list(tensors_of({key: part for key, part in other.items() if key.startswith("model")}))
        content["optimizer"] = {"optimizer": {"state": {}}, "fp32_from_fp16_params": groups(values)}
        torch.save(content, path)


def tensors_of(tree: Any) -> Any:
    for value in tree.values():
        if isinstance(value, dict):
            yield from tensors_of(value)
        elif isinstance(value, torch.Tensor) and value.numel():
            yield value


def decayed_first(values: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    return [[v for v in values if v.dim() > 1], [v for v in values if v.dim() == 1]]


def plain_first(values: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    return decayed_first(values)[::-1]


LAYOUT = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2, "--ckpt-format", "torch")


@pytest.mark.parametrize("groups", [decayed_first, plain_first])
def test_rank_files_of_megatron_core(groups: Any, tmp_path: Path, to_hf: Script, to_megatron: Script) -> None:
    for name in ("hf", "hf-master"):
        to_megatron("llama3", "--model-path", CASE / name, "--out", tmp_path / name, *LAYOUT).succeeded()
    with_optimizer(tmp_path / "hf", tmp_path / "hf-master", groups)
    to_hf("--input_dir", tmp_path / "hf", "--output_dir", tmp_path / "out", "--no_tokenizer",
          "--weights", "master", "--verify").succeeded()  # fmt: skip
    assert same(tmp_path / "out", CASE / "hf-master")


def test_rank_files_of_megatron_llm(tmp_path: Path, to_hf: Script, to_megatron: Script) -> None:
    model = tm.MODELS["llama2"]
    fine = tm.write_huggingface(tmp_path / "fine", model, tokenizer=False)  # of float32
    options = ("--tensor-model-parallel-size", 2)
    to_megatron("llama2", "--model-path", fine, "--out", tmp_path / "f", *options).succeeded()
    to_megatron("llama2", "--model-path", fine, "--out", tmp_path / "m", *options, "--dtype", "bfloat16").succeeded()
    with_optimizer(tmp_path / "m", tmp_path / "f", decayed_first)
    to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out", "--no_tokenizer",
          "--weights", "master", "--verify").succeeded()  # fmt: skip
    assert same(tmp_path / "out", fine)


def exchanged(values: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    groups = decayed_first(values)
    groups[0].insert(1, groups[0].pop())
    return groups


def one_more(values: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    return [*decayed_first(values), [torch.zeros(3)]]


@pytest.mark.parametrize(
    ("groups", "words"), [(exchanged, "which is which is not known"), (one_more, "more than its model has parameters")]
)
def test_an_order_that_is_not_the_models(
    groups: Any, words: str, tmp_path: Path, to_hf: Script, to_megatron: Script
) -> None:
    for name in ("hf", "hf-master"):
        to_megatron("llama3", "--model-path", CASE / name, "--out", tmp_path / name, *LAYOUT).succeeded()
    with_optimizer(tmp_path / "hf", tmp_path / "hf-master", groups)
    to_hf("--input_dir", tmp_path / "hf", "--output_dir", tmp_path / "out", "--no_tokenizer",
          "--weights", "master").refused(words)  # fmt: skip


def test_a_distributed_optimizer_is_refused_by_name(tmp_path: Path, to_hf: Script, to_megatron: Script) -> None:
    to_megatron("llama3", "--model-path", CASE / "hf", "--out", tmp_path / "m", *LAYOUT).succeeded()
    options = ("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out", "--no_tokenizer", "--weights", "master")
    to_hf(*options).refused("stores no optimizer")
    for folder in root_of(tmp_path / "m").glob("mp_rank_*"):
        torch.save({0: {}}, folder / "distrib_optim.pt")
    to_hf(*options).refused("distrib_optim.pt", "buckets", "--dist-ckpt-optim-fully-reshardable")
