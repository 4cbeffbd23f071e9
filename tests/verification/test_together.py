"""Both proofs side by side: what one reads the other reads soon after, each byte once, and neither waits in vain."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from weights_conversion.engine.streams import Source
from weights_conversion.errors import ConversionError
from weights_conversion.verification import exact, numeric, together
from weights_conversion.verification.differences import is_finite
from weights_conversion.verification.exact import Pair
from weights_conversion.verification.pace import LAYERS_AHEAD, Pace
from weights_conversion.verification.sides import open_model
from weights_conversion.verify import verify

NAME = "llama2-gqa"
Two = Callable[[], Pair]


@pytest.fixture
def two(sources: Any, imported: Any) -> Pair:
    return exact.pair(open_model(sources(NAME), "llama2"), open_model(imported(NAME), "llama2"))


def test_the_comparison_is_a_layer_ahead(two: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers, in any order of threads: compared before they are run, and not long before."""
    events: list[tuple[str, int]] = []
    compared, runs = exact._compare_chunk, Pace.runs
    pace = Pace(two.config.num_layers, two.parameters)

    def noted(pair: Pair, instance: Any, *rest: Any) -> Any:
        events.append(("compares", pace.station(instance)))
        return compared(pair, instance, *rest)

    def told(self: Pace, layer: int) -> None:
        events.append(("may go", layer))
        runs(self, layer)
        events.append(("runs", layer))

    monkeypatch.setattr(exact, "_compare_chunk", noted)
    monkeypatch.setattr(Pace, "runs", told)
    found, ran = together.compare(two, 2)
    assert found.same
    assert ran.same
    layers = two.config.num_layers
    assert [number for what, number in events if what == "runs"] == [*range(layers), layers, layers]
    gone, running = 0, -2
    for what, number in events:
        gone = number if what == "may go" else gone
        running = number if what == "runs" else running
        if what == "compares":
            assert running + 1 < number <= gone + 1 + LAYERS_AHEAD


def test_every_byte_is_compared_once(two: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by the reader: of both sides, each byte that is no padding, once."""
    read: Counter[tuple[str, int]] = Counter()
    lock, plain = threading.Lock(), Source.read

    def counted(self: Source, ref: Any, start: int, into: torch.Tensor) -> None:
        with lock:
            begin = ref.offset + start
            read.update((ref.file, byte) for byte in range(begin, begin + into.numel() * into.element_size()))
        plain(self, ref, start, into)

    monkeypatch.setattr(Source, "read", counted)
    assert exact.compare(two, 2).same
    assert set(read.values()) == {1}
    total = sum(row * one.row_bytes for instance in two.parameters for one in two.source.tensors(instance)
                for row in (one.rows,))  # fmt: skip
    assert len(read) == 2 * total


@pytest.mark.parametrize("failing", ["compared", "run", "both"])
def test_the_comparisons_error_comes_first(two: Pair, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """Whichever proof fails, the other ends too; of two errors always the same one is raised."""
    compared, error_of = exact._compare_chunk, numeric.error_of
    done = []

    def broken(pair: Pair, instance: Any, *rest: Any) -> Any:
        if failing != "run" and instance.layer == 1:
            raise ConversionError("of the comparison")
        done.append(instance)
        return compared(pair, instance, *rest)

    def failed(*sides: torch.Tensor) -> float:
        if failing != "compared":
            raise ConversionError("of the forward pass")
        return error_of(*sides)

    monkeypatch.setattr(exact, "_compare_chunk", broken)
    monkeypatch.setattr(numeric, "error_of", failed)
    threads = torch.get_num_threads()
    expected = "of the forward pass" if failing == "run" else "of the comparison"
    with pytest.raises(ConversionError, match=expected):
        together.compare(two, 2)
    assert torch.get_num_threads() == threads
    assert failing != "run" or len(done) >= len(two.parameters)  # which is then known to have none


def test_an_interrupt_stops_both(two: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    compared = exact._compare_chunk

    def noted(pair: Pair, instance: Any, *rest: Any) -> Any:
        begun.append(instance.layer)
        return compared(pair, instance, *rest)

    def interrupted(*_: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(exact, "_compare_chunk", noted)
    monkeypatch.setattr(numeric, "error_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        together.compare(two, 2)
    assert two.config.num_layers - 1 not in begun


def test_an_interrupt_before_the_pass_begins_stops_the_comparison(
    two: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Which waits for the pass, and would wait for ever."""
    begun, failsafe = [], []
    compared = exact._compare_chunk

    def noted(pair: Pair, instance: Any, *rest: Any) -> Any:
        begun.append(instance.layer)
        return compared(pair, instance, *rest)

    def interrupted(pair: Pair, workers: int, pace: Pace, *_: Any) -> Any:
        failsafe.append(threading.Timer(20, pace.free))
        failsafe[0].start()
        raise KeyboardInterrupt

    monkeypatch.setattr(exact, "_compare_chunk", noted)
    monkeypatch.setattr(together, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        together.compare(two, 2)
    failsafe[0].cancel()
    assert two.config.num_layers - 1 not in begun


def test_alone_it_reads_past_the_cache(two: Pair, sources: Any, imported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads it again; beside a forward pass somebody does."""
    made: list[bool] = []

    class Noted(Source):
        def __init__(self, root: Path | None = None, direct: Any = None) -> None:
            made.append(direct is not None)
            super().__init__(root, direct)

    monkeypatch.setattr(exact, "Source", Noted)
    assert verify(sources(NAME), imported(NAME), exact_only=True).same
    assert verify(sources(NAME), imported(NAME)).same
    assert made == [True, False]


@pytest.mark.parametrize(("values", "finite"), [
    ([3e38, 3e38, -1.0], True), ([3e38, float("nan"), 1.0], False), ([float("inf"), -float("inf"), 1.0], False),
    ([-3e38, -3e38, 0.0], True), ([1.0, -float("inf"), 0.0], False), ([], True),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_sum_that_overflows_is_no_infinity(values: list[float], finite: bool, dtype: torch.dtype) -> None:
    assert is_finite(torch.tensor(values, dtype=dtype)) == finite
