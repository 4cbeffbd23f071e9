"""What is measured: the disk itself, a plain copy, and conversions and proofs of ours."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.shapes import Shape
from benchmarks.slow import Slow

PYTHON = sys.executable
SHARD_BYTES = 5_000_000_000
MODEL, CHECKPOINT, OUT = "{model}", "{checkpoint}", "{out}"


@dataclass(frozen=True)
class Setting:
    """A disk and its cache. `limit`: what is the best that a conversion can do here."""

    name: str
    title: str
    cold: bool
    limit: str
    slow: Slow
    memory: int | None = None  # bytes of a control group in which everything runs


@dataclass(frozen=True)
class Contender:
    """A command, with {model}, {checkpoint} and {out} in it, and what it is compared with (None: the setting's limit).

    `reads` are the folders that it reads. `syncs`: by itself; otherwise `sync` follows and is part of its time.
    """

    name: str
    title: str
    command: Sequence[str]
    reads: Sequence[str]
    limit: str | None = None
    syncs: bool = True
    settings: Sequence[str] | None = None  # where it is measured; None: in all

    @property
    def is_raw(self) -> bool:
        return self.name.startswith("raw-")


MEMORY_BYTES = 700 << 20

# Beside what README and docs/speed.md promise, and so in the first rounds only.
ASIDE = ("export-5gb", "layout")
FEW_ROUNDS = 2


def settings(cap: float) -> list[Setting]:
    """`cap` in bytes/s."""
    return [
        Setting("warm", "source cached", False, "raw-write", Slow()),
        Setting("cold", "source not cached", True, "raw-copy", Slow()),
        Setting("sync", "source cached, 0.3 s added to every fsync", False, "raw-write", Slow(0.3)),
        Setting("cap", f"source cached, at most {cap / 1e9:g} GB/s written", False, "raw-write", Slow(0.0, cap)),
        Setting("memory", "source not cached, in 700 MB with its page cache", True, "raw-copy", Slow(), MEMORY_BYTES),
    ]


def rounds_of(setting: str, name: str, rounds: int) -> int:
    """In how many of `rounds` a contender runs: the first ones."""
    if setting == "cap":  # its rate is given, so that rounds tell nothing more
        return 1
    return min(rounds, FEW_ROUNDS) if name in ASIDE else rounds


def contenders(shape: Shape) -> list[Contender]:
    raw = (PYTHON, "-m", "benchmarks.raw")
    to_megatron = (PYTHON, "hf_to_megatron.py", "llama2", "--model-path")
    to_hf = (PYTHON, "megatron_to_hf.py", "--model", "llama2", "--no_tokenizer", "--input_dir")
    verify = (PYTHON, "verify.py", MODEL, CHECKPOINT)
    shards = max(2, -(-shape.nbytes // SHARD_BYTES))
    four = ("--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "4")
    page_cache = (PYTHON, "-m", "benchmarks.through_page_cache", "hf_to_megatron", "llama2", "--model-path")
    baseline = (PYTHON, "-m", "benchmarks.baseline")
    return [
        Contender("raw-write", "disk, written directly", (*raw, "write", OUT, str(shape.nbytes)), (), "raw-write"),
        Contender("raw-copy", "disk, copied directly", (*raw, "copy", OUT, MODEL), (MODEL,), "raw-copy"),
        Contender("raw-read", "disk, both sides read directly", (*raw, "read", MODEL, CHECKPOINT), (), "raw-read"),
        Contender(
            "cp", "cp -r; sync", ("cp", "-r", MODEL, OUT), (MODEL,), syncs=False, settings=("warm",)
        ),
        Contender("import-tp1", "import, TP 1", (*to_megatron, MODEL, "--out", OUT), (MODEL,)),
        Contender(
            "import-tp8-pp4", "import, TP 8 x PP 4", (*to_megatron, MODEL, "--out", OUT, *four), (MODEL,),
            settings=("warm", "cold", "sync"),
        ),
        Contender(
            "import-dist", "import, torch_dist", (*to_megatron, MODEL, "--out", OUT, "--target", "megatron-core"),
            (MODEL,), settings=("warm", "cold", "sync"),
        ),
        Contender("export-1", "export, 1 file", (*to_hf, CHECKPOINT, "--output_dir", OUT), (CHECKPOINT,)),
        Contender(
            "export-5gb", "export, files of 5 GB",
            (*to_hf, CHECKPOINT, "--output_dir", OUT, "--num_output_shards", str(shards)), (CHECKPOINT,),
            settings=("warm",),
        ),
        Contender(
            "layout", "TP 1 to TP 8 x PP 4", (*to_megatron, CHECKPOINT, "--out", OUT, *four), (CHECKPOINT,),
            settings=("warm", "cold"),
        ),
        Contender(
            "verify-exact", "verify, exact", (*verify, "--exact-only"), (MODEL, CHECKPOINT), "raw-read",
            settings=("cold",),
        ),
        Contender(
            "verify", "verify with a forward pass", verify, (MODEL, CHECKPOINT), "raw-read", settings=("cold",)
        ),
        Contender(
            "import-page-cache", "import, TP 1, no direct writes", (*page_cache, MODEL, "--out", OUT), (MODEL,), "cp",
            settings=("warm",),
        ),
        Contender(
            "import-baseline", "import, whole model in memory", (*baseline, "import", MODEL, OUT), (MODEL,),
            syncs=False, settings=("warm",),
        ),
        Contender(
            "export-baseline", "export, whole model in memory", (*baseline, "export", CHECKPOINT, OUT), (CHECKPOINT,),
            syncs=False, settings=("warm",),
        ),
        Contender(
            "start-up", "start-up (a dry run)", (*to_megatron, MODEL, "--out", OUT, "--dry-run"), (MODEL,),
            settings=("warm",),
        ),
    ]  # fmt: skip


EXTRA = ("import-baseline", "export-baseline")  # measured only where they are asked for
