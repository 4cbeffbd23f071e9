"""What memory a run may take, from the files in which Linux says so, and the refusal of a run that would take more."""

from __future__ import annotations

from pathlib import Path

import pytest

from weights_conversion.engine import memory
from weights_conversion.errors import ConversionError

GB = 1_000_000_000


def linux(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal: 32000000 kB\nMemAvailable: 16000000 kB\n"}
GROUP_2 = {"proc/self/cgroup": "0::/job_7/step_0/task_1\n", "sys/fs/cgroup/job_7/step_0/task_1/memory.max": "max\n"}
STEP = "sys/fs/cgroup/job_7/step_0"
GROUP_1 = {"proc/self/cgroup": "5:cpuset:/\n4:cpu,memory:/job_7/step_0\n0::/\n"}
STEP_1 = "sys/fs/cgroup/memory/job_7/step_0"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MACHINE, 16_384_000_000),
        (MACHINE | {"proc/self/cgroup": "0::/\n"}, 16_384_000_000),
        (MACHINE | GROUP_2, 16_384_000_000),
        # The step's limit, and not the task's; what it holds of the page cache is not taken.
        (
            MACHINE | GROUP_2
            | {f"{STEP}/memory.max": f"{4 * GB}\n", f"{STEP}/memory.stat": f"anon {GB}\nfile {3 * GB}\n"},
            3 * GB,
        ),
        (
            MACHINE | GROUP_1
            | {f"{STEP_1}/memory.limit_in_bytes": f"{2 * GB}\n", f"{STEP_1}/memory.stat": f"total_rss {GB}\n"},
            GB,
        ),
        (
            MACHINE | GROUP_1
            | {f"{STEP_1}/memory.limit_in_bytes": "9223372036854771712\n", f"{STEP_1}/memory.stat": "total_rss 5\n"},
            16_384_000_000,
        ),
    ],
    ids=["no Linux", "machine", "root group", "no limit", "version 2", "version 1", "version 1 without limit"],
)  # fmt: skip
def test_available(files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    assert memory.available(linux(tmp_path, files)) == expected


def test_check(tmp_path: Path) -> None:
    root = linux(tmp_path, MACHINE)
    memory.check(16 * GB, root=root)
    with pytest.raises(ConversionError, match=r"20\.0 GB of memory are needed, but 16\.4 GB .*--workers"):
        memory.check(20 * GB, root=root)
    with pytest.raises(ConversionError, match=r"20\.0 GB of memory are needed"):
        memory.check(5 * GB, 4, root)


def test_swap_counts(tmp_path: Path) -> None:
    root = linux(tmp_path, {"proc/meminfo": MACHINE["proc/meminfo"] + "SwapFree: 4000000 kB\n"})
    assert memory.available(root) == 20_480_000_000


def test_a_group_may_be_one_rank_s(tmp_path: Path) -> None:
    group = {f"{STEP}/memory.max": f"{2 * GB}\n", f"{STEP}/memory.stat": "anon 0\n"}
    memory.check(GB, 4, linux(tmp_path, MACHINE | GROUP_2 | group))


def test_refused_before_the_first_byte(to_megatron, sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Less than nothing, since this process may hold more than a run needs.
    monkeypatch.setattr(memory, "_left_on_machine", lambda root: [-(1 << 50)])
    line = ("llama2", "--model-path", sources("llama2"), "--out", tmp_path / "out")
    to_megatron(*line).refused("memory", "--workers")
    assert not list(tmp_path.iterdir())
