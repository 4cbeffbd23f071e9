"""Several calls that wait for a disk, at one time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

THREADS = 32  # a thread that waits for an fsync costs nothing


def together(tasks: Sequence[Callable[[], object]], threads: int = THREADS) -> None:
    """Calls all of `tasks`, on up to so many threads, of which this one is the first.

    After an error none is begun; what is raised, when no task is running any more, is the first task's that failed.
    """
    errors: dict[int, BaseException] = {}
    numbered, lock = enumerate(tasks), threading.Lock()

    def work() -> None:
        while not errors:
            with lock:
                number, task = next(numbered, (0, None))
            if task is None:
                return
            try:
                task()
            except BaseException as error:
                errors[number] = error

    helpers: list[threading.Thread] = []
    try:
        for number in range(min(threads, len(tasks)) - 1):
            helper = threading.Thread(target=work, daemon=True, name=f"together-{number}")
            helper.start()
            helpers.append(helper)
    except RuntimeError:
        pass  # the system gives no more threads: those that there are do it
    try:
        work()
    except BaseException as interruption:
        errors[-1] = interruption
    finally:
        join(helpers)
    if errors:
        raise errors[min(errors)]


def join(threads: Sequence[threading.Thread]) -> None:
    """Waits for threads that use what the caller closes next: a signal, which comes once, does not end the wait."""
    try:
        for thread in threads:
            thread.join()
    finally:
        for thread in threads:
            thread.join()
