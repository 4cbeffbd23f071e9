"""Who failed x where it is told: what is said, and the exit code."""

from __future__ import annotations

import threading

import pytest

from weights_conversion.errors import ConversionError
from weights_conversion.launch.endings import End, Ended, Failure, SaidElsewhere
from weights_conversion.launch.outcome import TABLE, Cause, Says, cause, raised
from weights_conversion.launch.signals import Terminated

PROBLEM, FULL, DEFECT = ConversionError("a problem"), OSError(28, "no space"), RuntimeError("a defect")
MINE, THEIRS = 1, 2


@pytest.mark.parametrize(
    ("error", "failed", "nudged", "expected"),
    [
        (PROBLEM, None, False, Cause.PROBLEM),
        (FULL, None, False, Cause.PROBLEM),
        (PROBLEM, THEIRS, False, Cause.PROBLEM),
        (PROBLEM, THEIRS, True, Cause.PROBLEM),
        (DEFECT, None, False, Cause.DEFECT),
        (Terminated(), None, False, Cause.SIGNAL),
        (KeyboardInterrupt(), MINE, False, Cause.SIGNAL),
        (Terminated(), THEIRS, False, Cause.OTHER_AND_SIGNAL),
        (Terminated(), THEIRS, True, Cause.OTHER),
        (Terminated(), MINE, True, Cause.OTHER),
        (Ended(), THEIRS, False, Cause.OTHER),
    ],
)
def test_cause(error: BaseException, failed: int | None, nudged: bool, expected: Cause) -> None:
    end = End(threading.Event())
    if failed is not None:
        assert end.fail(Failure(failed, "why"))
    end.nudged = nudged
    assert cause(error, end, MINE) is expected


def test_the_first_failure_counts() -> None:
    stop = threading.Event()
    end = End(stop)
    assert end.fail(Failure(3, "first"))
    assert not end.fail(Failure(4, "second"))
    assert end.failure == Failure(3, "first")
    assert stop.is_set()


def test_every_cause_has_a_row() -> None:
    assert set(TABLE) == set(Cause)
    assert [row.first for row in TABLE.values()] == [Says.ERROR] * 3 + [Says.FAILURE] * 2
    # Where rank 0 has spoken, another rank says nothing, unless its traceback is needed.
    assert [row.spoken_for for row in TABLE.values()].count(Says.ERROR) == 1
    assert TABLE[Cause.DEFECT].spoken_for is Says.ERROR


@pytest.mark.parametrize(
    ("says", "error", "kind", "code"),
    [
        (Says.NOTHING, PROBLEM, SaidElsewhere, 1),
        (Says.NOTHING, Terminated(), SaidElsewhere, 1),
        (Says.NOTHING_SIGNAL, Terminated(), SaidElsewhere, 143),
        (Says.NOTHING_SIGNAL, KeyboardInterrupt(), SaidElsewhere, 130),
        (Says.FAILURE, Terminated(), ConversionError, None),
        (Says.ERROR, DEFECT, RuntimeError, None),
    ],
)
def test_raised(says: Says, error: BaseException, kind: type, code: int | None) -> None:
    found = raised(says, error, ["rank 2 of 3 on n1: why"])
    assert type(found) is kind
    assert getattr(found, "code", None) == code
    if kind is ConversionError:
        assert str(found) == "rank 2 of 3 on n1: why"
