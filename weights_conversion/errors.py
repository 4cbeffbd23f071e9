"""The one error that users see."""

from __future__ import annotations


class ConversionError(Exception):
    """One or more problems with what the user gave us, each a sentence naming the finding and its remedy."""

    def __init__(self, *problems: str):
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return "\n".join([f"{len(self.problems)} problems:", *(f"  - {problem}" for problem in self.problems)])
