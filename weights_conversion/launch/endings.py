"""How the work of a rank may end, and within what time the others have ended too."""

from __future__ import annotations

from dataclasses import dataclass

from weights_conversion.errors import SHOWN, ConversionError
from weights_conversion.fileio import failed

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


def sentence(error: BaseException) -> str:
    """What ended a rank, for its user."""
    if isinstance(error, ConversionError):
        return "; ".join(error.problems[:SHOWN])  # on one line, as everything that a rank says of another
    if isinstance(error, OSError):
        return f"{failed(error)}; {CONTINUES}"
    if isinstance(error, Exception):
        return f"{type(error).__name__}: {error}"
    return f"was interrupted; {CONTINUES}"
