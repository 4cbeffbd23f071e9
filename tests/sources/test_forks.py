"""slime's and swiss-ai's checkpoints: Megatron-LM's own folders, with args of theirs beside its own."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
from conftest import GOLDEN
from golden_core import read_torch_dist, root_of

CASE = GOLDEN / "core-qwen3"
SLIME = {
    "hf_checkpoint": "/models/Qwen3-4B", "custom_model_provider_path": None, "allgather_cp": False,
    "ckpt_assume_constant_structure": True, "ckpt_fully_parallel_load": True, "dist_ckpt_save_pre_mcore_014": True,
    "megatron_to_hf_mode": "raw", "rope_type": "rope", "rollout_batch_size": None, "model_name": "qwen3forcausallm",
    "tokenizer_model": "/models/Qwen3-4B", "tokenizer_type": "HuggingFaceTokenizer", "moe_layer_freq": 1,
}  # fmt: skip
SWISS = {
    "norm_epsilon": 1e-6, "xielu": False, "qknorm_impl": "te", "post_layer_norm": False, "goldfish_loss": True,
    "rope_scaling_factor": 8.0, "use_rope_scaling": False, "layernorm_init": None,
}  # fmt: skip


def with_args(tmp_path: Path, folder: str, tracker: str, changes: dict[str, Any], without: str = "") -> Path:
    out = Path(shutil.copytree(CASE / "megatron-torch_dist", tmp_path / "in"))
    _, args = read_torch_dist(out)
    kinds = (bool, int, float, str, list, tuple, type(None), torch.dtype)
    plain = {name: value for name, value in args.items() if isinstance(value, kinds) and name != without}
    here = root_of(out).rename(out / folder)
    torch.save({"args": Namespace(**plain | changes), "checkpoint_version": 3.0, "iteration": 1}, here / "common.pt")
    (out / "latest_checkpointed_iteration.txt").write_text(tracker)
    return out


@pytest.mark.parametrize(
    ("folder", "tracker", "changes", "without"),
    [
        ("release", "release", SLIME, ""),
        ("iter_0000001", "1", SLIME, ""),
        ("iter_0000001", "1", SWISS, "layernorm_epsilon"),
    ],
    ids=["slime, converted", "slime, trained", "swiss-ai"],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_export(folder: str, tracker: str, changes: Any, without: str, to_hf, tmp_path: Path) -> None:
    root = with_args(tmp_path, folder, tracker, changes, without)
    rows = tm.read_json(CASE / "hf" / "config.json")["vocab_size"]
    for number, path in enumerate((root, root / folder)):
        out = tmp_path / f"out{number}"
        to_hf("--input_dir", path, "--output_dir", out, "--no_tokenizer", "--true_vocab_size", rows).succeeded()
        wanted, found = tm.read_huggingface(CASE / "hf"), tm.read_huggingface(out)
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
        config = tm.read_json(out / "config.json")
        assert (config["model_type"], config["rms_norm_eps"]) == ("qwen3", 1e-6)
