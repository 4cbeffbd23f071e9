"""Both proofs in one go, so that a disk is read once: the comparison reads ahead, the forward pass finds it cached.

Each keeps its own readers and rules. What they share is the page cache, and therefore the order of the layers: the
comparison, which reads every byte of both sides in large pieces, is at most a layer ahead of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context

import torch

from weights_conversion.verification import exact, numeric
from weights_conversion.verification.differences import Exact
from weights_conversion.verification.exact import Pair
from weights_conversion.verification.numeric import Numeric
from weights_conversion.verification.pace import Pace


def compare(pair: Pair, workers: int) -> tuple[Exact, Numeric]:
    """What exact.compare and numeric.compare find. An error of the comparison is raised before one of the pass."""
    pace = Pace(pair.config.num_layers, pair.parameters)
    with one_thread_each(), ThreadPoolExecutor(1, thread_name_prefix="proof") as pool:
        try:
            compared = pool.submit(copy_context().run, exact.compare, pair, workers, pace)
            compared.add_done_callback(lambda done: pace.free() if done.exception() is None else pace.stop())
            ran = _run(pair, workers, pace, compared)
            return compared.result(), ran
        except BaseException:  # an interrupt may come at any moment: who still compares is not waited for
            pace.stop()
            raise


def _run(pair: Pair, workers: int, pace: Pace, compared: Future[Exact]) -> Numeric:
    try:
        ran = numeric.compare(pair.source, pair.checkpoint, pair.config.vocab_size, workers, pace.runs)
    except Exception:
        pace.free()
        compared.result()  # raises its own error, should it have one
        raise
    pace.free()
    return ran


@contextmanager
def one_thread_each() -> Iterator[None]:
    """The proofs' threads are the parallelism; torch's own would fight them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
