"""The real Megatron-LM's args, builder and checkpoint code on a CPU, in processes of its own: a run, up to its logits.

    python tests/megatron_stock.py JOBS.json

JOBS.json is a list of {"flags": [...], "out": FILE, "tp": 1, "ep": 1, "rows": N, "tokens": [...]}. `flags` are what an
import prints ("train with"); they are parsed by Megatron-LM's own parser, its load_args_from_checkpoint restores what
it restores, its builder makes the model, and its load_checkpoint fills every parameter. FILE gets {"logits": float32,
"logits64": float64 throughout, with "double"}. With "save" the model is saved there by its save_checkpoint. "may_stop":
an error is a result. Transformer Engine, fla and mamba_ssm are stood in for; nothing of the package under test is
imported. Needs megatron.training of 0.19.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import sys
import types
from argparse import Namespace
from typing import Any

import delta_stand_in
import mamba_stand_in
import te_stand_in

te_stand_in.install()
mamba_stand_in.install()
delta_stand_in.install()

import megatron_starts  # noqa: E402
import torch  # noqa: E402
from doubled import doubled, widen  # noqa: E402

Job = dict[str, Any]
# What decides nothing of the model: kernels that only a GPU has, and what a start asks for.
ON_CPU = shlex.split(
    "--use-cpu-initialization --no-gradient-accumulation-fusion --no-rope-fusion --no-bias-swiglu-fusion "
    "--no-masked-softmax-fusion --transformer-impl transformer_engine --micro-batch-size 1 --global-batch-size 8 "
    "--distributed-backend gloo --lr 1e-4 --train-iters 100 --save-interval 50 --no-save-optim --no-save-rng "
    "--seq-length 32 --tokenizer-type NullTokenizer --vocab-size 64"
)


def on_cpu(make: Any, *args: Any, **kwargs: Any) -> Any:
    return make(*args, **(kwargs | {"device": "cpu"} if "cuda" in str(kwargs.get("device")) else kwargs))


@functools.cache
def shims() -> None:
    """The places where Megatron's training reaches for a GPU on these paths, beside those of megatron_core.py."""
    cuda: Any = torch.cuda
    for name in ("empty_cache", "set_device"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.get_device_capability = lambda *args: (9, 0)
    cuda.get_device_properties = lambda *args: types.SimpleNamespace(major=9, minor=0, total_memory=1 << 34)
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.device_count = lambda: 1
    cuda.default_stream = torch.cuda.current_stream
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, lambda *args: 0)
    setattr(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)  # noqa: B010
    for name in ("empty", "zeros", "tensor", "arange", "full"):
        setattr(torch, name, functools.partial(on_cpu, getattr(torch, name)))


def parse(job: Job) -> Namespace:
    from megatron.core.rerun_state_machine import initialize_rerun_state_machine
    from megatron.training import global_vars
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.checkpointing import load_args_from_checkpoint

    world = str(torch.distributed.get_world_size())
    os.environ.update(WORLD_SIZE=world, RANK=str(torch.distributed.get_rank()), LOCAL_RANK="0")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    sizes = ["--tensor-model-parallel-size", job["tp"], "--expert-model-parallel-size", job["ep"]]
    sys.argv = ["pretrain.py", *map(str, [*job["flags"], *ON_CPU, *sizes, *job.get("more", ())])]
    args = parse_args()
    load_args_from_checkpoint(args)
    validate_args(args, {})
    args.padded_vocab_size = job["rows"]
    global_vars._GLOBAL_ARGS = None
    global_vars.set_args(args)
    with contextlib.suppress(Exception):
        initialize_rerun_state_machine()
    return args


def predict_beside_gated_delta() -> None:
    """pretrain_gpt.py of 0.19 refuses a prediction layer there, gpt_builders.py makes it as is done here."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.training.models import gpt

    gpt.mtp_block_spec = lambda config, spec, **_: get_gpt_mtp_block_spec(config.transformer, spec, True)


def build(args: Namespace, dtype: torch.dtype) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import argument_utils

    if args.experimental_attention_variant and args.mtp_num_layers:
        predict_beside_gated_delta()

    args.params_dtype, args.bf16 = dtype, dtype is torch.bfloat16
    hybrid = bool(args.hybrid_layer_pattern)
    config = (argument_utils.hybrid_config_from_args if hybrid else argument_utils.gpt_config_from_args)(args)
    model = config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups(), True, True)
    model = model.to(dtype).eval()
    for module in model.modules():
        if hasattr(module, "_maintain_float32_expert_bias"):
            module._maintain_float32_expert_bias()
    return model


def act(job: Job) -> None:
    from megatron.training import checkpointing

    shims()
    checkpointing.update_num_microbatches = lambda *args, **kwargs: None  # there is no batch
    args = parse(job)
    model = build(args, torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    checkpointing.load_checkpoint([model], None, None)
    left = [name for name, each in model.named_parameters() if each.isnan().any()]
    assert not left, left
    tokens = torch.tensor(job["tokens"])[None]
    exact = build(args, torch.float32)
    exact.load_state_dict(model.state_dict(), strict=False)
    found = forward(exact, tokens)
    if job.get("double"):
        with doubled():  # angles of rotary embeddings are computed as it is built
            exact = build(args, torch.float64)
            exact.load_state_dict(model.state_dict(), strict=False)
            found["logits64"] = forward(widen(exact), tokens)["logits"]
    if torch.distributed.get_rank() == 0:
        torch.save(found, job["out"])
    if "save" in job:
        args.params_dtype, args.bf16, args.save = torch.bfloat16, True, job["save"]
        checkpointing.save_checkpoint(5, [model], None, None, 0)


@torch.no_grad()
def forward(model: Any, tokens: torch.Tensor) -> dict[str, Any]:
    """Logits (length, rows); the outputs of prediction layers, (length, hidden) each."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    heads: list[torch.Tensor] = []
    further: list[torch.Tensor] = []
    # The loss, which a model with prediction layers computes, changes logits in place.
    hooks = [model.output_layer.register_forward_hook(lambda module, given, made: heads.append(made[0].clone()))]
    if getattr(model, "mtp_process", False):
        hooks.append(model.mtp.register_forward_hook(lambda module, given, made: further.append(made)))
    length = tokens.shape[1]
    mask = torch.ones(1, 1, length, length).triu(diagonal=1).bool()
    model(tokens, torch.arange(length)[None], mask)
    for hook in hooks:
        hook.remove()
    logits = gather_from_tensor_model_parallel_region(heads[-1])[:, 0].clone()
    layers = model.config.mtp_num_layers or 0
    predicted = [part[:, 0].clone() for part in further[0].chunk(1 + layers)[1:]] if further else []
    return {"logits": logits, "predicted": predicted}


if __name__ == "__main__":
    sys.exit(megatron_starts.many_processes(__file__, 2, act))
