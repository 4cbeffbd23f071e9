"""A file of what has been tried, a line each, from which an interrupted run goes on: `python -m tests.robustness
--progress FILE`, and `--summary` prints its counts.

The first line names the code by a digest: points that were tried with other code do not count.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from tests.robustness.sources import TESTS


def code() -> str:
    """SHA-256 over the package and these tests, in part."""
    found = hashlib.sha256()
    for folder in (TESTS.parent / "weights_conversion", TESTS / "robustness"):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".c", ".json")):
            found.update(f"{path.relative_to(TESTS.parent)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


class Progress:
    """`done`: (case, point) that were tried. Lines are appended by several processes, each in one write."""

    def __init__(self, path: Path | None, any_code: bool = False) -> None:
        """Raises ValueError where the file is of other code, unless `any_code`."""
        self._path, self._any_code = path, any_code
        self.done: set[tuple[str, str]] = set()
        self.totals: dict[str, int] = {}
        self.ends: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.findings: list[str] = []
        text = path.read_text() if path is not None and path.exists() else ""
        for line in text.splitlines():
            self._take(line)
        if path is not None and not text:
            self.note("code", code())

    def _take(self, line: str) -> None:
        try:
            kind, *rest = json.loads(line)
        except ValueError:  # cut off
            return
        if kind == "code" and rest[0] != code() and not self._any_code:
            raise ValueError(f"{self._path} is of other code ({rest[0]}, now {code()}); name another file")
        if kind == "total":
            self.totals[rest[0]] = rest[1]
        elif kind == "point":
            case, point, how, rerun = rest
            if (case, point) not in self.done:
                self.done.add((case, point))
                self.ends[case].update([how] + ["reruns"] * rerun)
        elif kind == "finding":
            self.findings.append(rest[0])

    def note(self, *what: object) -> None:
        line = json.dumps(what) + "\n"
        self._take(line)
        if self._path is not None:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(descriptor, line.encode())
            os.close(descriptor)

    def left(self, case: str, points: Iterable[str]) -> list[str]:
        return [point for point in points if (case, point) not in self.done]

    def table(self) -> str:
        """Markdown: each case with its points and how they ended."""
        heads = ("went on", "one sentence", "killed", "not reached", "reruns")
        rows: list[tuple[object, ...]] = [("case", "points", "tried", *heads)]
        everything: Counter[str] = Counter()
        for case in sorted(self.totals, key=list(self.totals).index):
            ends = self.ends[case]
            tried = sum(count for how, count in ends.items() if how != "reruns")
            everything += ends
            rows.append((case, self.totals[case], tried, *(ends[head] for head in heads)))
        tried = sum(count for how, count in everything.items() if how != "reruns")
        rows.append(("in all", sum(self.totals.values()), tried, *(everything[head] for head in heads)))
        lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
        lines.insert(1, "|---" * len(rows[0]) + "|")
        return "\n".join([*lines, "", *self.findings]) + "\n"

    def said(self) -> str:
        """In one line."""
        ends = sum(self.ends.values(), Counter[str]())
        reruns, tried = ends.pop("reruns", 0), sum(ends.values())
        counted = ", ".join(f"{count} {how}" for how, count in ends.most_common())
        return f"in all: {tried} points, {counted}; {reruns} reruns; {len(self.findings)} wrong ends"
