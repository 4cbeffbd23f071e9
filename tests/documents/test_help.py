"""--help: as wide as the terminal, grouped, with examples and exit codes; argument errors point to it."""

from __future__ import annotations

import pytest
from conftest import run

SCRIPTS = ["hf_to_megatron", "megatron_to_hf", "weights_conversion.verify", "weights_conversion.demo"]


@pytest.mark.parametrize("columns", [40, 60, 80, 120, 300])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_the_terminal(script: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = run(script, "--help").succeeded().out
    if columns >= 80:
        assert max(map(len, text.splitlines())) <= min(columns, 120)
    else:
        description = text.split("\n\n", 1)[1].split("\n\noptions:")[0].split("\n\npositional")[0]
        assert max(map(len, description.splitlines())) <= columns


@pytest.mark.parametrize("script", SCRIPTS[:3])
def test_help_ends_with_examples_and_exit_codes(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run(script, "--help").succeeded().out
    assert text.splitlines()[0].endswith("[options]")
    examples, codes = text.split("\nexamples:\n")[1].split("\nexit codes:\n")
    assert f"python {script.split('.')[-1]}.py " in examples
    assert [line[2] for line in codes.splitlines() if line[2] != " "][:3] == ["0", "1", "2"]
