"""Takes a pickle apart into its opcodes; what they make, and how many bytes of memory that takes."""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Iterator
from typing import Any

# What objects take, in bytes, by the opcode that makes them (with the reference to them); of all others COST.
COST = 32
COSTS = {
    **{"MEMOIZE": 120, "BINPUT": 16, "LONG_BINPUT": 120, "PUT": 120, "MARK": 40},
    **{"EMPTY_SET": 224, "FROZENSET": 224, "EMPTY_DICT": 80, "DICT": 80, "EMPTY_LIST": 64, "LIST": 64},
    **{"REDUCE": 200, "NEWOBJ": 200, "NEWOBJ_EX": 200, "BINPERSID": 200},
    **{"PROTO": 0, "NONE": 8, "NEWTRUE": 8, "NEWFALSE": 8, "DUP": 8, "POP": 0, "BINGET": 8, "LONG_BINGET": 8, "GET": 8},
}
MARK, BINPUT, LONG_BINPUT, BINGET, LONG_BINGET, MEMOIZE = b"(qrhj\x94"
BININT, BININT1, BININT2, BINUNICODE, SHORT_BINUNICODE = b"JKMX\x8c"
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


def _byte(stream: io.BytesIO) -> int:
    data = stream.read(1)
    if not data:
        raise ValueError("not enough data in stream to read uint1")  # pickletools' words
    return data[0]


def _four_bytes(stream: io.BytesIO) -> int:
    data = stream.read(4)
    if len(data) != 4:
        raise ValueError("not enough data in stream to read uint4")
    return int.from_bytes(data, "little")


_QUICK = {"uint1": _byte, "uint4": _four_bytes}
_Reader = Callable[[Any], Any]
_OPERATIONS: dict[bytes, tuple[str, _Reader | None]] = {
    code.encode("latin-1"): (op.name, None if op.arg is None else _QUICK.get(op.arg.name, op.arg.reader))
    for code, op in pickletools.code2op.items()  # pyright: ignore[reportAttributeAccessIssue]
}


class Operations:
    """The operations of a pickle, one after the other, up to STOP, as pickletools.genops has them.

    Those that make up nearly all of a checkpoint `pickles` takes apart itself, and moves `position` past them.
    """

    def __init__(self, data: bytes) -> None:
        self._stream, self.position = io.BytesIO(data), 0

    def next(self) -> tuple[str, Any]:
        """(name, argument or None) of the one at `position`. Raises ValueError for what is no pickle."""
        stream = self._stream
        stream.seek(self.position)
        code = stream.read(1)
        if code not in _OPERATIONS:
            where = f"at position {self.position}, opcode {code!r} unknown"
            raise ValueError(where if code else "pickle exhausted before seeing STOP")
        name, reader = _OPERATIONS[code]
        argument = reader(stream) if reader is not None else None
        self.position = stream.tell()
        return name, argument


def operations(data: bytes) -> Iterator[tuple[str, Any]]:
    """All of them."""
    found, name = Operations(data), ""
    while name != "STOP":
        name, argument = found.next()
        yield name, argument


COST_OF_CODE = tuple(
    COSTS.get(_OPERATIONS[bytes([code])][0], COST) if bytes([code]) in _OPERATIONS else COST for code in range(256)
)
WITHOUT_ARGUMENT = {code[0]: name for code, (name, reader) in _OPERATIONS.items() if reader is None}
