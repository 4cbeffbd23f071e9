"""How a rank ends: what ended it, whether rank 0 speaks for it, what is said then, and the exit code."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from weights_conversion.errors import ConversionError
from weights_conversion.launch.endings import End, Ended, SaidElsewhere


class Cause(Enum):
    """What ended the work of this rank."""

    PROBLEM = "it met a problem: a ConversionError, or an error of the system"
    DEFECT = "it met an error of the program's"
    SIGNAL = "it got a signal, and no other rank has failed"
    OTHER = "it was told of a failure: another rank's, or that it does not come back from a call itself"
    OTHER_AND_SIGNAL = "it got a signal, as a launcher sends to all when one rank has failed"


class Says(Enum):
    """What this rank tells its user."""

    ERROR = "what it met, as a process without a launcher does; with that one's exit code"
    FAILURE = "the sentence of the rank that failed first; exit code 1"
    NOTHING = "rank 0 has said it; exit code 1"
    NOTHING_SIGNAL = "rank 0 has said it; exit code 130 or 143, as of the signal"


class Row(NamedTuple):
    """What is said where this is rank 0, where it is another and rank 0 has spoken, and where rank 0 has not."""

    first: Says
    spoken_for: Says
    alone: Says


TABLE = {
    #                           rank 0         another rank: rank 0 spoke   or did not
    Cause.PROBLEM:          Row(Says.ERROR,    Says.NOTHING,                Says.FAILURE),
    Cause.DEFECT:           Row(Says.ERROR,    Says.ERROR,                  Says.ERROR),
    Cause.SIGNAL:           Row(Says.ERROR,    Says.NOTHING_SIGNAL,         Says.FAILURE),
    Cause.OTHER:            Row(Says.FAILURE,  Says.NOTHING,                Says.FAILURE),
    Cause.OTHER_AND_SIGNAL: Row(Says.FAILURE,  Says.NOTHING_SIGNAL,         Says.FAILURE),
}  # fmt: skip


def cause(error: BaseException, end: End, rank: int) -> Cause:
    """Why `rank` ends with `error`, given the failure that it knows of."""
    interrupted = not isinstance(error, Exception)
    if isinstance(error, Ended) or (interrupted and end.nudged):
        return Cause.OTHER
    if interrupted:
        elsewhere = end.failure is not None and end.failure.rank != rank
        return Cause.OTHER_AND_SIGNAL if elsewhere else Cause.SIGNAL
    return Cause.PROBLEM if isinstance(error, (ConversionError, OSError)) else Cause.DEFECT


def signal_code(error: BaseException) -> int:
    return 130 if isinstance(error, KeyboardInterrupt) else 143


def raised(says: Says, error: BaseException, sentences: list[str]) -> BaseException:
    """The exception by which the command line says it; `sentences`: the failure's, and what may lie behind it."""
    if says is Says.ERROR:
        return error
    if says is Says.FAILURE:
        return ConversionError(*sentences)
    return SaidElsewhere(signal_code(error) if says is Says.NOTHING_SIGNAL else 1)
