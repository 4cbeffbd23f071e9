"""What other readers find in an input of `fuzz`, and what by slow, separate rules its conversion must then hold.

safetensors, torch.load and torch.distributed.checkpoint read the two sides. Where they refuse an input that was
converted, as torch does an opcode that it never writes, the output must hold the weights of the unchanged input.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.robustness.sources import tm

import torch  # isort: skip
from megatron_core import Sizes, rank_tensors  # isort: skip
from megatron_files import assert_same_ranks, read_checkpoint  # isort: skip
from naive_layout import megatron_ranks, meta_to_huggingface  # isort: skip
from safetensors import safe_open  # isort: skip

MODEL = tm.MODELS["llama2-gqa"]
Tensors = dict[str, torch.Tensor]


def compare(kind: str, folder: Path, out: Path, reference: Path) -> str | None:
    """What is wrong with `out`, converted from `folder`; `reference` was converted from the unchanged input."""
    check = {"megatron": _megatron, "torch_dist": _torch_dist}.get(kind, _import)
    try:
        return check(kind, folder, out)
    except Unreadable as error:
        before, after = (_output_weights(place, kind) for place in (reference, out))
        if before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before):
            return None
        return f"converted, though others cannot read it ({error})"


class Unreadable(Exception):
    """Others do not read the input."""


def _import(kind: str, folder: Path, out: Path) -> str | None:
    try:
        if kind == "meta":
            params = json.loads((folder / "params.json").read_text())
            heads = int(params["n_heads"])
            groups = int(params.get("n_kv_heads") or heads)
            config = MODEL.config() | {"num_attention_heads": heads, "num_key_value_heads": groups}
            config["head_dim"] = config["hidden_size"] // heads
            parts = [torch.load(path, weights_only=True) for path in sorted(folder.glob("consolidated.*.pth"))]
            hf = meta_to_huggingface(parts, heads, groups)
        else:
            config = json.loads((folder / "config.json").read_text())
            hf = read_weights(folder)
        expected = megatron_ranks(config, hf, 1, 1, 1, None)
    except Exception as error:
        raise Unreadable(f"{type(error).__name__}: {str(error)[:200]}") from error
    try:
        assert_same_ranks(read_checkpoint(out).tensors, expected)
    except AssertionError as error:
        return f"converted into other weights than others read: {error}"
    return None


def _megatron(kind: str, folder: Path, out: Path) -> str | None:
    config, hf = json.loads((out / "config.json").read_text()), read_weights(out)
    try:
        found = read_checkpoint(folder).tensors
        tp, pp, vpp = (1 + max(key[axis] for key in found) for axis in range(3))
        rows = tp * found[0, 0, 0]["embedding.word_embeddings.weight"].shape[0]
        expected = megatron_ranks(config, hf, tp, pp, vpp, rows)
    except Exception as error:
        raise Unreadable(f"{type(error).__name__}: {str(error)[:200]}") from error
    for name, theirs, stage in (  # only the true rows come over, whatever stands behind them
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight", 0), ("lm_head", "lm_head.weight", pp - 1)
    ):  # fmt: skip
        table = torch.cat([found[rank, stage, 0 if stage == 0 else vpp - 1].pop(name) for rank in range(tp)])
        for ranks in expected.values():
            ranks.pop(name, None)
        if not torch.equal(table[: config["vocab_size"]], hf[theirs]):
            return f"converted into other weights than others read: {name}"
    try:
        assert_same_ranks(found, expected)
    except AssertionError as error:
        return f"converted into other weights than others read: {error}"
    return None


# Fused with the layer behind it, as Transformer Engine has it, or a module of its own.
NORMS = {
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.input_layernorm.weight",
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": "decoder.layers.pre_mlp_layernorm.weight",
}


def _torch_dist(kind: str, folder: Path, out: Path) -> str | None:
    config, hf = json.loads((out / "config.json").read_text()), read_weights(out)
    try:
        found = read_torch_dist(folder / "release")
    except Exception as error:
        raise Unreadable(f"{type(error).__name__}: {str(error)[:200]}") from error
    expected = rank_tensors(hf, Sizes.from_hf(out / "config.json"), (0, 1))
    stacked = {
        name.replace("layers.0.", "layers."): torch.stack(
            [expected[name.replace("layers.0.", f"layers.{layer}.")] for layer in range(config["num_hidden_layers"])]
        )
        for name in expected if name.startswith("decoder.layers.0.")
    }  # fmt: skip
    single = {name: tensor for name, tensor in expected.items() if not name.startswith("decoder.layers.")}
    for name, tensor in found.items():
        ours = (single | stacked).get(NORMS.get(name, name))
        if ours is None:
            if name.endswith("._extra_state"):
                continue
            return f"converted without {name}"
        if not torch.equal(tensor[: ours.shape[0]] if name in single else tensor, ours):
            return f"converted into other weights than others read: {name}"
    return None


def read_torch_dist(folder: Path) -> Tensors:
    """Every tensor of a torch_dist folder, as torch.distributed.checkpoint reads it in one process."""
    import warnings

    from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load

    warnings.simplefilter("ignore")
    reader = FileSystemReader(folder)
    metadata = reader.read_metadata()
    state: dict[str, Any] = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items() if hasattr(entry, "properties")
    }  # fmt: skip
    try:
        load(state, storage_reader=reader, no_dist=True)
    except CheckpointException as error:  # which is not an Exception
        raise RuntimeError(str(error).splitlines()[-1]) from error
    return state


def _output_weights(out: Path, kind: str) -> Tensors:
    if kind in ("megatron", "torch_dist"):
        return read_weights(out)
    ranks = read_checkpoint(out).tensors
    return {f"{rank} {name}": tensor for rank, tensors in ranks.items() for name, tensor in tensors.items()}


def read_weights(folder: Path) -> Tensors:
    found: Tensors = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        elif path.suffix == ".bin":
            content = torch.load(path, weights_only=True)
            for name, value in content.items():
                inner = {"": value} if isinstance(value, torch.Tensor) else value
                found |= {f"{name}.{key}".rstrip("."): part for key, part in inner.items()}
    return found
