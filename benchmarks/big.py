"""Mixture-of-experts models of real shapes as Hugging Face folders: `python -m benchmarks.big --help`.

Their tensors are those that the package's own families ask for. Sparse files have real headers, and data that are holes
and take no space, so that a folder of a terabyte is made in a second.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

FILE_BYTES = 5_000_000_000  # of a weight file, as hub repositories are cut

_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936, "head_dim": 128,
    "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "rope_scaling": None, "hidden_act": "silu", "attention_bias": False,
    "attention_dropout": 0.0, "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": None,
    "torch_dtype": "bfloat16",
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b": ("qwen3-moe", _QWEN3 | {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32,
    }),
    "qwen3-235b": ("qwen3-moe", _QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
        "num_attention_heads": 64,
    }),
    "deepseek-v3": ("deepseek-v3", {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280,
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1,
        "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "norm_topk_prob": True, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6, "rope_theta": 10000, "hidden_act": "silu", "attention_bias": False,
        "attention_dropout": 0.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                         "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    }),
}  # fmt: skip

Tensor = tuple[str, str, tuple[int, ...]]  # name, type in a safetensors header, shape


def config_of(name: str, layers: int | None = None) -> tuple[str, dict[str, Any]]:
    """(family, config.json) of one of CONFIGS, with another number of layers where one is given."""
    family, config = CONFIGS[name]
    return family, config if layers is None else config | {"num_hidden_layers": layers}


def tensors(family: str, config: dict[str, Any]) -> Iterator[Tensor]:
    """All tensors in a checkpoint's usual order."""
    from weights_conversion.architectures import FAMILIES
    from weights_conversion.configs.hf_config import read_config
    from weights_conversion.mapping.dialects import MEGATRON_CORE

    read = read_config(family, config, MEGATRON_CORE, "config.json")
    for instance in FAMILIES[family].instances(read):
        kind = "F32" if instance.row.dtype == "float32" else "BF16"
        for at, shape in enumerate(instance.row.hf_shapes(read)):
            names = instance.hf_names[at], *FAMILIES[family].copies(instance, read)
            yield from ((name, kind, shape) for name in names)


def nbytes(tensor: Tensor) -> int:
    return prod(tensor[2]) * (4 if tensor[1] == "F32" else 2)


def write_model(folder: Path, name: str, layers: int | None = None, sparse: bool = True) -> tuple[int, int]:
    """Writes a Hugging Face folder without a tokenizer; returns (tensors, bytes)."""
    folder.mkdir(parents=True)
    family, config = config_of(name, layers)
    files: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors(family, config):
        if files[-1] and size + nbytes(tensor) > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += nbytes(tensor)
    weight_map = {}
    for number, content in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map |= {each[0]: file for each in content}
        _write_file(folder / file, content, sparse)
    total = sum(nbytes(each) for content in files for each in content)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return len(weight_map), total


def _write_file(path: Path, content: list[Tensor], sparse: bool) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in content:
        end = position + nbytes(tensor)
        header[tensor[0]] = {"dtype": tensor[1], "shape": tensor[2], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            file.truncate(file.tell() + position)
            return
        import torch

        generator = torch.Generator().manual_seed(len(content))
        while position:
            bits = torch.empty(min(position // 2, 8 << 20), dtype=torch.int16)
            bits.random_(-(1 << 15), 1 << 15, generator=generator)
            # Random signs and mantissas with exponents that no sum overflows: 0.0078 to 0.031.
            file.write(bits.bitwise_and_(-0x7F01).bitwise_or_(0x3C00).numpy().data)
            position -= 2 * bits.numel()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.big", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=CONFIGS, default="qwen3-30b")
    parser.add_argument("--layers", type=int, help="number of layers (default: the model's)")
    parser.add_argument("--sparse", action="store_true", help="only headers, the data are holes")
    args = parser.parse_args()
    count, size = write_model(args.folder, args.model, args.layers, args.sparse)
    print(f"{count} tensors, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
