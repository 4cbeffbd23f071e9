"""docs/reliability.md says what the code holds."""

from __future__ import annotations

import re
from pathlib import Path

from weights_conversion.files import fileio
from weights_conversion.output import durability

PAGE = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()


def test_limits_of_files() -> None:
    text = " ".join(PAGE.split())
    sizes = re.search(r"A config may have (\d+) MB, an index (\d+) MB, a tokenizer file (\d+) MB", text)
    assert sizes is not None
    limits = (fileio.MAX_CONFIG_BYTES, fileio.MAX_INDEX_BYTES, fileio.MAX_TOKENIZER_BYTES)
    assert tuple(int(size) * 10**6 for size in sizes.groups()) == limits


def test_commands_are_there() -> None:
    """Each command of the page is a module of the tests, with the options that it is given."""
    from tests.robustness.__main__ import parse

    lines = re.findall(r"`python -m (tests\.robustness[a-z_.]*)( [^`]*)?`", PAGE)
    assert len(lines) > 5
    for module, options in lines:
        path = Path(__file__).parents[2].joinpath(*module.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file()
        if path.is_dir():
            parse(options.split())


def test_what_a_kill_costs() -> None:
    assert (durability.FIRST_SECONDS, durability.SYNC_SECONDS) == (2.0, 20.0)
    assert "two seconds after it began and then every twenty" in PAGE.replace("\n", " ")
