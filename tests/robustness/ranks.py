"""The same with several ranks: any of them fails or is killed at any call, and all come to an end."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from tests.robustness.cases import Case, Ground
from tests.robustness.every import Choice
from tests.robustness.faults import FAIL, KILL, Fault
from tests.robustness.points import after_access, after_output, again, faults, unsaid
from tests.robustness.sources import tree
from tests.robustness.warm import Ended

CASES = ("import TP2 PP2", "import TP2 PP2 --overwrite", "export", "import torch_dist")
SECONDS = 40.0  # within which all ranks have ended
LIMITS = {"join": 8.0, "silence": 4.0, "beat": 0.2, "nudge": 2.0, "exit": 6.0, "farewell": 3.0}


def _quick() -> None:
    """Waits as short as a test needs."""
    from weights_conversion.launch import distributed
    from weights_conversion.output import assembly, journal, locks

    distributed.LIMITS = distributed.Limits(**LIMITS)
    for module in (assembly, journal):
        if hasattr(module, "VISIBLE_SECONDS"):
            module.VISIBLE_SECONDS = 3.0
    locks.LEFT_SECONDS = 5.0


def run(ground: Ground, case: Case, size: int, rank: int = 0, fault: Fault | None = None) -> list[Ended]:
    """How each rank of a job ended, of which `rank` meets `fault`."""

    def change() -> None:
        case.change()
        _quick()

    job = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(_port())}
    started = [
        ground.warm.start(
            case.line(ground.place), fault if number == rank else None, slot=number, change=change,
            environment=job | {"RANK": str(number), "LOCAL_RANK": str(number)},
        )
        for number in range(size)
    ]  # fmt: skip
    return [ground.warm.finish(process, SECONDS) for process in started]


def _port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def points(counts: Sequence[Mapping[str, int]], number: int, seed: str) -> Iterator[tuple[int, Fault]]:
    """`number` of (rank, fault), half of them kills: at any call, for what a rank does between changes counts too."""
    rng = random.Random(seed)
    single = [[fault for fault in faults(found) if fault.action == FAIL] for found in counts]
    for turn in range(number):
        rank = turn % len(counts)
        if turn // len(counts) % 2:
            yield rank, rng.choice(single[rank])
        else:
            kind = rng.choice([kind for kind in ("any", "changing") if counts[rank][kind]])
            yield rank, Fault(kind, rng.randint(1, counts[rank][kind]), KILL)


def chosen(counts: Sequence[Mapping[str, int]], choice: Choice) -> list[tuple[int, Fault]]:
    """Every (rank, fault) of the kinds that are asked for, in an order that is random and always the same."""
    found = [(rank, fault) for rank, calls in enumerate(counts) for fault in faults(calls) if choice.has(fault)]
    return random.Random(choice.seed).sample(found, min(choice.sample or len(found), len(found)))


def wrong(ground: Ground, case: Case, size: int, rank: int, fault: Fault) -> tuple[str, str | None]:
    """(how the rank ended, what is wrong about it or the others)."""
    old = ground.reset(case)
    ended = run(ground, case, size, rank, fault)
    if not ended[rank].hit:
        return "not reached", None
    how = f"{'killed' if ended[rank].code == -9 else 'failed' if ended[rank].code else 'went on'}"
    hit = "" if any(end.code for end in ended) else ended[rank].hit
    problem = _after(ground, case, ended, rank, fault, old) or again(
        ground, case, hit, run=lambda: _worst(run(ground, case, size))
    )
    if problem is None:
        return how, None
    said = "".join(f"\n    {number} ({end.code}): {end.text.strip()[-400:]}" for number, end in enumerate(ended))
    return how, f"{case.name}, {size} ranks: {rank}: {fault} ({ended[rank].hit}): {problem}{said}"


def _worst(ended: Sequence[Ended]) -> Ended:
    """The first rank that has not ended well, with what all have said."""
    text = "".join(end.text for end in ended)
    return replace(next((end for end in ended if end.code), ended[0]), text=text)


def _after(
    ground: Ground, case: Case, ended: Sequence[Ended], rank: int, fault: Fault, old: dict[str, str] | None
) -> str | None:  # fmt: skip
    said = "".join(end.text for end in ended)
    for number, end in enumerate(ended):
        if end.code is None or (end.code not in (0, 1, 143) and not (number == rank and end.code == -9)):
            return f"rank {number} ended with {end.code}"
        if "Traceback" in end.text:
            return f"a traceback of rank {number}"
        if (count := len(_errors(end.text))) > 1:
            return f"{count} sentences of rank {number}"
        if end.code == 1 and not _errors(said):
            return f"nothing was said, and rank {number} ended with 1"
        if problem := after_output(ground, case, -9 if end.code == 143 else end.code, end.text, old):
            return f"rank {number}: {problem}"
    if damage := ground.damage():
        return damage
    out = ground.place / "out"
    done = out.exists() and tree(out) == ground.expected[case.name]
    if not done and not _errors(said):
        return "nothing was said"
    if not done and fault.action == FAIL:
        whole = Ended(1, _errors(said)[0], ended[rank].counts, ended[rank].hit)
        if problem := unsaid(whole, ground.root, fault):
            return problem
    return after_access(ground, case, said, fault.action == FAIL, old)


def _errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error:")]
