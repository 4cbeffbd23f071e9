"""Runs every point at which a system call can fail: `python -m tests.robustness`.

A point is one call of a conversion or a proof (its n-th read, say, of a file below the test's own folder) that fails
with one error, is cut short, comes late, or is the last before the process is killed. After each: OUT is not there, or
whole and right, or what was there before; foreign files and the source are untouched; one sentence names the file; the
exit code is 1 (2 of a proof); no traceback. Then the same command without a fault must give the same bytes.

Among the cases are some ("moving, ...") in which somebody else, at a fixed moment of the run, moves a file of the
source (writes, replaces, removes or truncates it) or puts a folder of another user's in the place of OUT or OUT.partial
(moves.py, moving.py). Such a run ends with exit 1, OUT as it was, what has moved left alone and named, whatever else
fails; and the same command then gives the bytes of the source that it finds, the moved one or the first, and never of
both. --case moving runs these alone; with --without watch or stamps they find the wrong ends of a broken converter.

Others ("continue, ...", starts.py) start from what a kill has left: behind the rename or the exchange, between the two
renames, or half written; or from the finished output of the same command. And some ("refused, ...", refused.py) have a
source that they would replace, and never do.

--power-cuts N looks at every state that ext4 and XFS may show after a power cut at any moment (powercut.py), and runs
the same command on N of them.

--ranks R does the same with R processes, as torchrun starts them: any of them fails, or is killed, at any call. These
points are drawn at random, half of them kills; with --kind or --action they are all points of that kind.

--sample N takes N points of each case, --case and --kind the points of one; without them it runs for hours,
and with --progress FILE it may be ended at any time and goes on when it is run again.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tests.robustness import faults

if TYPE_CHECKING:
    from tests.robustness.cases import Case, Ground


def parse(arguments: list[str] | None) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tests.robustness", description=__doc__, formatter_class=kind)
    parser.add_argument("--case", default="", help="only cases whose name begins so")
    parser.add_argument("--exactly", action="store_true", help="only the case of that very name")
    parser.add_argument("--kind", default="", help="only calls of this kind")
    parser.add_argument("--action", choices=faults.ACTIONS, help="only this, of what can happen to a call")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="only N points of each case, by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--power-cuts", type=int, default=0, metavar="N",
        help="power cuts instead: every state of the disk is looked at, and the command run again on N of each case",
    )  # fmt: skip
    parser.add_argument(
        "--without", choices=("sync", "sync-errors", "mark", "watch", "stamps"), default="",
        help="with a broken converter, which lacks this: wrong ends are found",
    )  # fmt: skip
    parser.add_argument("--without-sync", action="store_const", dest="without", const="sync", help="--without sync")
    parser.add_argument("--ranks", type=int, default=1, help="so many processes a run, of which one meets the fault")
    parser.add_argument("--folder", type=Path, help="where to convert: a folder of the filesystem to be tried")
    parser.add_argument("--list", action="store_true", help="say how many points each case has, and stop")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="so many processes try points")
    parser.add_argument("--progress", type=Path, help="a file of what was tried: an interrupted run goes on from it")
    parser.add_argument("--minutes", type=float, default=0, help="stop after them; --progress goes on")
    parser.add_argument("--summary", action="store_true", help="only print the counts of --progress")
    options = parser.parse_args(arguments)
    if options.power_cuts and (options.kind or options.action):
        parser.error("a power cut is at no call: --power-cuts takes neither --kind nor --action")
    return options


def work(options: argparse.Namespace, root: Path) -> int:
    from tests.robustness import every
    from tests.robustness.progress import Progress

    if options.power_cuts or options.ranks > 1:
        return _otherwise(options, root)
    root.mkdir(parents=True)
    path = options.progress or root / "progress"
    try:
        progress = Progress(path, options.summary)
        failed = 0
        if not options.summary:
            failed = every.run(root, every.Choice.of(options), progress, options.jobs)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    progress = Progress(path, options.summary)
    sys.stdout.write(f"{progress.table()}{progress.said()}\n")
    return 1 if failed or progress.findings else 0


def _otherwise(options: argparse.Namespace, root: Path) -> int:
    """Power cuts, and several ranks: case by case."""
    from tests.robustness import cuts, ranks
    from tests.robustness.cases import Ground
    from tests.robustness.warm import Warm

    ground = Ground(root, Warm(root), options.case, options.exactly)
    findings: list[str] = []
    ends: Counter[str] = Counter()
    for case in ground.cases:
        if case.move is not None or case.start is not None:  # whose moment is no call; of which a kill was the start
            continue
        case = replace(case, lacks=options.without)
        if options.power_cuts and case.out:
            found, problems = cuts.wrong(ground, case, options.power_cuts, options.seed)
            findings += problems
            ends += found
            sys.stderr.write("".join(f"{problem}\n" for problem in problems))
            sys.stdout.write(f"{case.name}: {_counted(found)}; {len(problems)} wrong ends\n")
            sys.stdout.flush()
        elif not options.power_cuts and case.name in ranks.CASES:
            findings += _ranks(ground, case, options, ends)
    sys.stdout.write(f"in all: {_counted(ends) if options.power_cuts else _said(ends)}; {len(findings)} wrong ends\n")
    return 1 if findings else 0


def _ranks(ground: Ground, case: Case, options: argparse.Namespace, ends: Counter[str]) -> list[str]:
    """The points of one case on several ranks; what is wrong with them."""
    from tests.robustness import every, ranks

    ground.reset(case)
    whole = ranks.run(ground, case, options.ranks)
    if any(ended.code for ended in whole):
        raise RuntimeError("".join(ended.text for ended in whole))
    findings, here = [], Counter[str]()
    counts, choice = [ended.counts for ended in whole], every.Choice.of(options)
    if options.kind or options.action:
        wanted = ranks.chosen(counts, choice)
    else:
        wanted = ranks.points(counts, options.sample or 1000, f"{options.seed} {case.name}")
    for rank, fault in wanted:
        how, problem = ranks.wrong(ground, case, options.ranks, rank, fault)
        here[how] += 1
        if problem:
            findings.append(problem)
            sys.stderr.write(f"{problem}\n")
    ends += here
    sys.stdout.write(f"{case.name}, {options.ranks} ranks: {_said(here)}; {len(findings)} wrong ends\n")
    sys.stdout.flush()
    return findings


def _said(ends: Counter[str]) -> str:
    return f"{sum(ends.values())} points, {_counted(ends)}"


def _counted(ends: Counter[str]) -> str:
    return ", ".join(f"{count} {how}" for how, count in ends.most_common())


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if reason := faults.lacking():
        sys.stderr.write(f"{reason}\n")
        return 3
    if not faults.is_loaded():
        library = faults.build(Path(tempfile.mkdtemp()))
        line = [sys.executable, "-m", "tests.robustness", *(sys.argv[1:] if arguments is None else arguments)]
        os.execve(sys.executable, line, faults.environment(library))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the folders' removal
    try:
        with tempfile.TemporaryDirectory(dir=options.folder, ignore_cleanup_errors=True) as folder:
            return work(options, Path(folder) / "ground")
    finally:
        faults.remove()


if __name__ == "__main__":
    sys.exit(main())
