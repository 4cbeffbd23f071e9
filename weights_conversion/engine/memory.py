"""How much memory this process may still take: the machine's, or what a scheduler's control groups leave of it."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from pathlib import Path

from weights_conversion.errors import ConversionError

_NEVER = 1 << 60  # control groups without a limit say "max", or a number close to 2^63


def peak() -> int:
    """The most memory that this process has had resident, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def available(root: Path = Path("/")) -> int | None:
    """Bytes that may still be taken; None where nobody says (no Linux). `root` holds proc and sys.

    Page cache does not count as taken: the kernel gives it up when memory is asked for.
    """
    return min([*_left_on_machine(root), *_left_in_groups(root)], default=None)


def _left_on_machine(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return
    free = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if rest}
    if "MemAvailable" in free:
        yield free["MemAvailable"] + free.get("SwapFree", 0)


def check(needed: int, processes: int = 1, root: Path = Path("/")) -> None:
    """Refuses to begin what will be killed for its memory: `needed` bytes in each of `processes` on this machine.

    A control group may be one process's or all of theirs, so that there it is this process that must fit.
    """
    for left, wanted in (
        (min(_left_on_machine(root), default=None), needed * processes),
        (min(_left_in_groups(root), default=None), needed),
    ):
        if left is not None and wanted > left:
            raise ConversionError(
                f"about {wanted / 1e9:.1f} GB of memory are needed, but {left / 1e9:.1f} GB are available here; "
                "fewer --workers need less, or ask the scheduler for more (--mem)"
            )


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each limit above this process leaves: in its own control group, and in every one that holds it."""
    try:
        entries = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in entries:
        if not controllers:  # version 2, one tree for all controllers
            base, limit, usage = root / "sys/fs/cgroup", "memory.max", "anon"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "total_rss"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder != base and base not in folder.parents:
                break
            try:
                most = int((folder / limit).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no limit here, or not to be seen from inside a container
                continue
            if most < _NEVER:
                yield max(most - int(stat.get(usage, 0)), 0)
