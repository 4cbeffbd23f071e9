"""Each kind of line that an import prints starts the real Megatron-LM, which then computes transformers' losses.

MEGATRON_LM names folders (separated as in PATH) that hold pretrain_gpt.py, gpt_builders.py, model_provider.py and
megatron/training of a release; without it these tests are skipped. MEGATRON_CORE_PYTHON is the interpreter, which needs
torch, numpy, einops, packaging, psutil, triton, tensorboard, six, a tokenizer's packages, and megatron-core.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
from megatron_training import ON_CPU

RELEASES = [folder for folder in os.environ.get("MEGATRON_LM", "").split(os.pathsep) if folder]
PYTHON = os.environ.get("MEGATRON_CORE_PYTHON", sys.executable)
DRIVER = Path(__file__).parents[1] / "megatron_training.py"
# Releases from 0.17 on ask for Python 3.12, for this name alone.
OVERRIDE = "import typing; typing.override = getattr(typing, 'override', lambda function: function); "
F32 = torch.float32
TORCH = ("--target", "megatron-core", "--ckpt-format", "torch")
FOUR = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
VIRTUAL = ("--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1)


# 384 rows are a multiple of 64 and of 128, so that no padding row takes part in a loss.
def modern(family: str, **fields: Any) -> tm.Modern:
    return tm.Modern(f"start-{family}", family, layers=4, groups=2, vocab=384, max_positions=64, dtype=F32, **fields)


LLAMA2 = modern("llama2")
LLAMA3 = modern("llama3", theta=500000.0, rope=tm.LLAMA3_ROPE)
QWEN2 = modern("qwen2", model_type="qwen2", eps=1e-6, theta=1e6)
QWEN3 = modern("qwen3", model_type="qwen3", eps=1e-6, theta=1e6)
MISTRAL = tm.Tiny("start-mistral", "mistral", vocab=384, max_positions=64, dtype=F32, groups=2, window=9)
LINEAR = tm.Tiny("start-linear", "llama2", vocab=384, max_positions=64, dtype=F32, groups=2, linear_factor=4.0)
YARN = (("rope_type", "yarn"), ("factor", 4.0), ("original_max_position_embeddings", 16))


@dataclass(frozen=True)
class Start:
    """An import, the processes that its training has, and the first release whose training computes the same."""

    name: str
    model: tm.Tiny
    options: tuple[Any, ...] = ("--target", "megatron-core")
    world: int = 1
    since: tuple[int, int] = (0, 0)
    tolerance: float = 1e-4


STARTS = [
    Start("torch_dist", LLAMA2),
    Start("torch", LLAMA2, TORCH),
    Start("torch TP 2 PP 2", LLAMA2, (*TORCH, *FOUR), world=4),
    Start("torch PP 2 VPP 2", LLAMA2, (*TORCH, *VIRTUAL), world=2),
    Start("torch_dist bf16", LLAMA2, ("--target", "megatron-core", "--dtype", "bfloat16"), tolerance=0.1),
    Start("llama3", LLAMA3),
    Start("llama3 tied TP 2 PP 2", replace(LLAMA3, head_is_embedding=True), (*TORCH, *FOUR), world=4),
    Start("qwen2", QWEN2),
    Start("qwen3", QWEN3),
    Start("qwen3 torch TP 2", QWEN3, (*TORCH, "--tensor-model-parallel-size", 2), world=2),
    Start("qwen3 yarn", replace(QWEN3, rope=YARN), since=(0, 19)),
    Start("mistral", MISTRAL),
    Start("linear", LINEAR, since=(0, 19)),
]


def train(release: str, start: Start, line: list[str], result: Path) -> list[str]:
    """Runs all ranks; what each printed, nothing where they failed.

    The tested flags come first, so that none of ours can hide one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, DRIVER, release, result, *line, *ON_CPU]
    base = os.environ | {
        **{"WORLD_SIZE": str(start.world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **{"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    }
    said = [Path(f"{result}.{rank}.txt") for rank in range(start.world)]
    ranks = []
    for rank, path in enumerate(said):
        with open(path, "wb") as file:
            own = base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, stdout=file, stderr=file, env=own))
    try:
        codes = [rank.wait(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    texts = [path.read_text(errors="replace") for path in said]
    return [] if any(codes) else texts


def release_version(release: str) -> tuple[int, ...]:
    code = "import megatron.core; print(megatron.core.__version__)"
    said = subprocess.run(
        [PYTHON, "-W", "ignore", "-c", OVERRIDE + code],
        env=os.environ | {"PYTHONPATH": release},
        capture_output=True,
        check=True,
        text=True,
    )
    return tuple(int(part) for part in said.stdout.strip().split(".")[:2])


def expected_losses(folder: Path, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Transformers' losses [batch, sequence] in float32."""
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    with torch.no_grad():
        logits = network(tokens).logits
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


@pytest.mark.skipif(not RELEASES, reason="MEGATRON_LM names no folder with pretrain_gpt.py")
@pytest.mark.parametrize("start", STARTS, ids=lambda start: start.name)
@pytest.mark.parametrize("release", RELEASES)
def test_printed_line_starts_training(release: str, start: Start, to_megatron, tmp_path: Path) -> None:
    source = tm.write_huggingface(tmp_path / "hf", start.model)
    arguments = ("--model-path", source, "--out", tmp_path / "out", *start.options)
    said = to_megatron(start.model.family, *arguments, "--make-vocab-size-divisible-by", 64).succeeded()
    (text,) = [text for text in said.out.splitlines() if text.startswith("train with")]
    texts = train(release, start, shlex.split(text.removeprefix("train with")), tmp_path / "result")
    version = release_version(release)
    if version < start.since and not texts:  # flags that this release does not know
        assert "warning" in said.text.lower()
        return
    assert texts, "".join(path.read_text()[-3000:] for path in tmp_path.glob("result.*.txt"))
    assert "successfully loaded checkpoint" in texts[0], texts[0][-3000:]
    assert "could not" not in "".join(texts).lower()
    ranks = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("result.*.pt"))]
    tokens = next(rank["tokens"] for rank in ranks if "tokens" in rank)
    labels, losses = next((rank["labels"], rank["losses"]) for rank in ranks if "losses" in rank)
    error = (losses - expected_losses(source, tokens, labels)).abs().max().item()
    if version < start.since:  # it loads and trains another model, of which the import warns
        assert error > 10 * start.tolerance
        assert "warning" in said.text.lower()
    else:
        assert error < start.tolerance
