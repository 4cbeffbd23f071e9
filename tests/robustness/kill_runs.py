"""Kills conversions with SIGKILL at random moments, and looks at what is left: `python -m tests.robustness.kill_runs`.

After every kill: OUT is not there, or is complete, or is still the old one (--overwrite). Then the same command is run
to its end, with further kills now and then on the way, and every file must equal that of an undisturbed run. Python and
torch are loaded already when a run is forked, so that the kills meet the conversion and not the start-up.

Half of the kills come from outside at a random time. The others fall between two operations on files (by Python's audit
events: open, mkdir, rename, remove ...), which meets the short moments in which an output is put in place.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from tests.robustness import sources
from tests.robustness.sources import Command, clear, tree, write_older

SYNC_SECONDS = 0.01  # instead of tens of seconds, so that a short run notes its progress many times


FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir", "os.listdir")


def _is_of_the_output(name: object) -> bool:
    """By its path, or by standing in a folder that is held open, as no module that is imported does."""
    return "out" in str(name) or not str(name).startswith("/")


def count_events(last: int, log: Path) -> None:
    """Kills this process at its file event number `last`; writes the number of events to `log` as they come."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in FILE_EVENTS and arguments and _is_of_the_output(arguments[0]):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)
            if not last:
                os.pwrite(descriptor, f"{seen:9}".encode(), 0)

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    sys.addaudithook(hook)


def start(line: list[str], log: Path, last: int | None = None, exchange: bool = True) -> int:
    """Forks a process that runs a script, and dies at file event `last`; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        import importlib

        from weights_conversion import cli
        from weights_conversion.output import durability, publish

        os.setpgid(0, 0)
        durability.FIRST_SECONDS = durability.SYNC_SECONDS = SYNC_SECONDS
        if not exchange:  # as on filesystems that cannot
            publish.exchange = lambda *_: False
        if last is not None:
            count_events(last, log.with_name("events"))
        with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
            main = importlib.import_module(Path(line[0]).stem).main
            cli.script(lambda: main(line[1:]))
    finally:
        os._exit(70)


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Killer:
    """Runs of one seed; `counts` tells where the kills fell."""

    def __init__(self, root: Path, seed: int, model: sources.tm.Tiny) -> None:
        self.root, self.random = root, random.Random(seed)
        self.counts: Counter[str] = Counter()
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            self.commands = sources.commands(root, model)
        self.expected: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        self.events: dict[str, int] = {}
        for command in self.commands:
            out, began = root / "undisturbed", time.monotonic()
            self._end(command, out)
            self.seconds[command.name] = time.monotonic() - began
            self.expected[command.name] = tree(out)
            clear(out)
            finish(start(command.line(root / "out"), root / "log", 0))
            self.events[command.name] = int((root / "events").read_text())

    def _end(self, command: Command, out: Path, *further: str) -> str:
        log = self.root / "log"
        code = finish(start(command.line(out, *further), log))
        text = log.read_text()
        if code:
            raise AssertionError(f"{command.name}: exit {code}\n{text}")
        return text

    def run(self) -> int:
        """One output, until it is complete; returns the number of kills."""
        command = self.random.choice(self.commands)
        out, kills = self.root / "out", 0
        clear(out, out.with_name("out.partial"))
        overwrite = self.random.random() < 0.4
        options = ["--overwrite"] if overwrite else []
        old = None
        if overwrite:
            write_older(out)
            old = tree(out)
        while True:
            between, exchange = self.random.random() < 0.5, self.random.random() < 0.5
            if between:
                events = self.events[command.name] + (8 if overwrite else 0)
                first = self.random.choice([1, max(events - 30, 1)])  # files are put in place at the end
                last = self.random.randint(first, events)
                child = start(command.line(out, *options), self.root / "log", last, exchange)
            else:
                child = start(command.line(out, *options), self.root / "log", exchange=exchange)
                time.sleep(self.random.uniform(0, 1.1) * self.seconds[command.name])
                os.kill(child, signal.SIGKILL)
            code = finish(child)
            partial = out.with_name("out.partial")
            if code == 0:
                self._check(command, out, partial, "done before the kill")
                return kills
            if code != -signal.SIGKILL:
                raise AssertionError(f"{command.name}: exit {code}\n{(self.root / 'log').read_text()}")
            kills += 1
            there = tree(out) if out.exists() else None
            if there == self.expected[command.name]:
                self.counts["after OUT appeared"] += 1
            elif there not in (None, old):
                raise AssertionError(f"{command.name}: OUT is there and incomplete: {sorted(there or ())}")
            elif old is not None and there is None:
                if exchange or tree(partial / "replaced") != old:
                    raise AssertionError(f"{command.name}: the old OUT is gone before the new one is there")
                self.counts["between two renames"] += 1
            else:
                written = sum(1 for path in (partial / "journal").glob("chunks.*"))
                self.counts["with parts noted" if written else "before any part was noted"] += 1
            if self.random.random() < 0.7:  # else killed once more
                if there == self.expected[command.name] and not partial.exists():
                    return kills  # nothing was left to do but to exit
                if there == self.expected[command.name] and not overwrite:
                    # Complete, and its leftovers too far gone to tell by which command: it may be refused as existing.
                    finish(start(command.line(out), self.root / "log"))
                    clear(partial)
                    self._check(command, out, partial, "rerun of a complete output")
                    return kills
                text = self._end(command, out, *options)
                if "continued an interrupted run" in text:
                    self.counts["reruns that continued"] += 1
                self._check(command, out, partial, text)
                return kills
            if there == self.expected[command.name]:
                return kills

    def _check(self, command: Command, out: Path, partial: Path, text: str) -> None:
        if tree(out) != self.expected[command.name]:
            different = {name for name, sha in tree(out).items() if self.expected[command.name].get(name) != sha}
            raise AssertionError(f"{command.name}: other bytes in {sorted(different)}\n{text}")
        if partial.exists():
            raise AssertionError(f"{command.name}: {partial} is left over")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="kills (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a model of 5 MB instead of 270 MB")
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    options = parser.parse_args(arguments)
    import torch._subclasses.fake_tensor  # noqa: F401 before the forks

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        killer = Killer(Path(folder), options.seed, sources.SMALL if options.small else sources.MEDIUM)
        kills = outputs = 0
        began = time.monotonic()
        while kills < options.runs:
            kills += killer.run()
            outputs += 1
            sys.stderr.write(f"\r{kills} kills, {outputs} outputs, {time.monotonic() - began:.0f} s  ")
    places = ", ".join(f"{count} {place}" for place, count in killer.counts.most_common())
    sys.stdout.write(f"\n{kills} kills ({places}); {outputs} outputs, all complete and equal to undisturbed runs\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
