"""One rank of the real Megatron-LM's pretrain_gpt.py on a CPU: a training step, of which the losses are kept.

    RANK=0 WORLD_SIZE=1 ... python tests/megatron_training.py MEGATRON_LM RESULT FLAG ...

MEGATRON_LM is a folder with pretrain_gpt.py, its builders and megatron/training (megatron/core may be installed
instead). RESULT.RANK.pt gets a dict: `version` of megatron-core, and what this rank has of `tokens`, `labels` [batch,
sequence] and `losses` [batch, sequence]. Nothing of the model's arithmetic is changed: the shims below answer for CUDA
calls alone. FLAGS of these runs beside the tested ones are `ON_CPU`.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import os
import runpy
import shlex
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

ON_CPU = shlex.split(
    "--transformer-impl local --no-persist-layer-norm --distributed-backend gloo --use-cpu-initialization "
    "--no-gradient-accumulation-fusion --no-rope-fusion --no-bias-swiglu-fusion --no-masked-softmax-fusion "
    "--micro-batch-size 1 --global-batch-size 2 --mock-data --split 100,0,0 --num-workers 0 --lr 1e-12 --train-iters 1 "
    "--eval-iters 0 --eval-interval 100 --log-interval 1"
)
CPU: Any = torch.device("cpu")


class OnCpu(TorchFunctionMode):
    """Tensors asked for on a GPU are made on the CPU."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and "cpu" not in str(kwargs["device"]):
            kwargs["device"] = CPU
        if func is torch.Tensor.to and len(args) > 1 and not isinstance(args[1], (torch.dtype, torch.Tensor)):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


class Nothing:
    """A stream or an event, of which nothing is expected."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: 0.0

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *args: Any) -> None:
        pass


class NoKernels(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Older releases compile CUDA kernels here."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == "megatron.legacy.fused_kernels" else None

    def exec_module(self, module: Any) -> None:
        module.load = lambda args: None


def shim_torch() -> None:
    cuda: Any = torch.cuda
    idle = "synchronize empty_cache set_device reset_peak_memory_stats manual_seed manual_seed_all set_stream init"
    for name in idle.split():
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.current_device = lambda: CPU
    cuda.is_available, cuda.is_initialized = lambda: True, lambda: False
    cuda.device_count = lambda: int(os.environ["WORLD_SIZE"])
    cuda.memory_stats = lambda *args, **kwargs: {}
    cuda.get_rng_state = lambda *args, **kwargs: torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = lambda *args, **kwargs: None
    cuda.get_device_capability = lambda *args: (8, 0)
    cuda.get_device_properties = lambda *args: types.SimpleNamespace(
        major=8, minor=0, multi_processor_count=2, total_memory=1 << 34, name="cpu"
    )
    cuda.Stream = cuda.Event = Nothing
    cuda.current_stream = cuda.default_stream = lambda *args: Nothing()
    cuda.stream = lambda *args: contextlib.nullcontext()
    for kind in ("Float", "Int", "Long", "BFloat16", "Byte"):
        setattr(cuda, f"{kind}Tensor", getattr(torch, f"{kind}Tensor"))
    for kind in (torch.Tensor, torch.nn.Module):
        setattr(kind, "cuda", lambda self, *args, **kwargs: self)  # noqa: B010
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    accelerator: Any = torch.accelerator
    accelerator.current_device_index, accelerator.set_device_index = lambda: 0, lambda *args: None
    for check in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        setattr(torch.optim.Optimizer, check, lambda self: None)
    loader, begin = torch.utils.data.DataLoader, torch.utils.data.DataLoader.__init__
    loader.__init__ = lambda self, *args, **kwargs: begin(self, *args, **(kwargs | {"pin_memory": False}))
    kind_of = torch.Tensor.type

    def cuda_type(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = kind_of(self, *args, **kwargs)
        if args or kwargs or found.startswith("torch.cuda."):  # called a second time under a function mode
            return found
        return found.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = cuda_type
    OnCpu().__enter__()


def shim_megatron() -> None:
    from megatron.core.datasets import utils
    from megatron.core.tensor_parallel import random

    @contextlib.contextmanager
    def fork(self: Any, name: str = "") -> Iterator[None]:
        yield

    random.CudaRNGStatesTracker.fork = fork
    random.CudaRNGStatesTracker.add = lambda self, name, seed: None
    random._set_cuda_rng_state = lambda *args, **kwargs: None
    utils.compile_helpers = lambda *args: None  # wheels bring them compiled


def keep_losses(result: str) -> None:
    """What the first micro batch computes, into `result`."""
    import megatron.core
    from megatron.core.models.gpt import GPTModel

    forward = GPTModel.forward
    kept: dict[str, Any] = {"version": megatron.core.__version__}

    def kept_forward(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, input_ids, *args, **kwargs)
        if self.pre_process:
            kept.setdefault("tokens", input_ids.clone())
        if self.post_process:
            kept.setdefault("labels", kwargs["labels"].clone())
            kept.setdefault("losses", output.detach().float().clone())
        torch.save(kept, result)
        return output

    GPTModel.forward = kept_forward


def main(megatron_lm: str, result: str, *flags: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if not hasattr(typing, "override"):
        typing.override = lambda function: function  # type: ignore[attr-defined] releases from 0.17 on ask for 3.12
    torch.set_num_threads(1)
    sys.path.insert(0, megatron_lm)
    sys.meta_path.insert(0, NoKernels())
    shim_torch()
    shim_megatron()
    keep_losses(f"{result}.{os.environ['RANK']}.pt")
    sys.argv = ["pretrain_gpt.py", *flags]
    runpy.run_path(os.path.join(megatron_lm, "pretrain_gpt.py"), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
