"""The one error that users see, and Problems, which collects what the checks of a stage find."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from weights_conversion.errors.text import one_line

P = ParamSpec("P")
R = TypeVar("R")

ALIKE = 4  # more problems than that, which differ in numbers alone, are one line
SHOWN = 10  # of a list of problems; how many more there are is told


class ConversionError(Exception):
    """One or more problems with what the user gave us, each a sentence naming the finding and its remedy.

    Each is kept on one line, whatever names are in it. `whole`: they are lines of a report, all to be shown.
    """

    def __init__(self, *problems: str, whole: bool = False):
        self.problems = tuple(one_line(problem) for problem in problems)
        self.whole = whole
        super().__init__(*self.problems)

    # What is said on stdout in front of the problems, such as the plan of a dry run that could not succeed.
    report: str = ""

    def __str__(self) -> str:
        told = self.problems if self.whole else _alike(self.problems)
        if len(told) == 1:
            return told[0]
        shown = told if self.whole else told[:SHOWN]
        lines = [f"{len(self.problems)} problems:", *(f"  - {problem}" for problem in shown)]
        if len(shown) < len(told):
            lines.append(f"  - and {len(told) - len(shown)} more")
        return "\n".join(lines)


def _alike(problems: tuple[str, ...]) -> list[str]:
    """The problems; of many that differ in numbers alone, as the files of all ranks do, the first and the last."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(re.sub(r"\d+", "0", problem), []).append(problem)
    told: list[str] = []
    for alike in kinds.values():
        many = len(alike) > ALIKE
        told += [f"{alike[0]} (and {len(alike) - 1} more like it; the last: {alike[-1]})"] if many else alike
    return told


class Problems:
    """What the checks of one stage have found, to be raised together at its end: arguments and OUT; source; plan."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def __bool__(self) -> bool:
        return bool(self.found)

    def of(self, check: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """What `check` returns; None where it raises ConversionError, whose problems are kept."""
        try:
            return check(*args, **kwargs)
        except ConversionError as error:
            self.found += [problem for problem in error.problems if problem not in self.found]
            return None

    def raise_all(self, report: str = "") -> None:
        """Raises ConversionError where anything was found; `report` is said in front of it."""
        if self.found:
            error = ConversionError(*self.found)
            error.report = report
            raise error
