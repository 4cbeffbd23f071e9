"""Calls that fail, for tests that patch them in."""

from __future__ import annotations

import os
from collections.abc import Callable


def failing(code: int, when: Callable[..., bool] = lambda *_: True, real: Callable[..., object] | None = None):
    """A call that fails with `code`, where its arguments are those of `when`; else it is the real one."""

    def call(*arguments: object, **keywords: object) -> object:
        if when(*arguments):
            name = arguments[0] if arguments and isinstance(arguments[0], str) else None
            raise OSError(code, os.strerror(code), name)
        assert real is not None
        return real(*arguments, **keywords)

    return call
