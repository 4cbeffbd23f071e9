"""docs/reliability.md says what the code holds."""

from __future__ import annotations

import re
from pathlib import Path

from weights_conversion import fileio

PAGE = (Path(__file__).parents[1] / "docs" / "reliability.md").read_text()


def test_limits_of_files() -> None:
    text = " ".join(PAGE.split())
    sizes = re.search(r"A config may have (\d+) MB, an index (\d+) MB, a tokenizer file (\d+) MB", text)
    assert sizes is not None
    limits = (fileio.MAX_CONFIG_BYTES, fileio.MAX_INDEX_BYTES, fileio.MAX_TOKENIZER_BYTES)
    assert tuple(int(size) * 10**6 for size in sizes.groups()) == limits
