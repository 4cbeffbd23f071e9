"""What both command lines share. Options are spelled once; a command is a process whose every end is a sentence.

Nothing here imports torch, so that --help and a wrong argument are answered at once.
"""

from weights_conversion.cli.options import (
    add_common,
    add_fields,
    check_common,
    cores,
    iteration,
    positive,
    positive_float,
    run_options,
    stated_fields,
)
from weights_conversion.cli.process import run, script

__all__ = [
    "add_common", "add_fields", "check_common", "cores", "iteration", "positive", "positive_float", "run",
    "run_options", "script", "stated_fields",
]  # fmt: skip
