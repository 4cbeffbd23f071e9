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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import REPOSITORY

from weights_conversion.engine import prediction, sharing
from weights_conversion.engine import run as convert
from weights_conversion.errors import ConversionError
from weights_conversion.launch.environment import find_launch, first_host
from weights_conversion.output import locks as output_locks

MODEL = "llama2-gqa"
CUT = ("--tensor-model-parallel-size", 4, "--pipeline-model-parallel-size", 2)
BOUND = 60.0  # seconds after which every rank has ended
# Shorter than the released ones, so that the tests do not wait.
LIMITS = {"join": 8.0, "silence": 5.0, "beat": 0.2, "nudge": 2.0, "exit": 6.0, "farewell": 4.0}

LAUNCHER = """
import importlib, json, os, sys, time, traceback
import torch
import torch._subclasses.fake_tensor, torch.distributed.checkpoint, torch.utils.serialization
sys.path.insert(0, sys.argv[1])
from weights_conversion import cli
from weights_conversion.verbs import to_hf, to_megatron
from weights_conversion.engine import execute, run as convert
from weights_conversion.launch import distributed
from weights_conversion.output import locks

def be(rank, job, group):
    os.setpgid(0, group)
    os.environ |= job["variables"] | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(node(rank, job))}
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

def node(rank, job):
    return rank * job["nodes"] // int(job["variables"]["SLURM_STEP_NUM_TASKS"])

for line in sys.stdin:
    job, running, ended, begin, groups = json.loads(line), {}, {}, time.monotonic(), {}
    for rank in job["started"]:
        group = groups.get(node(rank, job), 0)
        child = os.fork()
        if child == 0:
            be(rank, job, group)
        os.setpgid(child, group or child)
        groups.setdefault(node(rank, job), child)
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
from weights_conversion.files import fileio
read = fileio.read_json
other = {"config.json": {"rms_norm_eps": 1e-6}}
fileio.read_json = lambda path, *most: read(path, *most) | other.get(path.name, {})
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
    """srun(size, script, *arguments, logs=..., faults={rank: code}, started=ranks): a job of `size` tasks.

    `nodes` of them are process groups of their own, each with a part of the ranks.
    """
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(REPOSITORY)], env=environment(), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, bufsize=1,
    ) as launcher:  # fmt: skip
        assert launcher.stdin is not None
        assert launcher.stdout is not None
        lines, answers = launcher.stdin, launcher.stdout

        def start(
            size: int, script: str, *arguments: object, logs: Path, faults: Mapping[int, str] | None = None,
            started: Sequence[int] = (), limits: Mapping[str, float] | None = None, nodes: int = 1,
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
                "limits": LIMITS | (limits or {}), "nodes": nodes,
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


@pytest.fixture(scope="module")
def alone(sources, imported, to_megatron, to_hf, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple]:
    """alone(kind, cut): (script, its arguments up to the output's, what one process wrote), each made once."""
    root, done = tmp_path_factory.mktemp("alone"), {}

    def convert(kind: str, cut: tuple) -> tuple[str, list[object], Path]:
        script, out = "hf_to_megatron", root / f"{kind}{len(cut)}"
        if kind == "import":
            return script, ["llama2", "--model-path", sources(MODEL), "--workers", 2, *cut], imported(MODEL, *cut)
        if kind == "export":
            script, line = "megatron_to_hf", ["--input_dir", imported(MODEL, *cut), "--no_tokenizer"]
            line += ["--num_output_shards", 3 if cut else 1]
        elif kind == "layout":  # merged where it was cut, and cut where it was not
            line = ["llama2", "--model-path", imported(MODEL, *cut), "--workers", 2, *(() if cut else CUT)]
        else:  # of whose files ranks write parts as of any other
            line = ["llama2", "--model-path", imported(MODEL, *cut), "--target", "megatron-core"]
        if (kind, cut) not in done:
            run = to_hf if script == "megatron_to_hf" else to_megatron
            run(*line, "--output_dir" if script == "megatron_to_hf" else "--out", out).succeeded()
            done[kind, cut] = out
        return script, line, out

    return convert


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("cut", [(), CUT], ids=["TP 1", "TP 4 x PP 2"])
@pytest.mark.parametrize("kind", ["import", "export", "layout", "torch_dist"])
def test_ranks_write_the_same_bytes(kind: str, cut: tuple, size: int, alone, tmp_path: Path, srun: Job) -> None:
    """Processes of their own, on two nodes, with srun's variables; `cut` is the Megatron checkpoint's."""
    script, line, expected = alone(kind, cut)
    out, option = tmp_path / "out", "--output_dir" if kind == "export" else "--out"
    ranks = srun(size, script, *line, option, out, logs=tmp_path / "logs", nodes=min(size, 2))
    assert {rank: ended.code for rank, ended in ranks.items()} == dict.fromkeys(range(size), 0), ranks
    assert [ended.out + ended.err for rank, ended in ranks.items() if rank] == [""] * (size - 1)
    assert ranks[0].out.count("done ") == 1
    assert (f"{size} ranks" in ranks[0].out) == (size > 1)
    assert_same(out, expected)


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


# --- rank 0 first

FETCHES = """
from pathlib import Path
from weights_conversion.hub import repositories as hub

def snapshot(repository, revision, cache_dir, **_):
    rank, log = os.environ["SLURM_PROCID"], Path({log!r})
    found = log.with_name("fetched").exists()
    with log.open("a") as file:
        file.write(f"{{rank}} {{'finds' if found else 'fetches'}}\\n")
    if rank == "0":
        time.sleep(0.3)  # in which the others would overtake it
    {then}
    log.with_name("fetched").touch()
    return hub.Snapshot(Path({folder!r}), repository, "a" * 40)

hub.snapshot = snapshot
"""


def test_rank_zero_fetches_first(sources, imported, tmp_path: Path, srun: Job) -> None:
    """Once, and before the others look: they find what it has brought."""
    out, log = tmp_path / "out", tmp_path / "log"
    fault = FETCHES.format(log=str(log), folder=str(sources(MODEL)), then="pass")
    ranks = srun(
        3, "hf_to_megatron", *importing("some/model", out, "--cache-dir", tmp_path), logs=tmp_path / "logs",
        faults=dict.fromkeys(range(3), fault),
    )  # fmt: skip
    assert [ended.code for ended in ranks.values()] == [0, 0, 0], ranks
    first, *others = log.read_text().splitlines()
    assert first == "0 fetches"
    assert sorted(others) == ["1 finds", "2 finds"]
    (name,) = (name for name in contents(imported(MODEL)) if name.endswith("model_optim_rng.pt"))
    assert contents(out)[name] == contents(imported(MODEL))[name]


def test_what_rank_zero_cannot_fetch(sources, tmp_path: Path, srun: Job) -> None:
    """Is said once and ends all; no other rank tries."""
    log = tmp_path / "log"
    refuse = "from weights_conversion.errors import ConversionError; raise ConversionError('no such repository')"
    fault = FETCHES.format(log=str(log), folder=str(sources(MODEL)), then=refuse)
    ranks = srun(
        3, "hf_to_megatron", *importing("some/model", tmp_path / "out"), logs=tmp_path / "logs",
        faults=dict.fromkeys(range(3), fault),
    )  # fmt: skip
    assert_ended(ranks, 1, "no such repository")
    assert log.read_text() == "0 fetches\n"
    assert list(tmp_path.glob("out*")) == []


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


LATE = """
from pathlib import Path
convert_chunk, marks = execute.convert_chunk, Path({marks!r})
def late(*arguments):
    (marks / "busy").touch()
    deadline = time.monotonic() + {seconds}
    while not (marks / "rewritten").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        return convert_chunk(*arguments)
    except BaseException as error:
        (marks / "late").write_text(type(error).__name__)
        raise
    finally:
        (marks / "late").exists() or (marks / "late").write_text("wrote")
execute.convert_chunk = late
"""
DIES_FIRST = """
def dies(*arguments):
    while not os.path.exists({busy!r}):
        time.sleep(0.02)
    open({mark!r}, "w").close()
    os.kill(os.getpid(), 9)
execute.convert_chunk = dies
"""
NO_LOCKS = """
def no_locks(*arguments):
    raise OSError(38, "Function not implemented")
locks.fcntl.flock = no_locks
"""


@pytest.mark.parametrize("locks", [True, False])
def test_a_rerun_beside_ranks_without_their_rank_zero(
    locks: bool, sources, to_megatron, tmp_path: Path, srun: Job, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Rank 0 is killed; rank 1 is still busy, and writes when another command has begun to write other bytes.

    With locks that command waits for it. Without, rank 1 comes when the new bytes are all there, and must find no file.
    """
    out, dying, late = tmp_path / "out", tmp_path / "dying", tmp_path / "late"
    line = importing(sources(MODEL), out, *CUT)
    wait = LATE.format(marks=str(tmp_path), seconds=2 if locks else 25)
    before = "" if locks else NO_LOCKS
    faults = {0: before + DIES_FIRST.format(mark=str(dying), busy=str(tmp_path / "busy")), 1: before + wait}
    ranks: dict[int, Ended] = {}
    limits = {"nudge": 30.0, "exit": 40.0}
    job = threading.Thread(
        target=lambda: ranks.update(
            srun(2, "hf_to_megatron", *line, logs=tmp_path / "logs", faults=faults, limits=limits)
        )
    )
    execute = convert.execute

    def rewritten(*arguments: object) -> None:
        execute(*arguments)  # type: ignore[arg-type]
        (tmp_path / "rewritten").touch()
        while not late.exists() and job.is_alive():
            time.sleep(0.02)

    job.start()
    while not dying.exists() and job.is_alive():
        time.sleep(0.02)
    time.sleep(0.3)
    with monkeypatch.context() as patch:
        if not locks:
            patch.setattr(output_locks.fcntl, "flock", no_locks)
        patch.setattr(convert, "execute", rewritten)
        text = to_megatron(*line, "--dtype", "float32").succeeded().text
    job.join()
    assert ranks[0].code == -9
    assert ranks[1].code == 1
    assert ranks[1].seconds < BOUND
    assert ("waiting for their end" in text) == locks
    assert late.read_text() == ("wrote" if locks else "FileNotFoundError")
    to_megatron(*importing(sources(MODEL), tmp_path / "undisturbed", *CUT), "--dtype", "float32").succeeded()
    assert_same(out, tmp_path / "undisturbed")


def no_locks(*_: object) -> None:
    raise OSError(38, "Function not implemented")


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


STUCK_IN_A_READ = """
import signal
from weights_conversion.launch import signals
def stuck(*arguments):
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3600)
execute.convert_chunk, signals.STUCK_SECONDS = stuck, 1.0
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stuck_rank_is_terminated(rank: int, sources, tmp_path: Path, srun: Job) -> None:
    """Its read never comes back: it is ended from beside, and the others hear of it, and say it where rank 0 cannot."""
    ranks = srun(
        3, "hf_to_megatron", *importing(sources(MODEL), tmp_path / "out"), logs=tmp_path / "logs",
        faults={rank: STUCK_IN_A_READ},
    )  # fmt: skip
    words = (f"rank {rank} of 3 on", "was interrupted, but waits for a read or write", "continues")
    for speaker, ended in ranks.items() if rank == 0 else [(0, ranks[0])]:
        assert_ended({speaker: ended}, 1, *words, speaker=speaker)
    assert {ended.code for ended in ranks.values()} == {1}
    assert_unfinished(tmp_path / "out")


def test_one_stuck_process_is_terminated(sources, tmp_path: Path, srun: Job) -> None:
    ranks = srun(
        1, "hf_to_megatron", *importing(sources(MODEL), tmp_path / "out"), logs=tmp_path / "logs",
        faults={0: STUCK_IN_A_READ},
    )  # fmt: skip
    assert_ended(ranks, 143, "terminated", "continues")
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
        f"from weights_conversion.engine import execute\nif os.environ['RANK'] == '1':\n    exec({DIES!r})\n"
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
    parts = sharing.share(range(len(sizes)), sizes, size)
    assert len(parts) == size
    assert [number for part in parts for number in part] == list(range(len(sizes)))
    assert max(sum(sizes[number] for number in part) for part in parts) <= sum(sizes) / size + max(sizes)


def test_share_of_little() -> None:
    assert [list(part) for part in sharing.share(["a", "b"], [1, 1], 4)] == [["a"], ["b"], [], []]
    assert [list(part) for part in sharing.share([], [], 2)] == [[], []]


def test_ranges() -> None:
    assert sharing.to_ranges([0, 1, 2, 5, 7, 8]) == [[0, 3], [5, 6], [7, 9]]
    assert sharing.to_ranges([]) == []


def test_predicted_seconds() -> None:
    predict: Callable[..., float] = prediction.predicted_seconds
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
