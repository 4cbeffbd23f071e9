"""What README says of the families is what FAMILIES say."""

from __future__ import annotations

import re
from pathlib import Path

from weights_conversion.architectures import FAMILIES


def test_table_of_families() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    row = r"^\| `([a-z0-9.-]+)` \| ([^|]+) \| [^|]+ \| (megatron-llm|megatron-core) \|$"
    rows = re.findall(row, text, re.MULTILINE)
    assert {name: (sizes.split(", "), target) for name, sizes, target in rows} == {
        name: (list(family.repositories), family.target) for name, family in FAMILIES.items()
    }
