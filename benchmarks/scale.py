#!/usr/bin/env python
"""How a conversion scales with ranks, and how well `--dry-run --ranks` predicts it.

Makes a random Hugging Face model of --gigabytes, measures an import (TP 1: all ranks write one file) under torchrun, or
as srun would start it, with 1, 2 and 4 ranks of one worker each, once as fast as the disk goes and once with a cap on
the bandwidth that all ranks share, and compares each time with the scale model

    seconds = start-up + bytes / min(ranks x one rank's rate, bandwidth)

whose figures are: start-up, the time of a dry run on as many ranks; the rate, from the report of the one-rank run; the
bandwidth, the cap, or what one process with as many threads as ranks copies in the same way (read, CRC, direct write).
Prints a table in Markdown. Everything it writes is below --folder and is deleted afterwards.

    python benchmarks/scale.py --folder bench --gigabytes 1.5 --cap 0.4
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))


def make_model(folder: Path, gigabytes: float) -> int:
    """A llama of random bfloat16 weights in one safetensors file; returns its bytes of weights."""
    import torch
    from safetensors.torch import save_file

    hidden, ffn, heads, vocabulary = 2048, 5632, 16, 32000
    layer = 4 * hidden * hidden + 3 * hidden * ffn + 2 * hidden
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * vocabulary * hidden) / layer))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": vocabulary,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads, "rms_norm_eps": 1e-5,
        "num_key_value_heads": heads, "max_position_embeddings": 4096, "hidden_act": "silu", "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (vocabulary, hidden)
    for number in range(layers):
        prefix = f"model.layers.{number}"
        for name in "qkvo":
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, ffn)
        shapes |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    noise = torch.randint(0, 1 << 14, (ffn * hidden + vocabulary * hidden,), dtype=torch.int16).view(torch.bfloat16)
    tensors = {name: noise[7 * i : 7 * i + rows[0] * (rows[1] if len(rows) > 1 else 1)].reshape(rows).clone()
               for i, (name, rows) in enumerate(shapes.items())}  # fmt: skip
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def launch(launcher: str, ranks: int, line: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """The processes to start, each with what it adds to the environment. `srun`: what SLURM would start and set."""
    if ranks == 1:
        return [([sys.executable, *line], {})]
    if launcher == "torchrun":
        return [([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *line], {})]
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(ranks),
            "SLURM_STEP_NODELIST": "localhost"}  # fmt: skip
    return [([sys.executable, *line], step | {"SLURM_PROCID": str(rank)}) for rank in range(ranks)]


def convert(
    launcher: str, model: Path, out: Path, ranks: int, *options: str, environment: Mapping[str, str] = os.environ
) -> tuple[float, float, float]:
    """(wall seconds, converting seconds, highest peak GB of a process) of one import; OUT is deleted."""
    os.sync()
    script = str(REPOSITORY / "hf_to_megatron.py")
    line = [script, "llama2", "--model-path", str(model), "--out", str(out), "--workers", "1", *options]
    begin = time.monotonic()
    started = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**environment, "OMP_NUM_THREADS": "1", **further},
        )
        for command, further in launch(launcher, ranks, line)
    ]  # fmt: skip
    ended = [os.wait4(process.pid, 0) for process in started]  # what they say fits a pipe
    wall = time.monotonic() - begin
    said = [process.stdout.read() for process in started if process.stdout]
    if any(status for _, status, _ in ended):
        raise SystemExit("\n".join(said))
    shutil.rmtree(out, ignore_errors=True)
    found = re.search(r"in ([\d.]+) s, [\d.]+ GB/s", said[0])
    peak = max(usage.ru_maxrss for _, _, usage in ended) * 1024 / 1e9
    return wall, float(found[1]) if found else 0.0, peak


def copy_rate(source: Path, target: Path, threads: int) -> float:
    """bytes/s of reading, summing and directly writing a file, as a conversion does, but without converting."""
    import mmap
    import zlib

    size, block = source.stat().st_size // 4096 * 4096, 32 << 20
    with target.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    reading = os.open(source, os.O_RDONLY)
    writing = os.open(target, os.O_WRONLY | getattr(os, "O_DIRECT", 0))

    def part(start: int) -> None:
        with mmap.mmap(-1, block) as buffer:
            view = memoryview(buffer)[: min(block, size - start)]
            os.preadv(reading, [view], start)
            zlib.crc32(view)
            os.pwrite(writing, view, start)
            view.release()

    begin = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, range(0, size, block)))
    os.fsync(writing)
    rate = size / (time.monotonic() - begin)
    os.close(reading)
    os.close(writing)
    target.unlink()
    return rate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to work; it must not exist yet")
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--cap", type=float, default=0.4, help="GB/s that all ranks share in the second part")
    parser.add_argument("--repeat", type=int, default=2, help="runs of each kind, of which the fastest counts")
    parser.add_argument("--launcher", choices=("torchrun", "srun"), default="torchrun")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    from benchmarks import slow
    from weights_conversion.engine.prediction import predicted_seconds

    model, out = args.folder / "model", args.folder / "out"
    try:
        with ProcessPoolExecutor(1) as pool:  # a process counts its parent's memory at its start as its own peak
            nbytes = pool.submit(make_model, model, args.gigabytes).result()
        capped = slow.Library(args.folder)
        start_up = {
            ranks: min(convert(args.launcher, model, out, ranks, "--dry-run")[0] for _ in range(args.repeat))
            for ranks in args.ranks
        }
        weights, copy = model / "model.safetensors", args.folder / "copy"
        bandwidth = max(copy_rate(weights, copy, threads) for threads in args.ranks for _ in range(args.repeat))
        print(f"{nbytes / 1e9:.2f} GB, {os.cpu_count()} cores, copy {bandwidth / 1e9:.2f} GB/s\n")
        print("| GB/s at most | ranks | start-up s | converting s | measured s | predicted s | ratio | peak GB |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        rate = 0.0
        for is_capped, limit in ((False, bandwidth), (True, args.cap * 1e9)):
            for ranks in args.ranks:
                runs = []
                for _ in range(args.repeat):
                    environment = capped.environment(slow.Slow(rate=limit)) if is_capped else os.environ
                    runs.append(convert(args.launcher, model, out, ranks, environment=environment))
                wall, inside, peak = min(runs)
                if ranks == args.ranks[0] and not is_capped:
                    rate = nbytes / max(inside, wall - start_up[ranks]) / ranks
                predicted = predicted_seconds(nbytes, ranks, rate, limit, start_up[ranks])
                print(
                    f"| {limit / 1e9:.2f}{' (cap)' if is_capped else ''} | {ranks} | {start_up[ranks]:.1f} "
                    f"| {inside:.1f} | {wall:.1f} | {predicted:.1f} | {wall / predicted:.2f} | {peak:.2f} |",
                    flush=True,
                )
        print(f"\none rank converts {rate / 1e9:.2f} GB/s (one thread)")
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
