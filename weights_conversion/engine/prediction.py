"""How long a conversion takes on a number of ranks."""

from __future__ import annotations

import time

from weights_conversion.engine.job import RunOptions


def predictions(needed: int, options: RunOptions) -> list[str]:
    """What a dry run says of the time that `needed` bytes of output take on some numbers of ranks."""
    if options.ranks is None and options.filesystem_bandwidth is None:
        return []
    alone = time.monotonic() - options.began
    rate, bandwidth = options.rank_rate, options.filesystem_bandwidth
    counts = sorted({1, options.ranks or 1, *((2, 4, 8, 16, 32, 64) if options.ranks is None else ())})
    limit = f", the filesystem takes {bandwidth:g} GB/s" if bandwidth else ""
    seconds = [
        predicted_seconds(needed, n, rate * 1e9, bandwidth and bandwidth * 1e9, start_up_seconds(alone, n))
        for n in counts
    ]
    said = ", ".join(f"{time:.0f} s on {n} rank{'s' * (n > 1)}" for n, time in zip(counts, seconds, strict=True))
    lines = [
        f"predicted  {said} (a rank converts {rate:g} GB/s{limit})",
        f"predicted  of these, start-up is {alone:.1f} s, as this dry run took, and three times that under torchrun",
    ]
    if bandwidth:
        lines.append(f"predicted  more than {max(1, round(bandwidth / rate + 0.49))} ranks do not help")
    return lines


def start_up_seconds(alone: float, ranks: int) -> float:
    """From the start of a command to its first byte, given what one process `alone` took.

    torchrun imports torch before it starts its ranks, which then do so at one time and join: with a core for each rank
    2.4 s were measured where one process took 0.8 s. With fewer cores it is more, under srun less.
    """
    return alone if ranks == 1 else 3 * alone


def predicted_seconds(
    nbytes: int, ranks: int, rank_rate: float, bandwidth: float | None = None, start_up: float = 0.0
) -> float:
    """Time of a conversion that writes `nbytes`. Rates in bytes/s of output: one rank's, and the filesystem's."""
    rate = ranks * rank_rate
    return start_up + nbytes / (min(rate, bandwidth) if bandwidth else rate)
