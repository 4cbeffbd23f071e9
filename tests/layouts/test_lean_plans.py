"""Plans of very many tensors: work that grows with their number and no faster, and objects without a dict each."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from weights_conversion.architectures import FAMILIES
from weights_conversion.config import ModelConfig, Moe, Parallelism
from weights_conversion.engine import identity
from weights_conversion.engine.copies import inconsistencies
from weights_conversion.engine.job import Job
from weights_conversion.engine.report import Report
from weights_conversion.engine.streams import Source
from weights_conversion.formats.rank_format import rank_file
from weights_conversion.layouts.placement import Block, Located, Placed, TensorRef, Written, whole
from weights_conversion.layouts.plan import Chunk, Plan, Step
from weights_conversion.layouts.planners import plan_to_dist, plan_to_megatron
from weights_conversion.mapping.dialects import HF, MEGATRON_CORE

FAMILY = FAMILIES["qwen3-moe"]


def config_of(layers: int, experts: int) -> ModelConfig:
    moe = Moe(num_experts=experts, ffn_hidden_size=8, topk=2, layers=(True,) * layers)
    return ModelConfig(
        family="qwen3-moe", num_layers=layers, hidden_size=16, ffn_hidden_size=32, num_attention_heads=4,
        num_query_groups=2, head_dim=4, vocab_size=64, max_position_embeddings=64, layernorm_epsilon=1e-6,
        qk_layernorm=True, moe=moe,
    )  # fmt: skip


def located(config: ModelConfig, file: str) -> Located:
    found, at = {}, 0
    for instance in FAMILY.instances(config):
        refs = []
        for name, shape in zip(instance.hf_names, instance.row.hf_shapes(config), strict=True):
            refs.append(TensorRef(file, name, torch.bfloat16, shape, at))
            at += refs[-1].nbytes
        found[instance.key] = tuple(map(whole, refs))
    return found


def planned(config: ModelConfig, file: str, kind: str) -> Plan:
    sources = located(config, file)
    if kind == "torch_dist":
        return plan_to_dist(FAMILY, config, sources, HF, MEGATRON_CORE, 64, None, "release")
    parallel = Parallelism(2, 2, expert=2)
    name = rank_file("release", parallel)
    return plan_to_megatron(FAMILY, config, sources, HF, MEGATRON_CORE, parallel, 64, None, name)


@dataclasses.dataclass(frozen=True)
class Target:
    file: str
    refs: tuple[TensorRef, ...]


def digest_of(plan: Plan) -> str:
    targets: Any = [Target(file, refs) for file, refs in plan.targets.items()]
    return identity.plan_digest(Job(plan, Report(), targets, Path("out")), "keep")


def calls(config: ModelConfig, file: str, kind: str) -> int:
    """How many functions are called to plan, to cut into chunks, and to take the digest."""
    count = 0

    def seen(_: object, event: str, __: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        plan = planned(config, file, kind)
        plan.chunks()
        digest_of(plan)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("kind", ["torch_dist", "torch"])
def test_work_grows_with_the_number_of_tensors(kind: str, tmp_path: Path) -> None:
    """Twice the layers are at most twice the calls, and no tensor costs more than a hundred of them a rank."""
    (tmp_path / "weights").touch()
    file = str(tmp_path / "weights")
    calls(config_of(2, 4), file, kind)  # fills the caches
    few, many = (calls(config_of(layers, 32), file, kind) for layers in (4, 8))
    assert many < 2.1 * few
    assert many < 200 * sum(map(len, located(config_of(8, 32), file).values()))


def test_values_of_a_plan_have_no_dict() -> None:
    ref = TensorRef("file", "name", torch.float32, (2, 2))
    block = Block(ref, 0, (0, 2), (0, 2))
    placed = Placed("name", torch.float32, 2, 2, ((block,),))
    instance = FAMILY.embedding
    for value in (ref, block, placed, Step(instance, (placed,), (placed,), 2), Chunk(0, 0, 2, 16),
                  Written(ref, 0, 16, 0), instance):  # fmt: skip
        assert not hasattr(value, "__dict__"), type(value)


def changed(plan: Plan, **block: Any) -> Plan:
    """The plan with other values in the last block of its last target."""
    step = plan.steps[-1]
    (placed,) = step.target
    copy = placed.copies[-1]
    other = (*copy[:-1], dataclasses.replace(copy[-1], **block))
    there = dataclasses.replace(placed, copies=(*placed.copies[:-1], other))
    return dataclasses.replace(plan, steps=(*plan.steps[:-1], dataclasses.replace(step, target=(there,))))


def test_digest_tells_every_field_of_a_block_apart(tmp_path: Path) -> None:
    """Equal plans have equal digests, made anew; whatever a block or its tensor differs in shows."""
    (tmp_path / "weights").touch()
    plan = planned(config_of(2, 4), str(tmp_path / "weights"), "torch")
    ref = plan.steps[-1].target[0].copies[-1][-1].ref
    others = [
        changed(plan, start=1),
        changed(plan, rows=(0, 1)),
        changed(plan, columns=(0, 1)),
        *(changed(plan, ref=dataclasses.replace(ref, **{name: value})) for name, value in
          {"file": "other", "name": "other", "dtype": torch.float16, "shape": (1, 1), "offset": 7,
           "transposed": True}.items()),
        dataclasses.replace(plan, new_rows="mean"),
    ]  # fmt: skip
    digests = [digest_of(each) for each in (plan, *others)]
    assert len(set(digests)) == len(digests)
    assert digest_of(planned(config_of(2, 4), str(tmp_path / "weights"), "torch")) == digests[0]


@pytest.mark.parametrize("sums", [(5, 5), (5, 6), (None, None)])
def test_copies_are_compared_by_their_sums_where_that_is_asked(sums: tuple[int | None, int | None], tmp_path) -> None:
    """Equal CRC-32s say enough for a dry run; those that differ, or are not kept, are followed by a look at the bytes.

    The bytes differ here, so that what was looked at shows.
    """
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(32)))
    refs = [TensorRef(str(path), name, torch.int16, (2, 4), at, crc=crc)
            for name, at, crc in (("one", 0, sums[0]), ("two", 16, sums[1]))]  # fmt: skip
    one, two = map(whole, refs)
    config = config_of(1, 2)
    step = Step(FAMILY.embedding, (dataclasses.replace(one, copies=one.copies + two.copies),), (one,), 2)
    plan = Plan(config, HF, MEGATRON_CORE, (step,), {})
    source = Source()
    try:
        assert len(inconsistencies(plan, source, 2)) == 1
        assert len(inconsistencies(plan, source, 2, by_sums=True)) == (0 if sums == (5, 5) else 1)
    finally:
        source.close()
