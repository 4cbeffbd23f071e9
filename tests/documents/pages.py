"""What README and docs say: their commands, options and links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
JOBS = sorted((ROOT / "docs" / "jobs").glob("*.sh"))
_BLOCK = re.compile(r"^```(?:bash|sh)?\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Command:
    """One line of a block, its variables put in and its comment left out."""

    page: str
    variables: dict[str, str]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def commands(page: Path) -> Iterator[Command]:
    """Every command in a page's blocks; `NAME="value"` lines hold for what follows in their block."""
    for block in _BLOCK.findall(page.read_text()):
        known: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in known.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            given: dict[str, str] = {}
            while words and (match := re.fullmatch(r"(\w+)=(.*)", words[0], re.S)):
                given[match[1]] = match[2]
                words.pop(0)
            if words:
                yield Command(page.name, given, tuple(words))
            else:
                known |= given


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as they are linked to."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
