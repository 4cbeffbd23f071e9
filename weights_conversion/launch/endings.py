"""How the work of a rank may end, and within what time the others have ended too."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from weights_conversion.errors import SHOWN, ConversionError
from weights_conversion.files.fileio import failed

CONTINUES = "the same command, on any number of ranks, continues where this one stopped"


@dataclass(frozen=True)
class Limits:
    """Seconds. A death is known to all ranks, and they have ended, after at most silence + exit."""

    join: float = 40.0  # from the start of one rank until all have started
    silence: float = 25.0  # without a sign of life, after which a rank counts as dead
    beat: float = 1.0  # between signs of life
    nudge: float = 6.0  # after which a rank that is busy elsewhere is interrupted to hear of the end
    exit: float = 20.0  # after which it is ended
    farewell: float = 8.0  # how long the end of a rank waits for the others to hear of it

    @property
    def missed(self) -> float:
        """A rank without a sign of life for this long is looked for as the cause, when a launcher ends all ranks."""
        return 2.5 * self.beat

    @property
    def late(self) -> float:
        """And for this long, is named beside another cause."""
        return 4 * self.beat

    def search(self, rank: int) -> float:
        """How long the cause is looked for: the others wait for what rank 0 finds."""
        return (6 if rank else 4) * self.beat


class SaidElsewhere(Exception):
    """This rank ends with `code` and says nothing: rank 0 speaks for all."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Ended(Exception):
    """Another rank's failure ended this rank's work."""


@dataclass(frozen=True)
class Failure:
    """Why the job ends. `told`: rank 0 knows it, and says it."""

    rank: int
    text: str
    told: bool = True


class End:
    """How far this rank's end has come. The first failure, of this rank or another, counts, and stops its work."""

    def __init__(self, stop: threading.Event) -> None:
        self.failure: Failure | None = None
        self.failed_at = 0.0
        self.noticed = False  # by the thread that works, which ends now
        self.settled = False  # rank 0 needs no other rank any more
        self.nudged = False  # the working thread was interrupted to hear of the failure
        self._stop, self._lock = stop, threading.Lock()

    def fail(self, failure: Failure) -> bool:
        """Whether it is the first."""
        with self._lock:
            first = self.failure is None
            if first:
                self.failure, self.failed_at = failure, time.monotonic()
        self._stop.set()
        return first


def sentence(error: BaseException) -> str:
    """What ended a rank, for its user."""
    if isinstance(error, ConversionError):
        return "; ".join(error.problems[:SHOWN])  # on one line, as everything that a rank says of another
    if isinstance(error, OSError):
        return f"{failed(error)}; {CONTINUES}"
    if isinstance(error, Exception):
        return f"{type(error).__name__}: {error}"
    return f"was interrupted; {CONTINUES}"
