"""Random Llama-2 models of given shapes, written to disk tensor by tensor: `python -m benchmarks.shapes --help`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

FILE_BYTES = 5_000_000_000  # of a weight file, as hub repositories are cut
MARKER = "benchmark_shape.json"


@dataclass(frozen=True)
class Shape:
    """A Llama-2 in bfloat16."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocabulary: int = 32000

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Hugging Face names and shapes, in a checkpoint's usual order."""
        kv = self.hidden // self.heads * self.groups
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.ffn)
            yield f"{prefix}.mlp.gate_proj.weight", (self.ffn, self.hidden)
            yield f"{prefix}.mlp.up_proj.weight", (self.ffn, self.hidden)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{prefix}.self_attn.k_proj.weight", (kv, self.hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.self_attn.v_proj.weight", (kv, self.hidden)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    @property
    def nbytes(self) -> int:
        return sum(2 * prod(shape) for _, shape in self.tensors())

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", layers=4, hidden=256, ffn=688, heads=8, groups=8),
        Shape("7b", layers=32, hidden=4096, ffn=11008, heads=32, groups=32),
        Shape("70b", layers=80, hidden=8192, ffn=28672, heads=64, groups=8),
        Shape("405b", layers=126, hidden=16384, ffn=53248, heads=128, groups=8, vocabulary=128256),
    )
}


def find_shape(name: str, layers: int | None) -> Shape:
    """One of SHAPES, with another number of layers where one is given."""
    return SHAPES[name] if layers is None else replace(SHAPES[name], layers=layers)


def is_written(folder: Path, shape: Shape) -> bool:
    """Whether `write_model` has finished this shape here."""
    marker = folder / MARKER
    return marker.is_file() and json.loads(marker.read_text()) == asdict(shape)


def write_model(folder: Path, shape: Shape, sparse: bool = False) -> None:
    """A Hugging Face folder without a tokenizer. `sparse`: headers are real, the data are holes that take no space."""
    folder.mkdir(parents=True)
    files: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, dims in shape.tensors():
        nbytes = 2 * prod(dims)
        if files[-1] and size + nbytes > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append((name, dims))
        size += nbytes
    weight_map = {}
    for number, content in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map |= {name: file for name, _ in content}
        _write_file(folder / file, content, sparse)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    index = {"metadata": {"total_size": shape.nbytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / MARKER).write_text(json.dumps(asdict(shape)))


def _write_file(path: Path, content: list[tuple[str, tuple[int, ...]]], sparse: bool) -> None:
    import torch

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dims in content:
        end = position + 2 * prod(dims)
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(len(content))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            file.truncate(file.tell() + position)
            return
        for _, dims in content:
            left = prod(dims)
            while left:
                bits = torch.empty(min(left, 8 << 20), dtype=torch.int16)
                bits.random_(-(1 << 15), 1 << 15, generator=generator)
                # Random signs and mantissas with exponents that no sum overflows: 0.0078 to 0.031.
                file.write(bits.bitwise_and_(-0x7F01).bitwise_or_(0x3C00).numpy().data)
                left -= bits.numel()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shapes", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="number of layers (default: the shape's)")
    parser.add_argument("--sparse", action="store_true", help="only headers, the data are holes")
    args = parser.parse_args()
    write_model(args.folder, find_shape(args.shape, args.layers), args.sparse)


if __name__ == "__main__":
    main()
