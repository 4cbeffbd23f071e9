"""What opcodes of a pickle make, and how many bytes of memory that takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# What objects take, in bytes, by the opcode that makes them (with the reference to them); of all others COST.
COST = 32
COSTS = {
    **{"MEMOIZE": 120, "BINPUT": 16, "LONG_BINPUT": 120, "PUT": 120, "MARK": 40},
    **{"EMPTY_SET": 224, "FROZENSET": 224, "EMPTY_DICT": 80, "DICT": 80, "EMPTY_LIST": 64, "LIST": 64},
    **{"REDUCE": 200, "NEWOBJ": 200, "NEWOBJ_EX": 200, "BINPERSID": 200},
    **{"PROTO": 0, "NONE": 8, "NEWTRUE": 8, "NEWFALSE": 8, "DUP": 8, "POP": 0, "BINGET": 8, "LONG_BINGET": 8, "GET": 8},
}
BYTES_AT_LEAST, BYTES_PER_BYTE = 32 << 20, 48
LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
