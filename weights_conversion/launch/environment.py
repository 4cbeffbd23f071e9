"""Which launcher started this process, and what it says: torchrun's and SLURM's environment variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from weights_conversion.errors import ConversionError


@dataclass(frozen=True)
class Launch:
    """What a launcher tells a process. `serves`: this rank runs the store (torchrun runs one itself)."""

    rank: int
    size: int
    address: str
    port: int
    name: str
    serves: bool


def find_launch(env: Mapping[str, str]) -> Launch | None:
    """The place of this process in a torchrun or srun job; None where it stands alone.

    A batch script's own process, and `salloc`'s shell, have SLURM_NTASKS too, but are no step of many tasks: srun alone
    sets SLURM_STEP_ID to a small number (the batch and interactive steps have ids at the end of 32 bits) together with
    SLURM_STEP_NUM_TASKS.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
        if size <= 1:
            return None
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
        if missing or rank >= size:
            raise ConversionError(
                f"RANK is {rank} and WORLD_SIZE {size}"
                + (f", but {' and '.join(missing)} not set" if missing else "")
                + "; start the command with torchrun or srun, or unset WORLD_SIZE where one process is meant"
            )
        name = f"{env.get('TORCHELASTIC_RUN_ID', '')}.{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        serves = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        return Launch(rank, size, env["MASTER_ADDR"], _number(env, "MASTER_PORT"), name, serves)

    step = env.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= 0xFFFFFFF0 or "SLURM_PROCID" not in env:
        return None
    size = _number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS", "1")
    if size <= 1:
        return None
    rank, job = _number(env, "SLURM_PROCID"), _number(env, "SLURM_JOB_ID", "0")
    # Below the ports that Linux hands out by itself; two steps of one job get different ones.
    port = _number(env, "MASTER_PORT") if env.get("MASTER_PORT") else 10000 + (job * 31 + int(step)) % 20000
    address = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", ""))
    return Launch(rank, size, address, port, f"{job}.{step}", serves=rank == 0)


def _number(env: Mapping[str, str], name: str, default: str = "") -> int:
    text = env.get(name, default)
    if not text.isdigit():
        raise ConversionError(f"{name} is {text!r}, where a launcher (torchrun, srun) puts a number")
    return int(text)


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `gpu[007-012,020],login1` is gpu007."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", match.group()) if match else "localhost"
