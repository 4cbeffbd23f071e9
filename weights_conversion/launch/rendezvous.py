"""How the ranks of a job find each other: the TCPStore that they all connect to."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from weights_conversion.errors import ConversionError
from weights_conversion.launch.endings import Limits
from weights_conversion.launch.environment import Launch

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]


def connect(launch: Launch, limits: Limits, deadline: float) -> TCPStore:
    """The store of the job, which rank 0 serves unless its launcher does. Others wait for it until `deadline`."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # each refused attempt would be a warning
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    host = socket.gethostname()
    timeout = timedelta(seconds=limits.silence)
    if launch.serves:
        try:
            return TCPStore("localhost", launch.port, None, True, timeout, False)
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
            return store
        except RuntimeError as error:
            if left <= 0:
                raise ConversionError(
                    f"rank {launch.rank} of {launch.size} on {host}: cannot reach rank 0 at {launch.address} port "
                    f"{launch.port} within {limits.join:.0f} s ({_first_line(error)}); see whether rank 0 has started "
                    "and the port is open, or set MASTER_ADDR and MASTER_PORT"
                ) from error
            time.sleep(0.2)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
