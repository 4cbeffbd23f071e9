"""Where more ranks stop helping on a parallel filesystem: `python -m benchmarks.simulate`.

A conversion on 1 to 64 nodes is played through, call by call: every chunk is read, converted and written by a thread of
its rank, in stripes that lie on storage servers, each of which serves one request after the other. Threads wait for the
stripes of their chunk, for their node's link and for their own arithmetic. Names (open, create, mkdir, rename, fsync)
cost a latency, and queue at one metadata server.

What the rendezvous and the journal cost is not guessed: a TCPStore on this machine and the converter's own journal and
check of all parts are measured, with as many entries as the model has chunks. What is assumed of the machine stands in
Filesystem and Node. Prints Markdown.
"""

from __future__ import annotations

import argparse
import heapq
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

GB = 1e9
CHUNK = 32 << 20


@dataclass(frozen=True)
class Filesystem:
    """`servers` of `rate` bytes/s each, a request on which takes `latency` seconds more; metadata calls take
    `name_latency` for the caller, and `names` of them a second are served in all. A file lies on `stripes` servers (0:
    all), in pieces of `stripe` bytes. An fsync takes `sync_seconds`."""

    name: str
    servers: int
    rate: float
    stripes: int = 0
    stripe: int = 4 << 20
    latency: float = 0.0005
    name_latency: float = 0.001
    names: float = 20_000.0
    sync_seconds: float = 0.05


@dataclass(frozen=True)
class Node:
    """One rank. A thread gets at most `stream` bytes/s out of a single read or write."""

    link: float = 12.5 * GB
    stream: float = 1.5 * GB
    threads: int = 8  # of four workers
    arithmetic: float = 2.0 * GB  # bytes/s of output that one thread reorders and sums
    start_up: float = 2.4  # seconds, with torchrun
    imported: int = 4000  # files that Python and torch open


@dataclass(frozen=True)
class Model:
    """Bytes read and written, files of the source and of the output, and the size of a chunk."""

    name: str
    read: float
    written: float
    source_files: int
    files: int
    chunk: int = CHUNK


MODELS = (
    Model("70B, TP 8 x PP 4", 138 * GB, 138 * GB, 15, 32),
    Model("405B, TP 8 x PP 16", 812 * GB, 812 * GB, 191, 128),
    Model("DeepSeek-V3 (8-bit to bfloat16), 64 files", 689 * GB, 1342 * GB, 163, 64, 29 << 20),
)
FILESYSTEMS = (
    Filesystem("8 servers of 1 GB/s, files on all", 8, GB),
    Filesystem("8 servers of 1 GB/s, files on one each", 8, GB, stripes=1),
    Filesystem("48 servers of 4 GB/s, files on all", 48, 4 * GB),
)


class Storage:
    """When each server is free again, and where the stripes of a file lie."""

    def __init__(self, filesystem: Filesystem, seed: int = 0) -> None:
        self._of, self._free = filesystem, [0.0] * filesystem.servers
        self._random = random.Random(seed)
        self._first: dict[int, int] = {}

    def move(self, file: int, at: int, length: int, begin: float, end: float) -> float:
        """When `length` bytes from byte `at` of a file have moved, asked for at `begin` and no earlier than `end`."""
        servers = self._of.stripes or self._of.servers
        first = self._first.setdefault(file, self._random.randrange(self._of.servers))
        for number in range(at // self._of.stripe, -(-(at + length) // self._of.stripe)):
            server = (first + number % servers) % self._of.servers
            piece = min((number + 1) * self._of.stripe, at + length) - max(number * self._of.stripe, at)
            self._free[server] = max(self._free[server], begin) + self._of.latency + piece / self._of.rate
            end = max(end, self._free[server])
        return end


def convert(model: Model, filesystem: Filesystem, node: Node, ranks: int) -> float:
    """Seconds from the first read to the last write. Ranks take equal runs of the chunks, in the files' order."""
    storage, links = Storage(filesystem), [0.0] * ranks
    count = int(-(-model.written // model.chunk))
    ratio = model.read / model.written
    waiting = [(0.0, rank, thread) for rank in range(ranks) for thread in range(node.threads)]
    todo = [iter(range(count * rank // ranks, count * (rank + 1) // ranks)) for rank in range(ranks)]
    heapq.heapify(waiting)
    steps: dict[tuple[int, int], tuple[str, int]] = {}
    last = 0.0
    while waiting:
        now, rank, thread = heapq.heappop(waiting)
        what, number = steps.get((rank, thread), ("idle", 0))
        if what in ("idle", "written"):
            last = max(last, now)
            following = next(todo[rank], None)
            if following is None:
                continue
            steps[rank, thread] = ("read", following)
            number, length = following, int(model.chunk * ratio)
            files, offset = model.source_files, 0
        else:
            now += model.chunk / node.arithmetic
            steps[rank, thread] = ("written", number)
            length, files, offset = model.chunk, model.files, 1 << 20
        links[rank] = max(links[rank], now) + length / node.link
        per_file = -(-count // files)
        end = max(links[rank], now + length / node.stream)
        done = storage.move(offset + number // per_file, number % per_file * length, length, now, end)
        heapq.heappush(waiting, (done, rank, thread))
    return last


@dataclass(frozen=True)
class Around:
    """Seconds beside the work itself: importing, joining, opening, and what is synced and noted at the end."""

    importing: float
    joining: float
    opening: float
    ending: float

    @property
    def total(self) -> float:
        return self.importing + self.joining + self.opening + self.ending


def around(model: Model, filesystem: Filesystem, node: Node, ranks: int, call: float, noting: float) -> Around:
    """`call`: seconds of one call to the store, on whose node rank 0 is; `noting`: of one entry, from its line to its
    check at the end."""
    from weights_conversion.output.together import THREADS

    def names(each: int) -> float:  # of every rank, at one time
        return max(each * filesystem.name_latency, ranks * each / filesystem.names)

    entries = model.written / model.chunk
    waits = 4 + -(-2 * model.files // THREADS)  # rounds of fsyncs: see tests/output/test_durability.py
    return Around(
        node.start_up + names(node.imported) * (ranks > 1),
        12 * ranks * call,  # what rank 0 serves each rank until all have begun: joining, digests, layout
        names(2 * model.source_files + 2 * model.files) + model.files * 4 * filesystem.name_latency,
        entries * noting + waits * filesystem.sync_seconds + names(4),
    )


def store_call(calls: int = 2000) -> float:
    """Seconds of one set and get at a TCPStore on this machine, halved."""
    from datetime import timedelta

    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30))
    began = time.perf_counter()
    for number in range(calls):
        store.set(f"key/{number % 64}", "value")
        store.get(f"key/{number % 64}")
    return (time.perf_counter() - began) / calls / 2


def noting_cost(entries: int = 20_000) -> float:
    """Seconds of one chunk in the journal: added, written, read by rank 0 and checked."""
    import torch

    from weights_conversion.layouts.placement import TensorRef, Written
    from weights_conversion.output.finishing import combine_crcs
    from weights_conversion.output.journal import Journal

    refs = tuple(TensorRef("file.pt", f"tensor.{number}", torch.uint8, (CHUNK,)) for number in range(entries))

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        journal = Journal(Path(folder), refs)
        for number, ref in enumerate(refs):
            journal.add(number, [Written(ref, 0, CHUNK, 1)])
        journal.note(journal.take())
        done = journal.load()
        combine_crcs([cast(Any, SimpleNamespace(refs=refs))], [write for writes in done.values() for write in writes])
        return (time.perf_counter() - began) / entries


def stops_helping(seconds: dict[int, float]) -> int:
    """The smallest number of ranks whose time no larger number betters by a tenth."""
    return next(ranks for ranks in sorted(seconds) if min(seconds.values()) > 0.9 * seconds[ranks])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    args = parser.parse_args(argv)
    call, noting, node = store_call(), noting_cost(), Node()
    print(f"a call to the store {call * 1e6:.0f} us, an entry of the journal {noting * 1e6:.0f} us\n")
    heads = " | ".join(f"{ranks} ranks" if ranks > 1 else "1 rank" for ranks in args.ranks)
    print(f"| filesystem | model | {heads} | no tenth better than | at {args.ranks[-1]}: importing, joining, "
          "opening, ending |")  # fmt: skip
    print("|" + "---|" * (len(args.ranks) + 4))
    for filesystem in FILESYSTEMS:
        for model in MODELS:
            whole, beside = {}, None
            for ranks in args.ranks:
                beside = around(model, filesystem, node, ranks, call, noting)
                whole[ranks] = convert(model, filesystem, node, ranks) + beside.total
            shown = " | ".join(f"{seconds:.0f} s" for seconds in whole.values())
            parts = (beside.importing, beside.joining, beside.opening, beside.ending) if beside else ()
            print(f"| {filesystem.name} | {model.name} | {shown} | {stops_helping(whole)} ranks "
                  f"| {', '.join(f'{part:.1f}' for part in parts)} s |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
