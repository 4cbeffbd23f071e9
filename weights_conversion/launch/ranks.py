"""What a conversion asks of the processes that share it; here, where there is one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping


class Ranks:
    """The processes of this job. This class is the one process that runs without a launcher."""

    rank, size, hosts = 0, 1, 1

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._advance: Callable[[int], None] = lambda _: None

    def agree(self, view: Mapping[str, str]) -> None:
        """Raises ConversionError on rank 0, and ends all, unless every rank has the same `view` (digests by what)."""

    def tell(self, key: str, value: str = "") -> None:
        """From rank 0 to the others, who `hear` it."""

    def hear(self, key: str) -> str:
        raise NotImplementedError("there is no other rank")

    def gather(self, key: str) -> None:
        """Rank 0 waits here until all have come; the others do not wait."""

    def check(self) -> None:
        """Ends this rank's work if another rank has failed."""

    def shows(self, advance: Callable[[int], None]) -> None:
        """Rank 0's progress line, which is called with bytes that any rank has written."""
        self._advance = advance

    def count(self, nbytes: int) -> None:
        """This rank has written `nbytes` more."""
        self._advance(nbytes)

    def stuck(self) -> bool:
        """This rank was interrupted and does not come to its end. True where all are told, and it is then ended."""
        return False

    def settle(self) -> None:
        """From here on rank 0 needs no other rank: their ends are no failures any more."""
