"""The parser of every command line: abbreviations, suggestions, empty values, and errors of one sentence."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from weights_conversion import __version__
from weights_conversion.cli import helptext, siblings

# What people type, from other programs.
_NICKNAMES = {
    "tp": "tensor-model-parallel-size", "tensor-parallel-size": "tensor-model-parallel-size",
    "pp": "pipeline-model-parallel-size", "pipeline-parallel-size": "pipeline-model-parallel-size",
    "vpp": "num-layers-per-virtual-pipeline-stage", "output": "out", "output-dir": "out", "input": "input-dir",
    "force": "overwrite", "threads": "workers", "precision": "dtype", "iteration": "load-iters", "save": "out",
    "load": "input-dir", "cache": "cache-dir",
}  # fmt: skip
_MAY_BE_EMPTY = {"vocab_extra_ids_list", "override_special_tokens"}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}


def dtype(text: str) -> str:
    """A name of --dtype; the short ones stand for torch's."""
    return _DTYPES.get(text.lower(), text)


def path(text: str) -> Path:
    """A path, with the ~ that a shell leaves alone behind `--out=`."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~nobody
        raise argparse.ArgumentTypeError(f"{text} names a home folder that is not known") from error


class Parser(argparse.ArgumentParser):
    """Takes unambiguous abbreviations, dashes and underscores alike: both are put into the documented spelling first.

    Ends with exit code 2 and one sentence.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=helptext.Formatter, **settings)
        self.add_argument("--version", action="version", version=f"{self.prog} {__version__}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        given = list(sys.argv[1:] if args is None else args)
        return super().parse_args(self._spelled(given), namespace)

    def _spelled(self, given: list[str]) -> list[str]:
        """The arguments with every option in full. Ends where one is unknown, ambiguous, or has an empty value."""
        spelled, before = [], None
        for number, token in enumerate(given):
            if token == "--":
                return [*spelled, *given[number:]]
            if token.startswith("--"):
                name, equals, value = token.partition("=")
                before = self._action(name)
                shown = _shown(before)
                if equals and not value and before.dest not in _MAY_BE_EMPTY:
                    self.error(f"{shown} is empty; is a variable of the script not set?")
                token = f"{shown}{equals}{value}"
            else:
                if not token and (before is None or before.dest not in _MAY_BE_EMPTY):
                    what = _shown(before) if before is not None and before.nargs != 0 else f"argument {number + 1}"
                    self.error(f"{what} is empty; is a variable of the script not set?")
                before = None if before is None or before.nargs != "*" else before
            spelled.append(token)
        return spelled

    def _action(self, name: str) -> argparse.Action:
        """The option that `name` is, or begins."""
        known = {option.replace("_", "-"): action for option, action in self._option_string_actions.items()}
        plain = name.replace("_", "-")
        if plain in known:
            return known[plain]
        found = {id(action): action for option, action in known.items() if option.startswith(plain)}
        if len(found) == 1:
            return next(iter(found.values()))
        if found and len(plain) > 2:
            self.error(f"{name} could be {' or '.join(_shown(action) for action in found.values())}")
        elsewhere = siblings.having(plain[2:])
        self.error(f"there is no option {name}{f' here: {elsewhere}' if elsewhere else self._suggestion(plain[2:])}")

    def _suggestion(self, name: str) -> str:
        by_name = {option.replace("_", "-")[2:]: action for option, action in self._option_string_actions.items()}
        names = [_NICKNAMES[name]] if _NICKNAMES.get(name) in by_name else difflib.get_close_matches(name, by_name, 2)
        shown = list(dict.fromkeys(_shown(by_name[near]) for near in names))
        return f"; did you mean {' or '.join(shown)}?" if shown else ""


def _shown(action: argparse.Action) -> str:
    """An option's documented spelling."""
    return action.option_strings[-1]
