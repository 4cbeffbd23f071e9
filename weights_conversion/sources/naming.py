"""What to say of tensors that a source lacks or has too many: few sentences, however many tensors they are about."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|absmax|quant_map|quant_state\.\S+|weight_scale(_inv)?|weight_packed|SCB)$"
)

# Names of other programs: whose they are, and what to give instead.
_SCHEMES = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (
            r"(encoder|transformer)\.(layers\.\d+\.(input|post_attention)_norm|final_norm)\.",
            "the names of NVIDIA's legacy Megatron-LM (before Megatron-Core); convert them to Megatron-Core with its "
            "tools/checkpoint/convert.py, and give that checkpoint",
        ),
        (
            r"(^|\.)layers\.\d+\.(attention\.w[qkvo]|attention\.wqkv|feed_forward\.w[123])",
            "Meta's names; give Meta's folder (consolidated.*.pth and params.json), or the Hugging Face files",
        ),
        (r"(^|\.)gpt_neox\.layers\.", "the names of GPT-NeoX, which is none of the supported families"),
        (r"(^|\.)transformer\.(h|blocks)\.\d+\.attn\.", "the names of GPT-2 or MPT, which are no supported families"),
        (r"\.lora_[AB]\.", "adapters beside the weights (LoRA); merge them (peft's merge_and_unload) first"),
    )
)


def grouped(sentences: Iterable[tuple[str, str]]) -> list[str]:
    """One sentence for all names that differ in numbers alone, as a layer's: the first's, and how many are like it.

    `sentences` are (name of the tensor, sentence about it).
    """
    first: dict[str, str] = {}
    count: Counter[str] = Counter()
    for name, sentence in sentences:
        kind = re.sub(r"\d+", "*", name)
        first.setdefault(kind, sentence)
        count[kind] += 1
    return [
        sentence + (f" (and {count[kind] - 1} more like it, by other numbers)" if count[kind] > 1 else "")
        for kind, sentence in first.items()
    ]


_LAYER = re.compile(r"^(.*?\b(?:layers|h|blocks))\.(\d+)\.")
_WHOLE = 5  # tensors of one layer that are taken for all of it


def _by_layer(names: Iterable[str]) -> dict[int, list[str]]:
    """The names of each layer of which so many are named that the layer as a whole is meant."""
    found: dict[int, list[str]] = {}
    for name in names:
        if match := _LAYER.match(name):
            found.setdefault(int(match[2]), []).append(name)
    return {number: names for number, names in found.items() if len(names) >= _WHOLE}


def _layers(names: Mapping[str, str]) -> list[str]:
    """One sentence for whole layers: a config of another number of layers, or files that are not there."""
    layers = _by_layer(names)
    if not layers:
        return []
    first, last, count = min(layers), max(layers), sum(map(len, layers.values()))
    which = f"layer {first}" if first == last else f"layers {first} to {last}"
    return [f"{names[layers[first][0]]} (and {count - 1} more, of {which})"]


def _others(names: Mapping[str, str]) -> list[tuple[str, str]]:
    whole = {name for of_layer in _by_layer(names).values() for name in of_layer}
    return [(name, sentence) for name, sentence in names.items() if name not in whole]


def mismatch(where: str, missing: Mapping[str, str], unexpected: Mapping[str, str]) -> list[str]:
    """Sentences about tensors (name -> sentence) that are missing and unexpected.

    Where all names are merely spelled otherwise, or quantised, one sentence says so.
    """
    if len(missing) > 2 and len(unexpected) > 2:
        quantised = sorted(name for name in unexpected if _QUANTISED.search(name))
        if quantised:
            return [
                f"{where} holds quantised weights ({quantised[0]}, {len(quantised)} tensors), which cannot be "
                "converted; take the unquantised checkpoint"
            ]
        foreign = next(((end, name) for start, end in _SCHEMES for name in unexpected if start.search(name)), None)
        if foreign:
            return [f"{where} holds tensors with {foreign[0]} (it has {foreign[1]})"]
        renamed = _prefixed(where, missing, unexpected) or _bare(where, missing, unexpected)
        if renamed:
            return [renamed]
    return [said for names in (missing, unexpected) for said in (*_layers(names), *grouped(_others(names)))]


def _prefixed(where: str, missing: Iterable[str], unexpected: Sequence[str] | Mapping[str, str]) -> str | None:
    wanted = set(missing)
    prefix = _shared({name[: -len(end)] for name in unexpected for end in _ends(name) if end in wanted})
    right = [name for name in unexpected if name.startswith(prefix) and name[len(prefix) :] in wanted] if prefix else []
    if len(right) * 2 < len(wanted):
        return None
    others = len(unexpected) - len(right)
    return (
        f"the names of {len(right)} tensors in {where} begin with {prefix!r}, which a wrapper around the model has put "
        "there (DistributedDataParallel, torch.compile, peft, a dict around the weights); save the model's own state "
        f"dict, or take it off the names{f' ({others} other tensors are too many)' if others else ''}"
    )


def _bare(where: str, missing: Iterable[str], unexpected: Sequence[str] | Mapping[str, str]) -> str | None:
    there = set(unexpected)
    wanted = list(missing)
    prefix = _shared({name[: -len(end)] for name in wanted for end in _ends(name) if end in there})
    right = [name for name in wanted if name.startswith(prefix) and name[len(prefix) :] in there] if prefix else []
    if len(right) * 2 < len(wanted):
        return None
    lacking = sorted(set(wanted) - set(right))
    without = f"; it also lacks {', '.join(lacking[:3])}" if lacking else ""
    return (
        f"the names of {len(right)} tensors in {where} lack {prefix!r} in front, as where a part of the model was "
        f"saved by itself; save the whole model{without}"
    )


def _ends(name: str) -> list[str]:
    """What is left of a dotted name when the first one, two ... parts are taken off."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def _shared(prefixes: set[str]) -> str:
    """The prefix that is meant, where there is one: the shortest."""
    return min(prefixes, key=len, default="")
