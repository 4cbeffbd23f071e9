"""What the commands print is what docs/captures shows; numbers may differ."""

from __future__ import annotations

import os

import pytest
from captures import COMMANDS, FILES, FOLDER, fresh, masked


@pytest.mark.parametrize("name", FILES)
def test_captures(name: str, tmp_path) -> None:
    try:
        os.setxattr(tmp_path, "user.test", b"")
    except (OSError, AttributeError):
        pytest.skip("this filesystem has no extended attributes, so that nothing is already complete")
    kept = (FOLDER / name).read_text(encoding="utf-8")
    assert kept.count("\n$ ") + kept.startswith("$ ") == len(COMMANDS)
    if FILES[name]:
        commands = [line for line in kept.splitlines() if not line.startswith(("$ ", "# "))]
        assert max(map(len, commands)) <= FILES[name]
    found = fresh(FILES[name])
    assert masked(found) == masked(kept), f"as it is now ('python tests/documents/captures.py' keeps it):\n{found}"
