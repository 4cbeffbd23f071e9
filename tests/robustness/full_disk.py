"""Converts onto filesystems that are too small: `python -m tests.robustness.full_disk --points 20`.

Each point is a tmpfs (where mounting is not allowed: a limit on file sizes) that ends at another byte of the output:
found before anything is written, while files are laid out, while tensors are written, or by the small files at the end.
The run must end with exit 1 and a sentence, without OUT, or with the old one whole (--overwrite). With space again, the
same command must end as an undisturbed run does.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from tests.robustness import sources
from tests.robustness.sources import Command, clear, tree, write_older

# Where the lack of space shows. In the last two, the run is made to believe at first that there is enough.
STAGES = ("seen before", "while laid out", "while written")


def run(line: list[str], log: Path, stage: str = "", limit: int | None = None) -> tuple[int, str]:
    """One run in a forked child; `limit` bounds every file's size."""
    child = os.fork()
    if not child:
        code = 70
        try:
            from weights_conversion.output import space

            if stage in STAGES[1:]:
                space.check_space = lambda out, needed: None
            if stage == "while written":  # as on filesystems that cannot reserve
                space.reserve = lambda path: None
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
                try:
                    code = importlib.import_module(Path(line[0]).stem).main(line[1:])
                except BaseException:
                    import traceback

                    traceback.print_exc(file=file)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), log.read_text()


class Disk:
    """A filesystem of a given size at `folder`, or the pretence of one."""

    def __init__(self, folder: Path, mounts: bool) -> None:
        self.folder, self.mounts = folder, mounts
        folder.mkdir()

    def size(self, nbytes: int) -> None:
        if self.mounts:
            again = "remount," if self.folder.is_mount() else ""
            line = ["mount", "-t", "tmpfs", "-o", f"{again}size={nbytes}", "tmpfs", str(self.folder)]
            subprocess.run(line, check=True, capture_output=True)

    def close(self) -> None:
        if self.mounts and self.folder.is_mount():
            subprocess.run(["umount", str(self.folder)], check=True)


def can_mount(folder: Path) -> bool:
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    except OSError:
        return False
    return done.returncode == 0 and subprocess.run(["umount", str(folder)]).returncode == 0


def point(command: Command, expected: dict[str, str], total: int, part: float, stage: str, overwrite: bool, disk: Disk,
          log: Path) -> str:  # fmt: skip
    """Runs into a disk that holds `part` of what is needed, then again with space. Returns what was said."""
    out = disk.folder / "out"
    spare = 64 << 10 if overwrite else 0  # the old output
    disk.size(max(int(total * part), 4096) // 4096 * 4096 + spare)
    old = None
    if overwrite:
        write_older(out)
        old = tree(out)
    options = ["--overwrite"] if overwrite else []
    limit = None if disk.mounts else max(int(total * part), 1000)
    code, said = run(command.line(out, *options), log, stage, limit)
    where = f"{command.name}, {stage}, {part:.3f}"
    if code != 1 or "Traceback" in said or not ("space" in said or "free" in said or "large" in said):
        raise AssertionError(f"{where}: exit {code}\n{said}")
    if (tree(out) if out.exists() else None) != old:
        raise AssertionError(f"{where}: OUT is not as it was")
    if stage == "seen before" and out.with_name("out.partial").exists():
        raise AssertionError(f"{where}: something was written")
    disk.size(4 * total + spare + (8 << 20))
    code, again = run(command.line(out, *options), log)
    if code or tree(out) != expected:
        raise AssertionError(f"{where}: the rerun ended with exit {code} and other bytes\n{again}")
    if out.with_name("out.partial").exists():
        raise AssertionError(f"{where}: OUT.partial is left over")
    return said + again


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--no-mount", action="store_true", help="limit file sizes, even where mounting is possible")
    options = parser.parse_args(arguments)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "try").mkdir()
        mounts = not options.no_mount and can_mount(root / "try")
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            commands = sources.commands(root, sources.SMALL)
        wanted: dict[str, tuple[dict[str, str], int]] = {}
        for command in commands:
            run(command.line(root / "undisturbed"), root / "log")
            space = sum(path.stat().st_size for path in (root / "undisturbed").rglob("*") if path.is_file())
            wanted[command.name] = tree(root / "undisturbed"), space
            clear(root / "undisturbed")
        for number in range(options.points):
            command = commands[number % len(commands)]
            stage = STAGES[number % 3] if mounts else STAGES[1 + number % 2]
            expected, space = wanted[command.name]
            share = (number + 0.5) / options.points if stage != "seen before" else 0.9 * (number + 0.5) / options.points
            if not mounts:  # a limit holds for each file
                share *= 0.25
            disk = Disk(root / f"disk{number}", mounts)
            try:
                said = point(command, expected, space, share, stage, number % 4 >= 2, disk, root / "log")
            finally:
                disk.close()
            counts[stage] += 1
            counts["reruns that continued"] += "continued an interrupted run" in said
            sys.stderr.write(f"{command.name}, {stage}, {share:.3f}: {said.splitlines()[0][:150]}\n")
    ends = ", ".join(f"{count} {what}" for what, count in counts.items())
    kind = "a full tmpfs" if mounts else "a limit on file sizes"
    sys.stdout.write(f"{options.points} points of {kind} ({ends}): nothing was damaged, every rerun ended right\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
