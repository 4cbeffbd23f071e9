"""Converts mutated inputs: `python -m tests.robustness.fuzz --inputs 5000 --seed 0`.

Each input is a tiny checkpoint of one of 24 kinds: HF safetensors, HF .bin, Meta, Megatron's rank files, torch_dist,
torch_dcp, fsdp_dtensor, Megatron-Bridge's with run_config.yaml, adapters of Megatron-Bridge and of peft, experts in
rank files and in safetensors, fp8 in blocks, rows and whole tensors, MXFP4, and GPT-OSS, latent attention, state spaces
and gated deltas both ways. It is changed by one to three mutations of a header, index, config, pickle, tracker, archive
or rank folder, and converted in a forked child with a bound on time and memory. Two ends are right:
exit 0 with the weights that the input holds, as others read them; or exit 1 with sentences. A traceback, any other
exit, a hang, an allocation beyond the bound: a finding.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from tests.robustness import borrowed, made
from tests.robustness.mutations import BINARY, bytes_of, edit_args, mutate_json, mutate_ranks, mutate_tracker
from tests.robustness.oracle import MODEL, compare
from tests.robustness.sources import tm

SECONDS = 20
MEMORY = 1 << 30  # beyond what the parent has mapped already
KINDS = ("safetensors", "bin", "meta", "megatron", "torch_dist")


class Kind:
    """A sort of input: how it is made, mutated, converted, and read by others."""

    def __init__(self, name: str, base: Path, lent: borrowed.Borrowed | None = None) -> None:
        self.name, self.base, self.lent = name, base, lent
        self.export = name in ("megatron", "torch_dist")

    def line(self, folder: Path, out: Path) -> list[str]:
        if self.lent is not None:
            return self.lent.line(folder, out)
        if self.export:
            return ["megatron_to_hf", "--input_dir", str(folder), "--output_dir", str(out), "--no_tokenizer"]
        where = "--cache-dir" if self.name == "meta" else "--model-path"
        return ["hf_to_megatron", "llama2", where, str(folder), "--out", str(out)]

    def mutate(self, rng: random.Random, folder: Path) -> str:
        """Changes the copy in `folder`; returns what was changed, for people."""
        done = []
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            path = rng.choice([path for path in files if (path.suffix or path.name) in BINARY] + files)
            done.append(path.name)
            if self.name == "megatron" and rng.random() < 0.4:
                kind = rng.randrange(3)
                done[-1] = ("tracker", "ranks", "args")[kind]
                if kind == 0:
                    mutate_tracker(rng, folder / "latest_checkpointed_iteration.txt")
                elif kind == 1 and any((folder / "release").glob("mp_rank_*/model_optim_rng.pt")):
                    mutate_ranks(rng, folder / "release")
                else:
                    for file in folder.rglob("model_optim_rng.pt"):
                        try:
                            edit_args(random.Random(rng.randrange(4)), file)
                        except Exception:
                            continue
                        if rng.random() < 0.5:
                            break
            elif (path.suffix or path.name) in BINARY or path.suffix == ".json":
                change = mutate_json if path.suffix == ".json" else BINARY[path.suffix or path.name]
                try:
                    change(rng, path)
                except Exception:  # what an earlier mutation left cannot be taken apart
                    path.write_bytes(bytes_of(rng, path.read_bytes()))
            elif path.suffix == ".yaml":
                borrowed.mutate_yaml(rng, path)
            elif path.name.endswith(".txt"):
                mutate_tracker(rng, path)
            else:
                path.write_bytes(bytes_of(rng, path.read_bytes()))
        return ", ".join(done)


def write_kinds(root: Path) -> list[Kind]:
    tm.write_huggingface(root / "safetensors", MODEL, parts=2)
    tm.write_huggingface(root / "bin", MODEL, parts=2, kind="bin", tokenizer=False)
    tm.write_meta(root / "meta", MODEL, 2)
    main = importlib.import_module("hf_to_megatron").main
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        code = main(
            ["llama2", "--model-path", str(root / "safetensors"), "--out", str(root / "megatron"),
             "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
        )  # fmt: skip
        code += main(
            ["llama2", "--model-path", str(root / "safetensors"), "--out", str(root / "torch_dist"),
             "--target", "megatron-core"]
        )  # fmt: skip
        # Everything that a conversion imports is there before the forks.
        export = ["--input_dir", str(root / "megatron"), "--output_dir", str(root / "hf"), "--no_tokenizer"]
        code += importlib.import_module("megatron_to_hf").main(export)
    if code:
        raise RuntimeError("the inputs themselves do not convert")
    lent = borrowed.write(root) + made.write(root)
    return [Kind(name, root / name) for name in KINDS] + [Kind(other.name, other.folder, other) for other in lent]


# --- running ----------------------------------------------------------------------------------------------------------


def mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def convert(line: list[str], log: Path) -> tuple[int, str]:
    """Runs one conversion in a bounded child; its exit (negative: by a signal) and what it said."""
    child = os.fork()
    if not child:
        code = 71
        try:
            limit = mapped() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
                try:
                    code = importlib.import_module(line[0]).main(line[1:])
                except BaseException:
                    import traceback

                    traceback.print_exc(file=file)
        finally:
            os._exit(code)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGALRM, log.read_text(errors="replace")


def judge(kind: Kind, folder: Path, out: Path, code: int, said: str) -> str | None:
    """What is wrong with this end, or None."""
    if code not in (0, 1):
        return f"exit {code}"
    if "Traceback" in said:
        return "traceback"
    if code == 1:
        if out.exists():
            return "refused, but OUT is there"
        if not said.strip() or "error: " not in said:
            return "exit 1 without a sentence"
        if "not enough memory" in said:
            return "runaway allocation"
        return None
    return None


class Fuzzer:
    """Runs inputs below `root`; findings are copied to `keep`."""

    def __init__(self, root: Path, keep: Path | None, wanted: str = "") -> None:
        self.root, self.keep = root, keep
        self.kinds = [kind for kind in write_kinds(root) if kind.name.startswith(wanted)]
        self.counts: Counter[str] = Counter()
        self.findings: list[str] = []
        for kind in self.kinds:
            code, said = convert(kind.line(kind.base, root / f"reference-{kind.name}"), root / "log")
            if code:
                raise RuntimeError(said)

    def run(self, number: int, seed: int) -> None:
        rng = random.Random(f"{seed}/{number}")
        kind = self.kinds[number % len(self.kinds)]
        folder, out = self.root / "input", self.root / "out"
        for path in (folder, out, out.with_name("out.partial")):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(kind.base, folder)
        what = kind.mutate(rng, folder)
        code, said = convert(kind.line(folder, out), self.root / "log")
        wrong = judge(kind, folder, out, code, said)
        if wrong is None and code == 0:
            reference = self.root / f"reference-{kind.name}"
            if kind.lent is None:
                wrong = compare(kind.name, folder, out, reference)
            else:
                wrong = borrowed.compare(kind.lent, folder, out, reference)
        self.counts["converted" if code == 0 else "refused"] += 1
        if wrong:
            sys.stderr.write(f"{kind.name} {number} ({what}): {wrong}\n")
            self.findings.append(f"{kind.name} {number} ({what}): {wrong}\n{said[-1500:]}")
            if self.keep:
                shutil.copytree(folder, self.keep / f"{kind.name}-{seed}-{number}", dirs_exist_ok=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input, to repeat one")
    parser.add_argument("--kind", default="", help="only inputs whose kind begins so")
    parser.add_argument("--keep", type=Path, help="where to keep inputs that were findings")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), options.keep, options.kind)
        began = time.monotonic()
        for number in range(options.first, options.first + options.inputs):
            fuzzer.run(number, options.seed)
            if number % 100 == 99:
                seconds = time.monotonic() - began
                sys.stderr.write(f"{number + 1} inputs, {len(fuzzer.findings)} findings, {seconds:.0f} s\n")
    sys.stdout.write("\n\n".join(fuzzer.findings) + "\n" if fuzzer.findings else "")
    ends = ", ".join(f"{count} {end}" for end, count in fuzzer.counts.most_common())
    sys.stdout.write(f"{options.inputs} inputs: {ends}; {len(fuzzer.findings)} findings\n")
    return 1 if fuzzer.findings else 0


if __name__ == "__main__":
    sys.exit(main())
