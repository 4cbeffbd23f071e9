"""How the ranks of a job find each other: the TCPStore that they all connect to."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

from weights_conversion.errors import ConversionError
from weights_conversion.launch.endings import Limits
from weights_conversion.launch.environment import Launch
from weights_conversion.launch.line import Store

PAUSES = 0.02, 0.5  # seconds between the first two looks for the others, and between the last ones


def connect(launch: Launch, limits: Limits, deadline: float) -> Store:
    """The store of the job, which rank 0 serves unless its launcher does. Others wait for it until `deadline`."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # each refused attempt would be a warning
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    host = socket.gethostname()
    timeout = timedelta(seconds=limits.silence)
    if launch.serves:
        try:
            return Store(TCPStore("localhost", launch.port, None, True, timeout, False), launch.name)
        except RuntimeError as error:
            raise ConversionError(
                f"rank 0 cannot listen at port {launch.port} of {host}: {_first_line(error)}; "
                "MASTER_PORT names another one"
            ) from error
    while True:
        left = deadline - time.monotonic()
        try:
            short = timedelta(seconds=max(1.0, min(left, 5.0)))  # a signal is handled between attempts
            store = TCPStore(launch.address, launch.port, None, False, short, False)
            store.set_timeout(timeout)
            return Store(store, launch.name)
        except RuntimeError as error:
            if left <= 0:
                raise ConversionError(
                    f"rank {launch.rank} of {launch.size} on {host}: cannot reach rank 0 at {launch.address} port "
                    f"{launch.port} within {limits.join:.0f} s ({_first_line(error)}); see whether rank 0 has started "
                    "and the port is open, or set MASTER_ADDR and MASTER_PORT"
                ) from error
            time.sleep(0.2)


def meet(store: Store, launch: Launch, deadline: float) -> list[str] | None:
    """The hosts of all ranks as soon as all have come; None after `deadline`, or where rank 0 has ended the job."""
    host = socket.gethostname()
    store.set(f"host/{launch.rank}", host)
    store.set(f"alive/{launch.rank}", "0 0")
    wanted = ["joined"] if launch.rank else [f"host/{rank}" for rank in range(launch.size)]
    pause, longest = PAUSES
    while not store.has(*wanted):
        if launch.rank and store.has("failed"):
            return None
        if time.monotonic() > deadline + (2 if launch.rank else 0):
            return None
        time.sleep(pause)
        pause = min(pause * 1.5, longest)
    if launch.rank:
        return json.loads(store.get("joined")[0])
    hosts = store.get(*wanted)
    store.set("joined", json.dumps(hosts))
    return hosts


def absent(store: Store, size: int) -> list[int]:
    return [rank for rank in range(size) if not store.has(f"host/{rank}")]


def not_joined(missing: Sequence[int], size: int, limits: Limits) -> str:
    """Said of a job whose ranks have not all come."""
    names = ", ".join(map(str, missing[:20])) + (" ..." if len(missing) > 20 else "")
    return (
        f"rank{'s' * (len(missing) > 1)} {names} of {size} did not start within {limits.join:.0f} s; see their logs, "
        "start all ranks at one time, or unset WORLD_SIZE and SLURM_STEP_ID where one process is meant"
    ) if missing else "rank 0 did not begin in time"  # fmt: skip


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
