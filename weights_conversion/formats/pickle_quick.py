"""The part of the pickle interpreter that most of a checkpoint's operations go through."""

from __future__ import annotations

import struct
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
    LONG_BINGET,
    LONG_BINPUT,
    MARK,
    MEMOIZE,
    SHORT_BINUNICODE,
)

_UINT4, _INT4 = struct.Struct("<I"), struct.Struct("<i")


class Quick:
    """What a run has made so far, and how many bytes of memory it may still make."""

    def __init__(self, where: str) -> None:
        self._where, self._left = where, 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._marks: list[int] = []
        self._plain: tuple[Callable[[Any], None] | None, ...] = ()  # by opcode, those without an argument

    def _spend(self, count: int) -> None:
        """Counts bytes of memory, or of copying, that objects take: far more of them than of the pickle are refused."""
        self._left -= count
        if self._left < 0:
            raise self._too_many()

    def _too_many(self) -> ConversionError:
        return ConversionError(f"{self._where} makes far more objects than a checkpoint of its size has")

    def _text(self, data: bytes, position: int, code: int) -> int:
        """Takes a string whose length stands at `position`; where it ends, or 0 where it is not whole."""
        long = code == BINUNICODE
        begin = position + (4 if long else 1)
        end = begin + (_UINT4.unpack_from(data, position)[0] if long else data[position])
        if end > len(data):
            return 0
        self._stack.append(data[begin:end].decode("utf-8", "surrogatepass"))
        return end

    def _quick(self, data: bytes, position: int, certain: int) -> int:
        """Runs what a state dict is made of, from `position` on; where an operation of another kind stands.

        Behind `certain` the bytes of an argument may not be there. A checkpoint of 512 ranks has thirty million.
        """
        stack, memo, marks, plain, costs = self._stack, self._memo, self._marks, self._plain, COST_OF_CODE
        left, number = self._left, _UINT4.unpack_from
        while position < certain:
            code = data[position]
            position += 1
            if code == MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif code == LONG_BINGET:
                stack.append(memo[number(data, position)[0]])
                position += 4
            elif code == LONG_BINPUT:
                memo[number(data, position)[0]] = stack[-1]
                position += 4
            elif code == BINPUT:
                memo[data[position]] = stack[-1]
                position += 1
            elif code == BINGET:
                stack.append(memo[data[position]])
                position += 1
            elif code == MARK:
                marks.append(len(stack))
            elif (run := plain[code]) is not None:
                self._left = left  # of which handlers take too
                run(None)
                left = self._left
            elif code == BININT1:
                stack.append(data[position])
                position += 1
            elif code == BININT2:
                stack.append(data[position] | data[position + 1] << 8)
                position += 2
            elif code == BININT:
                stack.append(_INT4.unpack_from(data, position)[0])
                position += 4
            elif code in (BINUNICODE, SHORT_BINUNICODE) and (end := self._text(data, position, code)):
                position = end
            else:
                break
            left -= costs[code]
            if left < 0:
                raise self._too_many()
        else:
            position += 1
        self._left = left
        return position - 1
