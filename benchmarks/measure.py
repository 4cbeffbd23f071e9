"""Runs commands and says what they cost; says what machine this is; empties and fills the page cache."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class Cost:
    """Of one command with its children. Seconds and bytes.

    `resident` is the peak that a scheduler sees (VmHWM): mapped files count. `private` is memory that is the process's
    own, anonymous or shared with nobody (RssAnon + RssShmem), sampled every 10 ms. `storage_*` reached the storage
    device, `syscall_*` went through read and write calls.
    """

    seconds: float
    user: float
    system: float
    resident: int
    private: int
    storage_read: int
    storage_written: int
    syscall_read: int
    syscall_written: int


class Failed(Exception):
    """A measured command failed; the message ends with what it said."""


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Cost:
    """Runs a command to its end in the repository's folder. Raises Failed when it fails.

    This process must do nothing else meanwhile: the bytes are what its ended children add to its own account.
    """
    read_before, before = _io(), resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    child = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=environment,
    )  # fmt: skip
    peaks, ended = [0, 0], threading.Event()
    sampler = threading.Thread(target=_sample, args=(child.pid, peaks, ended))
    sampler.start()
    said, _ = child.communicate()
    seconds = time.perf_counter() - started
    ended.set()
    sampler.join()
    if child.returncode:
        end = said.decode(errors="replace")[-2000:]
        raise Failed(f"{' '.join(command)} ended with exit code {child.returncode}:\n{end}")
    after, read_after = resource.getrusage(resource.RUSAGE_CHILDREN), _io()
    moved = {name: read_after[name] - read_before[name] for name in read_after}
    return Cost(
        seconds, after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime, peaks[0], peaks[1],
        moved["read_bytes"], moved["write_bytes"], moved["rchar"], moved["wchar"],
    )  # fmt: skip


def _sample(pid: int, peaks: list[int], ended: threading.Event) -> None:
    while not ended.wait(SAMPLE_SECONDS):
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)
                     if name in ("VmHWM", "RssAnon", "RssShmem")}  # fmt: skip
        peaks[0] = max(peaks[0], kilobytes.get("VmHWM", 0) * 1024)
        peaks[1] = max(peaks[1], (kilobytes.get("RssAnon", 0) + kilobytes.get("RssShmem", 0)) * 1024)


def _io() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def warm(folder: Path) -> None:
    """Reads every file once, so that it stands in the page cache (as far as memory goes)."""
    buffer = bytearray(16 << 20)
    for path in files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cool(folder: Path) -> str:
    """Takes the files below a folder, and nothing else, out of the page cache; returns how it was done."""
    os.sync()
    for path in files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return "posix_fadvise(DONTNEED) on the files"


def takes_direct_writes(folder: Path) -> bool:
    path = folder / ".direct"
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
        return True
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)


def machine(folder: Path) -> dict[str, object]:
    """What the numbers depend on, without anything that names the machine."""
    cpu = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    inside = [m for m in mounts if Path(m[4]) == folder.resolve() or Path(m[4]) in folder.resolve().parents]
    mount = max(inside, key=lambda m: len(m[4]))
    filesystem, device = mount[mount.index("-") + 1 : mount.index("-") + 3]
    return {
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "kernel": platform.release(),
        "filesystem": filesystem,
        "device": device,
        "direct_writes": takes_direct_writes(folder),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in ("torch", "safetensors")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
