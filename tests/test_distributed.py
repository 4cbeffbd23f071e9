"""Many ranks: the same bytes as one process, and an end with a reason for every rank, whatever happens to one of them.

Real torchrun launches are few, for their start-up. The other jobs are SLURM-like: a small launcher imports torch once
and forks the ranks, each with the variables that srun sets; they share nothing but the filesystem and a port.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import REPOSITORY

from weights_conversion import distributed
from weights_conversion.config import ConversionError
from weights_conversion.launch import find_launch, first_host

MODEL = "llama2-gqa"
CUT = ("--tensor-model-parallel-size", 4, "--pipeline-model-parallel-size", 2)
BOUND = 60.0  # seconds after which every rank has ended
# Shorter than the released ones, so that the tests do not wait.
LIMITS = {"join": 8.0, "silence": 5.0, "beat": 0.2, "nudge": 2.0, "exit": 6.0, "farewell": 4.0}

LAUNCHER = """
import importlib, json, os, sys, time, traceback
import torch
import torch._subclasses.fake_tensor, torch.utils.serialization
sys.path.insert(0, sys.argv[1])
from weights_conversion import distributed, execute, to_hf, to_megatron

def be(rank, job, group):
    os.setpgid(0, group)
    os.environ |= job["variables"] | {"SLURM_PROCID": str(rank)}
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{job['logs']}/{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    distributed.LIMITS = distributed.Limits(**job["limits"])
    code = 1
    try:
        exec(job["faults"].get(str(rank), ""), globals())
        code = importlib.import_module(job["script"]).main(job["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)

for line in sys.stdin:
    job, running, ended, begin = json.loads(line), {}, {}, time.monotonic()
    for rank in job["started"]:
        group = next(iter(running), 0)
        child = os.fork()
        if child == 0:
            be(rank, job, group)
        os.setpgid(child, group or child)
        running[child] = rank
    while running:
        child, status = os.wait()
        ended[running.pop(child)] = (os.waitstatus_to_exitcode(status), time.monotonic() - begin)
    print(json.dumps(ended), flush=True)
"""

# Faults, as code that one rank runs before the conversion.
FAULT = """
convert_chunk, calls = execute.convert_chunk, []
def failing(*arguments):
    calls.append(None)
    if len(calls) == 3:
        {what}
    return convert_chunk(*arguments)
execute.convert_chunk = failing
"""
DIES = FAULT.format(what="import signal; os.kill(os.getpid(), signal.SIGKILL)")
DISK_FULL = FAULT.format(what="raise OSError(28, os.strerror(28), 'some/file')")
DEFECT = FAULT.format(what="raise RuntimeError('a defect')")
TERMINATED = FAULT.format(what="import signal; os.kill(os.getpid(), signal.SIGTERM); time.sleep(1)")
TERMINATES_ALL = FAULT.format(what="import signal; os.killpg(0, signal.SIGTERM); time.sleep(1)")
STUCK = "execute.convert_chunk = lambda *arguments: time.sleep(3600)"
OTHER_CONFIG = """
from weights_conversion.formats import huggingface
read = huggingface.read_json
huggingface.read_json = lambda path: read(path) | ({"rms_norm_eps": 1e-6} if path.name == "config.json" else {})
"""


@dataclass(frozen=True)
class Ended:
    code: int
    seconds: float
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


Job = Callable[..., dict[int, Ended]]


@pytest.fixture(scope="module")
def srun() -> Iterator[Job]:
    """srun(size, script, *arguments, logs=..., faults={rank: code}, started=ranks): a job of `size` tasks."""
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(REPOSITORY)], env=environment(), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, bufsize=1,
    ) as launcher:  # fmt: skip
        assert launcher.stdin is not None
        assert launcher.stdout is not None
        lines, answers = launcher.stdin, launcher.stdout

        def start(
            size: int, script: str, *arguments: object, logs: Path, faults: Mapping[int, str] | None = None,
            started: Sequence[int] = (),
        ) -> dict[int, Ended]:  # fmt: skip
            logs.mkdir(parents=True, exist_ok=True)
            variables = {
                "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NTASKS": str(size),
                "SLURM_STEP_NUM_TASKS": str(size), "SLURM_STEP_NODELIST": "127.0.0.[1-2]",
                "MASTER_PORT": str(free_port()),
            }  # fmt: skip
            job = {
                "script": script, "arguments": [str(word) for word in arguments], "logs": str(logs),
                "faults": faults or {}, "started": list(started or range(size)), "variables": variables,
                "limits": LIMITS,
            }  # fmt: skip
            lines.write(json.dumps(job) + "\n")
            return {
                int(rank): Ended(code, seconds, (logs / f"{rank}.out").read_text(), (logs / f"{rank}.err").read_text())
                for rank, (code, seconds) in json.loads(answers.readline()).items()
            }

        yield start
        lines.close()


def environment() -> dict[str, str]:
    launchers = ("SLURM_", "MASTER_", "TORCHELASTIC_", "RANK", "WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    return kept | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def torchrun(nodes: int, per_node: int, script: object, *arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """One torchrun on each of `nodes` nodes, all on loopback."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", per_node]
    command += ["--master-addr", "127.0.0.1", "--master-port", free_port()]
    found: dict[int, subprocess.CompletedProcess[str]] = {}

    def node(number: int) -> None:
        line = [str(word) for word in [*command, "--node-rank", number, script, *arguments]]
        found[number] = subprocess.run(
            line, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=3 * BOUND
        )

    threads = [threading.Thread(target=node, args=(number,)) for number in range(nodes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in range(nodes)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same(folder: Path, expected: Path) -> None:
    found, wanted = contents(folder), contents(expected)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert not folder.with_name(folder.name + ".partial").exists()


def assert_unfinished(out: Path) -> None:
    """Nothing that a reader would take for a checkpoint."""
    assert not out.exists()
    assert not list(out.parent.glob(f"{out.name}*/latest_checkpointed_iteration.txt"))


def importing(source: Path, out: Path, *options: object) -> list[object]:
    return ["llama2", "--model-path", source, "--out", out, "--workers", 2, *options]


def exporting(checkpoint: Path, out: Path, *options: object) -> list[object]:
    return ["--input_dir", checkpoint, "--output_dir", out, "--no_tokenizer", *options]


def assert_ended(ranks: Mapping[int, Ended], code: int, *reason: str, speaker: int = 0) -> None:
    """All have ended in time with `code`; one says why, in sentences, and the others say nothing."""
    assert ranks
    for rank, ended in ranks.items():
        if ended.code == -9:
            continue
        assert ended.seconds < BOUND
        assert ended.code == code, f"rank {rank}: {ended}"
        assert "Traceback" not in ended.err, ended.err
        assert ended.out == ""
        assert bool(ended.err.strip()) == (rank == speaker), f"rank {rank}: {ended.err}"
    for word in reason:
        assert word in ranks[speaker].err, ranks[speaker].err


# --- the same bytes


@pytest.mark.parametrize(("size", "cut"), [(2, ()), (3, CUT), (4, ()), (8, CUT)], ids=str)
def test_import_on_ranks(size: int, cut: tuple, sources, imported, tmp_path: Path, srun: Job) -> None:
    out = tmp_path / "out"
    ranks = srun(size, "hf_to_megatron", *importing(sources(MODEL), out, *cut), logs=tmp_path / "logs")
    assert {rank: ended.code for rank, ended in ranks.items()} == dict.fromkeys(range(size), 0), ranks
    assert [ended.out + ended.err for rank, ended in ranks.items() if rank] == [""] * (size - 1)
    assert ranks[0].out.count("done ") == 1
    assert_same(out, imported(MODEL, *cut))


@pytest.mark.parametrize(("size", "cut", "shards"), [(2, CUT, 3), (3, (), 1), (4, CUT, 1)], ids=str)
def test_export_on_ranks(size: int, cut: tuple, shards: int, imported, to_hf, tmp_path: Path, srun: Job) -> None:
    checkpoint, options = imported(MODEL, *cut), ("--num_output_shards", shards)
    to_hf(*exporting(checkpoint, tmp_path / "one", *options)).succeeded()
    ranks = srun(size, "megatron_to_hf", *exporting(checkpoint, tmp_path / "out", *options), logs=tmp_path / "logs")
    assert {rank: ended.code for rank, ended in ranks.items()} == dict.fromkeys(range(size), 0), ranks
    assert_same(tmp_path / "out", tmp_path / "one")


def test_layout_to_layout_on_ranks(imported, to_megatron, tmp_path: Path, srun: Job) -> None:
    """And into torch_dist files, of which ranks write parts as of any other."""
    source, into = imported(MODEL, *CUT), ("--target", "megatron-core", "--ckpt-format", "torch_dist")
    for name, options in (("merged", ()), ("core", into)):
        to_megatron(*importing(source, tmp_path / f"{name}-one", *options)).succeeded()
        out = tmp_path / name
        ranks = srun(3, "hf_to_megatron", *importing(source, out, *options), logs=tmp_path / "logs")
        assert {rank: ended.code for rank, ended in ranks.items()} == dict.fromkeys(range(3), 0), ranks
        assert_same(out, tmp_path / f"{name}-one")


def test_torchrun_on_two_nodes(sources, imported, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nodes = torchrun(2, 2, "hf_to_megatron.py", *importing(sources(MODEL), out, *CUT))
    assert [node.returncode for node in nodes] == [0, 0], nodes
    assert "4 ranks" in nodes[0].stdout
    assert nodes[1].stdout == ""
    assert_same(out, imported(MODEL, *CUT))


def test_one_rank_connects_to_nothing(sources, imported, to_megatron, tmp_path: Path, monkeypatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    to_megatron(*importing(sources(MODEL), tmp_path / "out", *CUT)).succeeded()
    assert_same(tmp_path / "out", imported(MODEL, *CUT))


# --- one rank fails


@pytest.mark.parametrize(
    ("fault", "rank", "words"),
    [
        (DISK_FULL, 1, ("rank 1 of 3 on", "No space left on device", "some/file", "continues")),
        (DIES, 2, ("rank 2 of 3 on", "no sign of life", "continues")),
        (DISK_FULL, 0, ("No space left on device", "some/file", "continues")),
        (TERMINATED, 1, ("rank 1 of 3 on", "interrupted", "continues")),
    ],
    ids=["disk full", "killed", "disk full on rank 0", "terminated"],
)
def test_one_rank_ends_all(fault, rank, words, sources, imported, to_megatron, tmp_path: Path, srun: Job) -> None:
    """And the same command, on other numbers of ranks, completes what was begun."""
    out, arguments = tmp_path / "out", importing(sources(MODEL), tmp_path / "out", *CUT)
    ranks = srun(3, "hf_to_megatron", *arguments, logs=tmp_path / "logs", faults={rank: fault})
    if fault is TERMINATED:
        assert ranks.pop(rank).code == 143
    assert_ended(ranks, 1, *words)
    assert_unfinished(out)
    if rank == 1:
        again = srun(2, "hf_to_megatron", *arguments, logs=tmp_path / "again")
        assert "continued an interrupted run" in again[0].out
    else:
        assert "continued an interrupted run" in to_megatron(*arguments).succeeded().out
    assert_same(out, imported(MODEL, *CUT))


def test_all_ranks_are_terminated(sources, imported, to_megatron, tmp_path: Path, srun: Job) -> None:
    """As a scheduler does at the end of the time: said once, and continued by the next job."""
    out, arguments = tmp_path / "out", importing(sources(MODEL), tmp_path / "out", *CUT)
    ranks = srun(3, "hf_to_megatron", *arguments, logs=tmp_path / "logs", faults={1: TERMINATES_ALL})
    assert_ended(ranks, 143, "terminated", "continues")
    assert_unfinished(out)
    to_megatron(*arguments).succeeded()
    assert_same(out, imported(MODEL, *CUT))


def test_rank_zero_is_killed(sources, imported, tmp_path: Path, srun: Job) -> None:
    """Nobody is left to speak for all: each of the others says why it ends."""
    out, arguments = tmp_path / "out", importing(sources(MODEL), tmp_path / "out")
    ranks = srun(3, "hf_to_megatron", *arguments, logs=tmp_path / "logs", faults={0: DIES})
    for rank in (1, 2):
        assert_ended({rank: ranks[rank]}, 1, "rank 0 of 3 on", "killed", speaker=rank)
    assert_unfinished(out)
    assert srun(4, "hf_to_megatron", *arguments, logs=tmp_path / "again")[0].code == 0
    assert_same(out, imported(MODEL))


def test_a_defect_leaves_its_traceback(sources, tmp_path: Path, srun: Job) -> None:
    ranks = srun(
        2, "hf_to_megatron", *importing(sources(MODEL), tmp_path / "out"), logs=tmp_path / "logs", faults={1: DEFECT}
    )
    assert_ended({0: ranks[0]}, 1, "rank 1 of 2 on", "RuntimeError: a defect")
    assert "Traceback" in ranks[1].err
    assert ranks[1].code == 1


def test_a_stuck_rank_is_ended(sources, tmp_path: Path, srun: Job) -> None:
    """It lives, but does not come back from its work to hear that another one has failed."""
    faults = {2: STUCK, 1: DISK_FULL}
    ranks = srun(
        3, "hf_to_megatron", *importing(sources(MODEL), tmp_path / "out"), logs=tmp_path / "logs", faults=faults
    )
    assert_ended(ranks, 1, "rank 1 of 3 on", "No space left")
    assert_unfinished(tmp_path / "out")


@pytest.mark.parametrize("absent", [0, 2])
def test_a_rank_never_starts(absent: int, sources, tmp_path: Path, srun: Job) -> None:
    started = [rank for rank in range(3) if rank != absent]
    ranks = srun(
        3, "hf_to_megatron", *importing(sources(MODEL), tmp_path / "out"), logs=tmp_path / "logs", started=started
    )
    if absent:
        assert_ended(ranks, 1, "rank 2 of 3 did not start")
    else:
        for rank in started:
            assert_ended({rank: ranks[rank]}, 1, f"rank {rank} of 3", "cannot reach rank 0 at 127.0.0.1", speaker=rank)
    assert list(tmp_path.glob("out*")) == []


def test_ranks_see_different_sources(sources, tmp_path: Path, srun: Job) -> None:
    ranks = srun(
        3, "hf_to_megatron", *importing(sources(MODEL), tmp_path / "out"), logs=tmp_path / "logs",
        faults={1: OTHER_CONFIG},
    )  # fmt: skip
    assert_ended(ranks, 1, f"rank 1 ({socket.gethostname()}) and rank 0", "different sources", "config")
    assert list(tmp_path.glob("out*")) == []


def test_bad_input_is_said_once(sources, tmp_path: Path, srun: Job) -> None:
    ranks = srun(
        3, "hf_to_megatron", *importing(sources(MODEL), tmp_path / "out", "--tensor-model-parallel-size", 3),
        logs=tmp_path / "logs",
    )  # fmt: skip
    assert_ended(ranks, 1, "--tensor-model-parallel-size 3")


def test_torchrun_says_which_rank_was_killed(sources, tmp_path: Path) -> None:
    """torchrun terminates all ranks as soon as one has died; rank 0 still says why."""
    script = tmp_path / "killed.py"
    script.write_text(
        f"import os, sys, time\nsys.path.insert(0, {str(REPOSITORY)!r})\nimport hf_to_megatron\n"
        f"from weights_conversion import execute\nif os.environ['RANK'] == '1':\n    exec({DIES!r})\n"
        "sys.exit(hf_to_megatron.main())\n"
    )
    (node,) = torchrun(1, 2, script, *importing(sources(MODEL), tmp_path / "out"))
    assert node.returncode != 0
    assert "rank 1 of 2 on" in node.stderr
    assert "no sign of life" in node.stderr
    assert_unfinished(tmp_path / "out")


# --- launchers


def slurm(**more: str) -> dict[str, str]:
    return {"SLURM_JOB_ID": "77", "SLURM_PROCID": "3", "SLURM_NTASKS": "8", **more}


STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[07-09],m1"}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "8"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        slurm(),
        slurm(SLURM_STEP_ID="4294967291"),
        slurm(SLURM_STEP_ID="4294967290", SLURM_STEP_NUM_TASKS="1"),
        slurm(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="1"),
        {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8"},
        {"RANK": "0", "WORLD_SIZE": "1", **slurm(**STEP)},
    ],
    ids=str,
)
def test_no_launcher(variables: dict[str, str]) -> None:
    """Batch scripts and interactive shells of SLURM among them, which have SLURM_NTASKS but are one process."""
    assert find_launch(variables) is None


def test_launchers() -> None:
    torch = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "5"}
    launch = find_launch(torch | slurm(**STEP))
    assert launch is not None
    assert (launch.rank, launch.size, launch.address, launch.port, launch.serves) == (1, 2, "a", 5, False)
    agent = find_launch(torch | {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert agent is not None
    assert not agent.serves
    step = find_launch(slurm(**STEP))
    assert step is not None
    assert (step.rank, step.size, step.address, step.serves) == (3, 4, "n07", False)
    other = find_launch(slurm(**STEP | {"SLURM_STEP_ID": "1", "SLURM_PROCID": "0"}))
    assert other is not None
    assert other.serves
    assert other.port != step.port
    assert other.name != step.name


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        (slurm(**STEP | {"SLURM_STEP_NUM_TASKS": "many"}), "SLURM_STEP_NUM_TASKS is 'many'"),
    ],
)
def test_half_set_launchers(variables: dict[str, str], words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        find_launch(variables)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node[003-006,010],x1", "node003"),
        ("a,b", "a"),
        ("n[5]", "n5"),
        ("r[1-2]n[03-04]-ib", "r1n03-ib"),
        ("n[1,3-4].cluster.org,z", "n1.cluster.org"),
        ("", "localhost"),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


# --- sharing and predicting


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_share(size: int) -> None:
    sizes = [7, 1, 1, 30, 5, 5, 5, 12, 9, 9, 2]
    parts = distributed.share(range(len(sizes)), sizes, size)
    assert len(parts) == size
    assert [number for part in parts for number in part] == list(range(len(sizes)))
    assert max(sum(sizes[number] for number in part) for part in parts) <= sum(sizes) / size + max(sizes)


def test_share_of_little() -> None:
    assert [list(part) for part in distributed.share(["a", "b"], [1, 1], 4)] == [["a"], ["b"], [], []]
    assert [list(part) for part in distributed.share([], [], 2)] == [[], []]


def test_ranges() -> None:
    assert distributed.to_ranges([0, 1, 2, 5, 7, 8]) == [[0, 3], [5, 6], [7, 9]]
    assert distributed.to_ranges([]) == []


def test_predicted_seconds() -> None:
    predict: Callable[..., float] = distributed.predicted_seconds
    assert predict(100, 1, 10.0, start_up=2.0) == 12.0
    assert predict(100, 4, 10.0, start_up=2.0) == 4.5
    assert predict(100, 4, 10.0, 20.0, start_up=2.0) == 7.0


def test_dry_run_predicts(sources, to_megatron, tmp_path: Path) -> None:
    options = ("--dry-run", "--ranks", 4, "--rank-rate", 0.5, "--filesystem-bandwidth", 1.5)
    text = to_megatron(*importing(sources(MODEL), tmp_path / "out", *options)).succeeded().out
    assert "on 1 rank" in text
    assert "on 4 ranks" in text
    assert "1.5 GB/s" in text
    assert list(tmp_path.glob("out*")) == []
