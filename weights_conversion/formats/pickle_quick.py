"""The part of the pickle interpreter that most of a checkpoint's operations go through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weights_conversion.errors import ConversionError
from weights_conversion.formats.pickle_opcodes import (
    BINGET,
    BININT,
    BININT1,
    BININT2,
    BINPUT,
    BINUNICODE,
    COST_OF_CODE,
    LONG_BINPUT,
)


class Quick:
    """What a run has made so far, and how many bytes of memory it may still make."""

    def __init__(self, where: str) -> None:
        self._where, self._left = where, 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._plain: tuple[Callable[[Any], None] | None, ...] = ()  # by opcode, those without an argument

    def _spend(self, count: int) -> None:
        """Counts bytes of memory, or of copying, that objects take: far more of them than of the pickle are refused."""
        self._left -= count
        if self._left < 0:
            raise ConversionError(f"{self._where} makes far more objects than a checkpoint of its size has")

    def _quick(self, data: bytes, position: int, certain: int) -> int:
        """Runs what a state dict is made of, from `position` on; where an operation of another kind stands.

        Behind `certain` the bytes of an argument may not be there. A checkpoint of 512 ranks has thirty million.
        """
        stack, memo, plain, costs, number = self._stack, self._memo, self._plain, COST_OF_CODE, int.from_bytes
        while position < certain:
            code = data[position]
            at = position + 1
            if code == LONG_BINPUT:
                memo[number(data[at : at + 4], "little")] = stack[-1]
                position += 5
            elif code == BINPUT:
                memo[data[at]] = stack[-1]
                position += 2
            elif code == BINGET:
                stack.append(memo[data[at]])
                position += 2
            elif code == BININT1:
                stack.append(data[at])
                position += 2
            elif code == BININT2:
                stack.append(data[at] | data[at + 1] << 8)
                position += 3
            elif code == BININT:
                stack.append(number(data[at : at + 4], "little", signed=True))
                position += 5
            elif code == BINUNICODE:
                begin = at + 4
                position = begin + number(data[at:begin], "little")
                if position > len(data):
                    return at - 1
                stack.append(data[begin:position].decode("utf-8", "surrogatepass"))
            elif (run := plain[code]) is not None:
                run(None)
                position += 1
            else:
                return position
            self._left -= costs[code]
            if self._left < 0:
                self._spend(0)
        return position
