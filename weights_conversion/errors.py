"""The one error that users see."""

from __future__ import annotations

import re

from weights_conversion.text import one_line

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
