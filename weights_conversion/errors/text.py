"""How strings and values that somebody else has made are shown: on one line, short, and without what steers a terminal.

A name in a checkpoint may hold line breaks, escape sequences or marks that turn the text around. Every sentence that
is printed passes through `one_line`, every foreign value within one through `short`.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

MAX_SENTENCE = 4000
_USER_INFO = re.compile(r"(?<=://)[^/\s@]+@")
_TOKENS = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_SECRET_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_ADDRESSES = ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


def escaped(text: str) -> str:
    """The text with everything that is not printable spelled out, line breaks included."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str, limit: int = MAX_SENTENCE) -> str:
    """A sentence fit to be printed: escaped, without passwords, and what is beyond `limit` left out of its middle."""
    if len(text) > 2 * limit:  # before work is spent on all of it
        text = f"{text[:limit]} ... {text[-limit:]}"
    text = masked(escaped(text))
    if len(text) <= limit:
        return text
    return f"{text[: limit * 2 // 3]} ... {text[-(limit // 3) :]}"


def masked(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text without the passwords and tokens of addresses and of the environment."""
    for secret in _secrets(environment):
        text = text.replace(secret, "***")
    return _TOKENS.sub("hf_***", _USER_INFO.sub("***@", text))


def _secrets(environment: Mapping[str, str]) -> list[str]:
    found = [environment.get(name, "") for name in _SECRET_NAMES]
    for name in _ADDRESSES:
        info, at, _ = environment.get(name, "").rpartition("@")
        if at:
            user = info.partition("://")[2] or info
            password = user.partition(":")[2]
            found += [user, password, unquote(password)]
    return sorted({secret for secret in found if len(secret) >= 4}, key=len, reverse=True)


class _Short(reprlib.Repr):
    """reprlib's bounds, and no word of a foreign object but its type's."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200
        self.maxlevel, self.maxdict = 3, 12
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 8

    def repr_int(self, x: int, level: int) -> str:  # named after the type, as reprlib asks
        return repr(x) if x.bit_length() < 128 else f"<an integer of {x.bit_length()} bits>"

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x[:60]) + "..." * (len(x) > 60)

    def repr1(self, x: Any, level: int) -> str:
        own = type(x) in (int, float, bool, str, bytes, list, tuple, dict, set, frozenset, type(None))
        return super().repr1(x, level) if own else _named(x)


def _named(value: Any) -> str:
    module = type(value).__module__
    if module == "torch" and type(value).__name__ in ("dtype", "Size"):
        return str(value)[:80]
    if type(value).__name__ == "EnumMember":
        return f"{value.enum} {short(value.value)}"
    return f"<{type(value).__name__}>"


_SHORT = _Short()


def size(nbytes: float) -> str:
    """Bytes for people: three digits and a unit."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            count = nbytes / scale
            return f"{count:.{2 if count < 9.995 else 1 if count < 99.95 else 0}f} {unit}"
    return f"{nbytes:.0f} bytes"


def rate(nbytes_per_second: float) -> str:
    """In GB/s, which --rank-rate takes, where that shows any digits."""
    return f"{nbytes_per_second / 1e9:.2f} GB/s" if nbytes_per_second >= 1e7 else f"{size(nbytes_per_second)}/s"


def short(value: Any) -> str:
    """A foreign value's repr, in bounded time and length, however its parts are shared or nested."""
    return _SHORT.repr(value)
