"""Seconds and memory of planning: dry runs of models with 36,000 to 100,000 tensors, which sparse files stand for.

Each is a process of its own. Seconds count from `import torch` to the report, without those in which tensors that are
stored several times were compared (their bytes are read: the rate of a disk); memory is the most that was resident, of
which torch takes the first part. The disk's space is not checked, since no disk here would hold them.

    python -m benchmarks.plan --folder bench
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import big
from benchmarks.measure import REPOSITORY, cool

# (name, model, layers or None, options of the import, whether the output is laid out and exported too)
RANKS = "--ckpt-format torch --moe-grouped-gemm --tensor-model-parallel-size {} --pipeline-model-parallel-size {} "
CASES = (
    ("Qwen3-235B-A22B, torch_dist", "qwen3-235b", None, ""),
    ("Qwen3-235B-A22B, TP 8 PP 2 EP 8", "qwen3-235b", None, RANKS.format(8, 2) + "--expert-model-parallel-size 8"),
    ("DeepSeek-V3, torch_dist", "deepseek-v3", None, ""),
    ("DeepSeek-V3 of 64 layers, TP 8 PP 8 EP 8", "deepseek-v3", 64,
     RANKS.format(8, 8) + "--expert-model-parallel-size 8"),
    ("DeepSeek-V3 of 132 layers, torch_dist", "deepseek-v3", 132, ""),
    ("DeepSeek-V3 of 136 layers, TP 8 PP 8 EP 8", "deepseek-v3", 136,
     RANKS.format(8, 8) + "--expert-model-parallel-size 8"),
)  # fmt: skip

# The child: a command line of ours whose dry run finds space; or, with `lay`, one that lays out its files, sparse.
CHILD = """
import json, resource, sys, time
began = time.perf_counter()
import torch
imported, first = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sys.path.insert(0, {repository!r})
from weights_conversion.engine import run as engine
from weights_conversion.output import space
space.check_space = lambda *_: None
compare, compared = engine.inconsistencies, [0.0]

def timed(*given):
    start = time.perf_counter()
    try:
        return compare(*given)
    finally:
        compared[0] += time.perf_counter() - start

engine.inconsistencies = timed
module, lay, argv = {module!r}, {lay!r}, {argv!r}
if lay:
    from pathlib import Path
    from weights_conversion.verbs import to_megatron

    def run(job, options):
        for target in job.targets:
            path = job.out / target.file
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w+b") as file:
                offsets = target.create(file)
                target.finish(file, dict.fromkeys(target.refs, 1), offsets)
        for name, content in ({{**job.files, **job.last}}).items():
            (job.out / name).parent.mkdir(parents=True, exist_ok=True)
            (job.out / name).write_bytes(content)
        return job.report

    to_megatron.run = run
code = __import__(module).main(argv)
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
seconds = time.perf_counter() - imported - compared[0]
print(json.dumps([seconds, *compared, first / 1e6 * 1.024, most / 1e6 * 1.024, code]))
"""


def child(module: str, argv: list[str], lay: bool = False) -> tuple[float, float, float, float]:
    """(seconds of planning, of comparing, GB resident behind `import torch`, and at most)."""
    text = CHILD.format(repository=str(REPOSITORY), module=module, argv=argv, lay=lay)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(argv)} failed:\n{done.stdout}{done.stderr}")
    seconds, compared, first, most, code = json.loads(done.stdout.splitlines()[-1])
    if code:
        raise SystemExit(f"{module} {' '.join(argv)} ended with {code}:\n{done.stdout}{done.stderr}")
    return seconds, compared, first, most


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where to work; a few GB of headers and archives")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose names hold this")
    args = parser.parse_args(argv)
    print("| case | tensors | direction | seconds | comparing | GB behind import torch | GB at most |")
    print("|---|---|---|---|---|---|---|")
    for name, model, layers, options in CASES:
        if args.only not in name:
            continue
        source, checkpoint = args.folder / "model", args.folder / "checkpoint"
        for stale in (source, checkpoint):
            shutil.rmtree(stale, ignore_errors=True)
        count, _ = big.write_model(source, model, layers)
        given = [big.CONFIGS[model][0], "--model-path", str(source), "--out", str(checkpoint), "--target",
                 "megatron-core", *options.split()]  # fmt: skip
        found = child("hf_to_megatron", [*given, "--dry-run"])
        print(f"| {name} | {count} | import | " + " | ".join(f"{n:.2f}" for n in found) + " |", flush=True)
        child("hf_to_megatron", given, lay=True)
        back = ["--input_dir", str(checkpoint), "--output_dir", str(args.folder / "out"), "--no_tokenizer"]
        cool(checkpoint)  # which waits until what was laid out is on the disk, too: that takes a processor
        for direction in ("export, cold", "export"):
            found = child("megatron_to_hf", [*back, "--num_output_shards", "100", "--dry-run"])
            print(f"| {name} | {count} | {direction} | " + " | ".join(f"{n:.2f}" for n in found) + " |", flush=True)
        for stale in (source, checkpoint):
            shutil.rmtree(stale)
    return 0


if __name__ == "__main__":
    sys.exit(main())
