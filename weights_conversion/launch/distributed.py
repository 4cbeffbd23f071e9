"""Many processes on one conversion: ranks that torchrun or srun started share the plan's chunks.

Weights move through the filesystem. What crosses the network are a few short values in a torch.distributed TCPStore:
each rank's digest of the plan, which chunks are done, signs of life, and the reason when something fails. A store needs
nothing but rank 0's address, and waiting on it can be given up at any moment, which a collective cannot.

Rank 0 judges: it ends the job when a rank reports an error, gives no sign of life, or never joins, and it alone speaks
to the user. Every other rank watches rank 0. A rank that waits sleeps; how long a phase lasts does not matter, as long
as every process lives. Without a launcher nothing here is used and no connection is opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from weights_conversion.errors import ConversionError
from weights_conversion.launch.endings import Limits, SaidElsewhere
from weights_conversion.launch.environment import find_launch
from weights_conversion.launch.group import Group
from weights_conversion.launch.ranks import Ranks

__all__ = ["LIMITS", "Limits", "Ranks", "SaidElsewhere", "current", "rank_zero_first", "run"]

LIMITS = Limits()
_current = Ranks()


def current() -> Ranks:
    """The job's ranks, or the one process that there is."""
    return _current


@contextmanager
def rank_zero_first(name: str) -> Iterator[None]:
    """Rank 0 goes through the block before the others do: it downloads, they find the files in the cache."""
    ranks = current()
    if ranks.rank:
        ranks.hear(f"first/{name}")
    yield
    if ranks.rank == 0:
        ranks.tell(f"first/{name}")


def run(outcome: Callable[[Callable[[], str]], int], work: Callable[[], str]) -> int:
    """Exit code of outcome(work), which says what work() returns or raises; under a launcher, for all ranks together.

    There `outcome` must return its code silently for SaidElsewhere; everything else it meets is for this rank to say.
    """
    global _current
    try:
        launch = find_launch(os.environ)
    except ConversionError as error:
        problem = error

        def refuse() -> str:
            raise problem

        return outcome(refuse)
    if launch is None:
        return outcome(work)
    group = Group(launch, LIMITS)
    _current = group
    try:
        return outcome(lambda: group.call(work))
    finally:
        group.leave()
        _current = Ranks()
