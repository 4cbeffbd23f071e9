"""All of it, one after the other: `python -m tests.robustness.everything --progress FOLDER --folder TMPFS`.

Power cuts of each case with a rerun of every state, two and four ranks, mutated inputs, kills, full disks, and every
point. What has ended is noted in FOLDER and not run again, so that it may be ended at any time and goes on. Prints the
counts at the end, or with --summary alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

CASES = (
    "import TP2 PP2", "export", "export torch_dist", "import torch_dist", "layout to layout", "checksums",
    "export with checksums", "import and verify",
)  # fmt: skip
FURTHER = (
    "import TP2 PP2 --overwrite, no exchange", "as large runs, import TP2 PP2",
    "as large runs, import TP2 PP2 --overwrite",
)  # fmt: skip
FUZZ = 500  # inputs of one run, of 10,000
ALL = "1000000"


def units(folder: Path, progress: Path) -> Iterator[list[str]]:
    """Each a module and its arguments."""
    here = ["--folder", str(folder)]
    for case in (*(f"{case}{older}" for case in CASES for older in ("", " --overwrite")), *FURTHER):
        yield ["tests.robustness", "--power-cuts", ALL, "--case", case, "--exactly", *here]
    for ranks, sample in (("2", "32"), ("4", "16")):
        yield ["tests.robustness", "--ranks", ranks, "--sample", sample, *here]
    for first in range(0, 10_000, FUZZ):
        yield ["tests.robustness.fuzz", "--inputs", str(FUZZ), "--first", str(first), "--keep", str(progress / "kept")]
    for seed in ("1", "2", "3"):
        yield ["tests.robustness.kill_runs", "--small", "--runs", "100", "--seed", seed, *here]
    yield ["tests.robustness.full_disk", "--points", "40", "--no-mount"]
    yield ["tests.robustness", "--progress", str(progress / "points"), *here]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--progress", type=Path, required=True, help="a folder of what has ended")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where to convert (default: /dev/shm)")
    parser.add_argument("--but-points", action="store_true", help="without the points, which take most of the time")
    parser.add_argument("--summary", action="store_true", help="only print what has ended")
    options = parser.parse_args(arguments)
    options.progress.mkdir(parents=True, exist_ok=True)
    notes = options.progress / "ended"
    ended: dict[str, tuple[int, str]] = {}
    for line in notes.read_text().splitlines() if notes.exists() else []:
        name, code, said = json.loads(line)
        ended[name] = code, said
    for unit in [] if options.summary else units(options.folder, options.progress):
        name = " ".join(unit)
        if name in ended or (options.but_points and unit[-4:-3] == ["--progress"]):
            continue
        code, said = _run(unit, options)
        if code < 0:
            return 128 - code
        ended[name] = code, said
        with notes.open("a") as file:
            file.write(json.dumps([name, code, said]) + "\n")
    for name, (code, said) in ended.items():
        sys.stdout.write(f"{'' if code == 0 else 'WRONG '}{name}\n    {said}\n")
    return 1 if any(code for code, _ in ended.values()) else 0


def _run(unit: list[str], options: argparse.Namespace) -> tuple[int, str]:
    """(exit code, the last line)."""
    began = time.monotonic()
    environment = os.environ | {"TMPDIR": str(options.folder)}
    child = subprocess.Popen([sys.executable, "-m", *unit], stdout=subprocess.PIPE, text=True, env=environment)

    def stop(number: int, _: object) -> None:
        os.kill(child.pid, number)  # it ends by itself; to wait for it here would wait for the one who waits already
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    text, _ = child.communicate()
    said = text.strip().splitlines()[-1] if text.strip() else "it said nothing"
    return child.returncode, f"{said} ({time.monotonic() - began:.0f} s)"


if __name__ == "__main__":
    sys.exit(main())
