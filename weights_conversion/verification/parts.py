"""Tensors that join several parts: which ones, in which order, of how many rows each. Written down a second time.

Hugging Face has each part whole, one behind the other; a rank of Megatron's has its share of each; torch_dist has each
as a tensor of its own.
"""

from __future__ import annotations

import re

from weights_conversion.config import ModelConfig

# The end of a joined tensor's name -> its parts.
_JOINED = {
    ".mixer.in_proj.weight": ("z", "x", "B", "C", "dt"),
    ".mixer.conv1d.weight": ("x", "B", "C"),
    ".mixer.conv1d.bias": ("x", "B", "C"),
    ".self_attention.in_proj.weight": ("query", "key", "value", "z", "beta", "alpha"),
    ".self_attention.conv1d.weight": ("query", "key", "value"),
}
_LIVE = {".mixer.conv1d.weight": ".mixer.conv1d_weight", ".mixer.conv1d.bias": ".mixer.conv1d_bias"}
_PART = re.compile(r"(.*)\.(\w+)")


def sizes_of(name: str, config: ModelConfig) -> dict[str, int]:
    """Part -> its rows, of a joined tensor; {}: `name` is none."""
    parts = next((parts for end, parts in _JOINED.items() if name.endswith(end)), ())
    mamba, delta = config.mamba, config.gated_delta
    if delta is not None:
        keys, values = delta.num_key_heads * delta.key_head_dim, delta.num_value_heads * delta.value_head_dim
        rows = {"query": keys, "key": keys, "value": values, "z": values}
        return {part: rows.get(part, delta.num_value_heads) for part in parts}
    if mamba is None:
        return {}
    inner, states = mamba.num_heads * mamba.head_dim, mamba.num_groups * mamba.state_dim
    rows = {"z": inner, "x": inner, "B": states, "C": states, "dt": mamba.num_heads}
    return {part: rows[part] for part in parts}


def part_of(name: str, config: ModelConfig) -> tuple[str, int, int] | None:
    """(a joined tensor's name in a model that runs, first row, last row) of a part; None: `name` is no part."""
    match = _PART.fullmatch(name)
    sizes = sizes_of(match[1], config) if match else {}
    if match is None or match[2] not in sizes:
        return None
    first = 0
    for part, size in sizes.items():
        if part == match[2]:
            break
        first += size
    live = next((match[1].removesuffix(end) + new for end, new in _LIVE.items() if match[1].endswith(end)), match[1])
    return live, first, first + sizes[match[2]]
