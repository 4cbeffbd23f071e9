"""The one error that users see."""

from __future__ import annotations

from weights_conversion.text import one_line

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
        if len(self.problems) == 1:
            return self.problems[0]
        shown = self.problems if self.whole else self.problems[:SHOWN]
        lines = [f"{len(self.problems)} problems:", *(f"  - {problem}" for problem in shown)]
        if len(shown) < len(self.problems):
            lines.append(f"  - and {len(self.problems) - len(shown)} more")
        return "\n".join(lines)
