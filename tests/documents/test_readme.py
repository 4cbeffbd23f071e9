"""What README says of the families is what FAMILIES say."""

from __future__ import annotations

import re
from pathlib import Path

from weights_conversion.architectures import FAMILIES

# | `NAME` | sizes | `owner/name-{a,b}`; other models | target |
ROW = r"^\| `([a-z0-9.-]+)` \| ([^|]+) \| `([^`|]+)`[^|]* \| (megatron-llm|megatron-core|megatron-bridge) \|$"


def spelled(pattern: str) -> list[str]:
    """`a{b,c}d` as a shell spells it out."""
    match = re.fullmatch(r"([^{]*)\{([^}]*)\}(.*)", pattern)
    return [f"{match[1]}{part}{match[3]}" for part in match[2].split(",")] if match else [pattern]


def test_table_of_families() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    rows = {
        name: (sizes.split(", "), spelled(pattern), target)
        for name, sizes, pattern, target in re.findall(ROW, text, re.MULTILINE)
    }
    expected = {
        name: (list(family.repositories), list(family.repositories.values()), family.target)
        for name, family in FAMILIES.items()
    }
    assert rows == expected
