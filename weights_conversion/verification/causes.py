"""What differing tensors are instead: rows in another order, another tensor, another layer, one rank's, one bit.

Rows and columns are told apart by 64-bit fingerprints, so that whole tensors are compared as multisets of rows without
being in memory.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor

from weights_conversion.engine.streams import Scratch, Source
from weights_conversion.layouts.placement import Key
from weights_conversion.mapping.parameters import Instance, ParamMapping, Role
from weights_conversion.verification import orders
from weights_conversion.verification.differences import BLOCK_VALUES, INTEGERS, Difference, Exact
from weights_conversion.verification.exact import Pair, read_hf
from weights_conversion.verification.sides import Model

MAX_LAYERS = 4  # layers whose tensors are examined; the mistakes of a writer repeat


@dataclass(frozen=True)
class Prints:
    """Fingerprints of one HF tensor's rows and columns."""

    rows: Tensor
    columns: Tensor


@dataclass
class Examiner:
    pair: Pair
    files: Source = field(default_factory=Source)
    known: dict[tuple[bool, Key, bool], list[Prints]] = field(default_factory=dict)

    def prints(self, model: Model, instance: Instance, short: bool = False) -> list[Prints]:
        """Of each HF tensor of a parameter, rounded to the coarser dtype of the sides; `short`: of its first rows."""
        key = (model is self.pair.source, instance.key, short)
        if key not in self.known:
            self.known[key] = self._prints(model, instance, short)
        return self.known[key]

    def _prints(self, model: Model, instance: Instance, short: bool) -> list[Prints]:
        scratch, row = Scratch(), instance.row
        rows: list[list[Tensor]] = [[] for _ in row.hf]
        columns: list[Tensor | None] = [None for _ in row.hf]
        chunks = self.pair.chunks(instance)
        for units in islice(chunks, 1) if short else chunks:
            scratch.reset()
            starts = [start for start, _ in row.op.hf_rows(*units, self.pair.config)]
            tensors = read_hf(model, instance, units, self.pair.config, self.files, scratch)
            for index, (tensor, start) in enumerate(zip(tensors, starts, strict=True)):
                step = max(BLOCK_VALUES // tensor.shape[1], 1)
                for first in range(0, tensor.shape[0], step):
                    block = self._integers(tensor[first : first + step], instance)
                    rows[index].append((block * _numbers(0, block.shape[1])).sum(1))
                    part = (block * _numbers(start + first, block.shape[0]).unsqueeze(1)).sum(0)
                    before = columns[index]
                    columns[index] = part if before is None else before + part
        return [Prints(torch.cat(r), c if c is not None else r[0]) for r, c in zip(rows, columns, strict=True)]

    def _integers(self, tensor: Tensor, instance: Instance) -> Tensor:
        dtypes = {m.tensors(instance)[0].dtype for m in (self.pair.source, self.pair.checkpoint)}
        coarse = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        tensor = tensor.to(coarse)
        return tensor.view(INTEGERS[tensor.element_size()]).to(torch.int64)

    def both(self, instance: Instance) -> tuple[list[Prints], list[Prints]]:
        return self.prints(self.pair.source, instance), self.prints(self.pair.checkpoint, instance)


def _numbers(start: int, count: int) -> Tensor:
    """Odd 64-bit multipliers for places start.., the same in every block."""
    place = torch.arange(start + 1, start + count + 1, dtype=torch.int64)
    mixed = place * -7046029254386353131  # splitmix64's increment and multipliers
    mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
    return (mixed ^ (mixed >> 31)) | 1


def explain(pair: Pair, exact: Exact) -> tuple[list[str], list[str]]:
    """Sets the `cause` of differences, and returns (causes of all of them together, where they stand)."""
    if not exact.differences:
        return [], []
    examiner = Examiner(pair)
    try:
        layers = sorted({d.layer for d in exact.differences if d.layer is not None})
        found = _layers(examiner, exact, layers)
        examined = {None, *layers[:MAX_LAYERS]}
        groups: dict[Key, list[Difference]] = defaultdict(list)
        for difference in exact.differences:
            if difference.layer in examined:
                groups[difference.instance.key].append(difference)
        for group in groups.values():
            _explain(examiner, group)
    finally:
        examiner.files.close()
    guilty, stale = _files(pair, exact)
    return (found + guilty, []) if stale else (found, guilty)


def _explain(examiner: Examiner, group: list[Difference]) -> None:
    instance = group[0].instance
    row = instance.row
    if all(d.values == 1 for d in group):
        for d in group:
            d.cause = _single(d)
        return
    of_source, of_checkpoint = examiner.both(instance)
    for d in group:
        a, b = of_source[d.index], of_checkpoint[d.index]
        if len(row.shape) == 1 and len(row.hf) == 1:  # a norm; the biases of q, k and v have rows as their weights do
            d.cause = _norm(examiner, instance, d)
        else:
            d.cause = _order(examiner, d, a, b) or (_bias(examiner, d, b) if len(row.shape) == 1 else None)
    if len(row.hf) > 1 and not all(d.cause for d in group):
        cause = _across(row, of_source, of_checkpoint)
        for d in group:
            d.cause = d.cause or cause
    if row.role is Role.HEAD and group[0].cause is None:
        embedding = next(each for each in examiner.pair.parameters if each.row.role is Role.EMBEDDING)
        if torch.equal(of_checkpoint[0].rows, examiner.prints(examiner.pair.source, embedding)[0].rows):
            group[0].cause = "it is the embedding: a head tied by mistake"
    for d in group:
        if d.cause is None and d.broken == d.values:
            d.cause = "values that are NaN or infinite on one side"


def _single(d: Difference) -> str:
    if d.broken:
        return "one value is NaN or infinite on one side"
    return "one bit is flipped" if d.bits == 1 else "one value"


def _norm(examiner: Examiner, instance: Instance, d: Difference) -> str | None:
    row, pair = instance.row, examiner.pair
    (tensor,) = read_hf(pair.checkpoint, instance, (0, d.shape[0]), pair.config, examiner.files, Scratch())
    if not row.megatron.endswith("bias") and bool((tensor == 1).all()):
        return "all ones: a norm that was never loaded"
    if row.megatron.endswith("bias") and bool((tensor == 0).all()):
        return "all zeros: a norm's bias that was never loaded"
    mine = examiner.prints(pair.checkpoint, instance)[0]
    for other in pair.parameters:
        alike = len(other.row.shape) == 1 and other.row.megatron[-4:] == row.megatron[-4:]
        if alike and other.key != instance.key:
            of_checkpoint = examiner.prints(pair.source, other)[0]
            if torch.equal(mine.rows, of_checkpoint.rows):
                return f"it holds the source's {other.hf_names[0]}"
    return None


def _bias(examiner: Examiner, d: Difference, found: Prints) -> str | None:
    """Of q, k or v: never loaded, or another layer's."""
    if not found.rows.any():  # the fingerprint of zero, and of nothing else in a row of one value
        return "all zeros: a bias that was never loaded"
    for other in examiner.pair.parameters:
        if other.row == d.mapping and other.index != d.instance.index:
            there = examiner.prints(examiner.pair.source, other)[d.index]
            if torch.equal(found.rows, there.rows):
                return f"it holds the source's {other.hf_names[d.index]}"
    return None


def _order(examiner: Examiner, d: Difference, a: Prints, b: Prints) -> str | None:
    """The same rows or columns in another order."""
    rows = orders.permutation(a.rows, b.rows)
    if rows is not None:
        qkv = "linear_qkv" in d.mapping.megatron
        heads = orders.heads(rows, examiner.pair.config.head_dim) if qkv else None
        ranks = orders.blocks(rows, _rank_counts(examiner.pair))
        return ranks or heads or orders.blocks(rows, (2, 4, 8)) or orders.shift(rows) or "its rows are in another order"
    columns = orders.permutation(a.columns, b.columns)
    if columns is not None:
        counts = (*_rank_counts(examiner.pair), 2, 4, 8)
        return orders.blocks(columns, counts) or "its columns are in another order"
    if d.mapping.pads_vocabulary and (text := _padded_blocks(examiner.pair, d, a, b)):
        return text
    for by in (1, 2):
        if torch.equal(a.rows[by:], b.rows[:-by]) or torch.equal(a.rows[:-by], b.rows[by:]):
            return f"its rows are shifted by {by}"
    return None


def _padded_blocks(pair: Pair, d: Difference, a: Prints, b: Prints) -> str | None:
    """As orders.blocks, for a table of which the last rank's part is partly padding."""
    (stored,) = pair.checkpoint.tensors(d.instance)[:1]
    common = pair.config.vocab_size
    for count in _rank_counts(pair):
        size = stored.rows // count
        moved = []
        for place in range(count):
            mine = b.rows[place * size : min((place + 1) * size, common)]
            for other in range(count):
                of_checkpoint = a.rows[other * size : min((other + 1) * size, common)]
                shared = min(len(mine), len(of_checkpoint))
                if other != place and shared and torch.equal(mine[:shared], of_checkpoint[:shared]):
                    moved.append(place)
                    break
        if moved:
            return f"the parts of tensor ranks {' and '.join(map(str, moved))} (of {count}) are exchanged"
    return None


def _rank_counts(pair: Pair) -> list[int]:
    """Numbers of tensor ranks that cut a side's tensors."""
    counts = [model.files.parallel.tensor for model in (pair.checkpoint, pair.source) if model.files]
    return [count for count in dict.fromkeys(counts) if count > 1]


def _across(row: ParamMapping, of_source: list[Prints], of_checkpoint: list[Prints]) -> str | None:
    """Rows that moved between the HF tensors of one Megatron tensor."""
    a, b = torch.cat([p.rows for p in of_source]), torch.cat([p.rows for p in of_checkpoint])
    crossed = zip(of_source, reversed(of_checkpoint), strict=False)
    if len(row.hf) == 2 and all(torch.equal(one.rows, other.rows) for one, other in crossed):
        return "gate and up are swapped"
    if orders.permutation(a, b) is None:
        return None
    if len(row.hf) == 2:
        return "rows of gate and up are mixed: cut among ranks as one block, or joined in the wrong order"
    return "rows of q, k and v are mixed: the query groups were put together wrongly"


def _layers(examiner: Examiner, exact: Exact, layers: list[int]) -> list[str]:
    """Layers that hold another layer's weights."""
    by_layer = {
        layer: [d for d in exact.differences if d.layer == layer and len(d.mapping.shape) > 1] for layer in layers
    }
    found: dict[int, int] = {}
    pair = examiner.pair
    for layer in layers[: 4 * MAX_LAYERS]:
        if not by_layer[layer]:
            continue
        smallest = min(by_layer[layer], key=lambda d: d.shape[0] * d.shape[1]).instance
        mine = examiner.prints(examiner.pair.checkpoint, smallest, short=True)[0].rows
        for other in range(examiner.pair.config.num_layers):
            there = replace(smallest, index=(other, *smallest.index[1:]))
            known = there.key in pair.source.placed
            if other != layer and known and torch.equal(mine, examiner.prints(pair.source, there, short=True)[0].rows):
                found[layer] = other
                break
    return [
        f"layers {layer} and {other} are exchanged" if found.get(other) == layer
        else f"layer {layer} holds the weights of the source's layer {other}"
        for layer, other in found.items()
        if not (found.get(other) == layer and other < layer)
    ]  # fmt: skip


def _files(pair: Pair, exact: Exact) -> tuple[list[str], bool]:
    """Files that hold everything that differs, where others hold nothing of it; and whether one may be stale."""
    guilty: set[str] = set()
    for d in exact.differences:
        guilty |= set(d.files)
    held = {
        pair.checkpoint.file_name(block.ref.file)
        for group in pair.checkpoint.placed.values() for placed in group for copy in placed.copies for block in copy
    }  # fmt: skip
    if len(held) == 1 or not guilty or guilty == held:
        return [], False
    names = ", ".join(sorted(guilty)[:4]) + (f" and {len(guilty) - 4} more" if len(guilty) > 4 else "")
    whole = len(exact.differences) > 4 and len(guilty) == 1
    hint = ": it may be stale, of another iteration or another checkpoint" if whole else ""
    return [f"all that differs stands in {names}, of {len(held)} files{hint}"], whole
