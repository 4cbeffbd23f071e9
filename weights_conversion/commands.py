"""The console commands that `pip install` makes. Each is the whole life of a process."""

from __future__ import annotations

from typing import NoReturn

from weights_conversion import cli


def hf_to_megatron() -> NoReturn:
    from hf_to_megatron import main

    cli.script(main)


def megatron_to_hf() -> NoReturn:
    from megatron_to_hf import main

    cli.script(main)


def verify() -> NoReturn:
    from weights_conversion.verify import main

    cli.script(main)


def demo() -> NoReturn:
    from weights_conversion.demo import main

    cli.script(main)


def listing() -> NoReturn:
    from weights_conversion.__main__ import main

    cli.script(main)
