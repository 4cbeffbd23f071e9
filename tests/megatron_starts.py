"""How the real megatron-core is started on a CPU for a list of jobs: one process, or one a rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import megatron_core
import torch

Job = dict[str, Any]


def one_process(jobs: list[Job], act: Callable[[Job], None]) -> None:
    """`act` of each job, in this process. "may_stop" in a job: an error is its result."""
    megatron_core.cpu_shims()
    with tempfile.TemporaryDirectory() as store:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}/store", rank=0, world_size=1)
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel()
        for job in jobs:
            try:
                act(job)
            except BaseException as error:  # a run that stops is what some jobs ask for
                if "may_stop" not in job:
                    raise
                torch.save(f"{type(error).__name__}: {error}", job["out"])
        torch.distributed.destroy_process_group()


def many_processes(file: str, world: int, act: Callable[[Job], None]) -> int:
    """`file` JOBS.json starts a process a rank, which each do `act` of the jobs that they have a part in."""
    path = Path(sys.argv[1])
    if len(sys.argv) > 2:
        _rank(json.loads(path.read_text()), int(sys.argv[2]), sys.argv[3], act)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, file, str(path)]
        ranks = [subprocess.Popen([*command, str(rank), f"{folder}/store"]) for rank in range(world)]
        return max(abs(rank.wait()) for rank in ranks)


def _rank(jobs: list[Job], rank: int, store: str, act: Callable[[Job], None]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    megatron_core.cpu_shims()
    from megatron.core import parallel_state

    for number, job in enumerate(jobs):
        world = max(job["tp"], job["ep"])
        if rank >= world:
            continue
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}-{number}", rank=rank, world_size=world, timeout=timedelta(seconds=90)
        )
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=job["tp"], expert_model_parallel_size=job["ep"],
            expert_tensor_parallel_size=job.get("etp", 1),
        )  # fmt: skip
        try:
            act(job)
            torch.distributed.barrier()
        except BaseException as error:
            if "may_stop" not in job:
                Path(f"{job['out']}.error").write_text(traceback.format_exc())
            elif rank == 0:
                torch.save(f"{type(error).__name__}: {error}", job["out"])
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
