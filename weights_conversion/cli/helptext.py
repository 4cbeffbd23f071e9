"""How --help looks: grouped, as wide as the terminal (120 columns at most), with examples and exit codes at its end."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Mapping, Sequence

CONVERSION_CODES = {
    "0": "done, or already complete: the same command has written it",
    "1": "an error, or a dry run whose conversion would be one; nothing that was there has changed, unless it says so",
    "2": "wrong arguments",
    "130, 143": "interrupted, terminated: the same command continues",
}
VERIFY_CODES = {"0": "the same model", "1": "different", "2": "wrong arguments, or a side that cannot be read"}
_MOST, _LEAST = 120, 40


class Formatter(argparse.HelpFormatter):
    """Fills each paragraph of a description by itself; lines that begin with two spaces stay as they are."""

    def __init__(self, prog: str) -> None:
        width = min(max(shutil.get_terminal_size().columns, _LEAST), _MOST)
        super().__init__(prog, width=width, max_help_position=32 if width >= 100 else 26)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = []
        for paragraph in text.strip("\n").split("\n\n"):
            lines = paragraph.splitlines()
            kept = any(line.startswith("  ") for line in lines)
            paragraphs.append(paragraph if kept else textwrap.fill(" ".join(lines), width, break_on_hyphens=False))
        return "\n\n".join(paragraphs)


def epilog(examples: Sequence[str], codes: Mapping[str, str]) -> str:
    """The end of a command's help. An example may be two lines."""
    shown = [f"  {line}" for example in examples for line in example.splitlines()]
    meanings = []
    for code, meaning in codes.items():
        lines = textwrap.wrap(meaning, 64)
        meanings += [f"  {code:8}  {lines[0]}", *(f"  {'':8}  {line}" for line in lines[1:])]
    parts = [["examples:", *shown]] if examples else []
    parts += [["exit codes:", *meanings]] if codes else []
    return "\n\n".join("\n".join(part) for part in parts)
