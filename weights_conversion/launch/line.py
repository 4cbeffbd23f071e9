"""A rank's line to the job's store: one thread posts what is to be said, and listens for what is wanted."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from weights_conversion.errors import ConversionError
from weights_conversion.launch.endings import CONTINUES

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

logger = logging.getLogger(__name__)

FIRST_PAUSE = 0.02  # seconds between the first two looks for what is wanted; each pause is half as long again


class Store:
    """The job's TCPStore, under keys of this launch alone. Not for two threads at one time."""

    def __init__(self, store: TCPStore, launch: str) -> None:
        self._store, self._prefix = store, f"weights_conversion/{launch}/"

    def set(self, key: str, value: str) -> None:
        with _reached():
            self._store.set(self._prefix + key, value)

    def set_first(self, key: str, value: str) -> None:
        """The first value that any rank gives it stays."""
        with _reached():
            self._store.compare_set(self._prefix + key, "", value)

    def has(self, *keys: str) -> bool:
        with _reached():
            return self._store.check([self._prefix + key for key in keys])

    def get(self, *keys: str) -> list[str]:
        with _reached():
            return [value.decode() for value in self._store.multi_get([self._prefix + key for key in keys])]


@contextmanager
def _reached() -> Iterator[None]:
    """What torch says of a store that is gone, in a sentence: before all have met, nobody watches yet."""
    try:
        yield
    except RuntimeError as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConversionError(
            f"the connection to rank 0 is lost ({why}): it was killed or its node is down; {CONTINUES}"
        ) from error


class Line:
    """What the working thread says and hears. The line's own thread alone uses the store, from `open` on.

    Once in `seconds` the thread calls `beat(store)`, and `lost()` when the store is gone, which ends it.
    """

    def __init__(self, seconds: float, beat: Callable[[Store], None], lost: Callable[[], None]) -> None:
        self.contact = time.monotonic()  # when the store last answered
        self._seconds, self._beat, self._lost = seconds, beat, lost
        self._changed = threading.Condition()
        self._store: Store | None = None
        self._out: dict[str, str] = {}
        self._first: dict[str, str] = {}
        self._sending = False
        self._wanted: tuple[str, ...] = ()
        self._heard: list[str] | None = None
        self._closed = threading.Event()

    @property
    def is_open(self) -> bool:
        return self._store is not None

    @property
    def all_said(self) -> bool:
        return not (self._out or self._first or self._sending) or not self.is_open

    def open(self, store: Store) -> None:
        self.contact, self._store = time.monotonic(), store
        threading.Thread(target=self._talk, args=(store,), daemon=True, name="ranks").start()

    def close(self) -> None:
        self._closed.set()

    # --- for the thread that works

    def post(self, values: Mapping[str, str]) -> None:
        with self._changed:
            self._out.update(values)
            self._changed.notify_all()

    def post_first(self, key: str, value: str) -> None:
        """Like `post`, of a value that holds only where no rank has given it another."""
        with self._changed:
            self._first[key] = value
            self._changed.notify_all()

    def wake(self) -> None:
        """Makes `wait` look again."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, until: Callable[[], bool], seconds: float) -> bool:
        """Whether `until()` became true within `seconds`."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while not until():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, self._seconds))
        return True

    def ask(self, keys: Sequence[str], seconds: float, unless: Callable[[], bool] = lambda: False) -> list[str] | None:
        """The values of `keys` as soon as all are there; None after `seconds`, or where `unless()` became true."""
        if not keys:
            return []
        with self._changed:
            self._wanted, self._heard = tuple(keys), None
            self._changed.notify_all()
        self.wait(lambda: self._heard is not None or not self.is_open or unless(), seconds)
        with self._changed:
            heard, self._wanted, self._heard = self._heard, (), None
        return heard

    # --- the thread of the store

    def _talk(self, store: Store) -> None:
        due, pause, before = 0.0, self._seconds, ()
        while not self._closed.is_set():
            with self._changed:
                if not (self._out or self._first) and self._wanted == before:
                    self._changed.wait(min(pause, max(due - time.monotonic(), 0.0)))
                wanted = self._wanted
            slow = self._seconds / 2 if wanted else self._seconds
            pause = FIRST_PAUSE if wanted and wanted != before else min(pause * 1.5, slow)
            before = wanted
            try:
                self._send(store)
                if time.monotonic() >= due:
                    due = time.monotonic() + self._seconds
                    self._beat(store)
                heard = store.get(*wanted) if wanted and store.has(*wanted) else None
            except Exception as error:
                logger.debug("the store is gone: %s", error)
                with self._changed:
                    self._store = None
                self._lost()
                return
            with self._changed:
                self.contact, self._sending = time.monotonic(), False
                if heard is not None and self._wanted == wanted:
                    self._heard = heard
                self._changed.notify_all()

    def _send(self, store: Store) -> None:
        with self._changed:
            out, first, self._out, self._first, self._sending = self._out, self._first, {}, {}, True
        for key, value in first.items():
            store.set_first(key, value)
        for key, value in out.items():
            store.set(key, value)
