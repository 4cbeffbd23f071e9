"""What every part of the forward pass is made of: norms and products with stored matrices, asked for block by block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from weights_conversion.config import ModelConfig
from weights_conversion.errors import ConversionError
from weights_conversion.verification.conventions import Convention, block_of

Weights = Callable[[str, slice | None], Tensor]
"""(full stored name, rows) -> those rows of the full, unsharded tensor in its stored dtype; None asks for all rows.

Matrices are asked for in consecutive row ranges with both ends given, by several threads at a time; norms and biases
are asked for whole.
"""

BLOCK_ELEMENTS = 1 << 22
"""Weights that are asked for at one time: 8 MiB of bfloat16."""
CACHED_ELEMENTS = 1 << 19
"""Weights that are held in float32 at one time: they and their product stay in a cache."""
ONEDNN_ELEMENTS = 1 << 16
"""Of a matrix that oneDNN multiplies."""


def mlp(config: ModelConfig, convention: Convention, weights: Weights, prefix: str, x: Tensor) -> Tensor:
    names = convention.names_for(config)
    inner = within(config, convention, weights, [prefix + name for name in names.mlp_in], x, config.ffn_hidden_size)
    return linear(weights, prefix + names.mlp_out, inner, 0, config.hidden_size)


def within(
    config: ModelConfig, convention: Convention, weights: Weights, names: list[str], x: Tensor, ffn: int
) -> Tensor:
    """What stands between the matrices of an MLP, or of an expert, of `ffn` rows."""
    block = block_of(config)
    if block.gated:
        return gated(convention, weights, names, x, ffn, block.activation)
    projected = linear(weights, names[0], x, 0, ffn)
    return F.relu(projected).square() if block.activation == "relu2" else F.gelu(projected)


def gated(
    convention: Convention, weights: Weights, inner: list[str], x: Tensor, ffn: int, activation: str = ""
) -> Tensor:
    """silu(gate) * up of `ffn` rows each, of two matrices or of one that holds both; or gelu_tanh(gate) * up."""
    gate, up = halves(convention, weights, inner, x, ffn)
    return (F.gelu(gate, approximate="tanh") if activation == "gelu_tanh" else F.silu(gate)) * up


def halves(convention: Convention, weights: Weights, inner: list[str], x: Tensor, ffn: int) -> tuple[Tensor, Tensor]:
    """x times gate, and times up."""
    # Fused: the second half begins at row ffn of the same matrix.
    start = ffn if len(inner) == 1 else 0
    first, second = linear(weights, inner[0], x, 0, ffn), linear(weights, inner[-1], x, start, start + ffn)
    return (first, second) if convention.gate_first else (second, first)


def norm(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    if not block_of(config).layer_norm:
        return rms(config, weights, name, x)
    size = config.hidden_size
    weight, bias = vector(weights, name, size), vector(weights, name.removesuffix("weight") + "bias", size)
    return F.layer_norm(x, (size,), weight, bias, config.layernorm_epsilon)


def rms(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    weight = vector(weights, name, x.shape[-1]) + float(config.layernorm_zero_centered_gamma)
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.layernorm_epsilon))


def vector(weights: Weights, name: str, size: int) -> Tensor:
    return _checked(weights(name, None), name, (size,))


_pool: ContextVar[tuple[ThreadPoolExecutor, int] | None] = ContextVar("pool", default=None)


@contextmanager
def threads(workers: int) -> Iterator[None]:
    """Within the block, products are shared among so many threads: while one reads, the others compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's own threads would wait for each other at every block
    # Each thread has its own number of threads, by which oneDNN goes.
    with ThreadPoolExecutor(workers, "forward", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        token = _pool.set((pool, workers))
        try:
            yield
        finally:
            _pool.reset(token)
            torch.set_num_threads(before)


def linear(weights: Weights, name: str, x: Tensor, start: int, stop: int) -> Tensor:
    """x (.., columns) times rows [start, stop) of a matrix, in blocks: a large matrix is never whole in float32.

    Under `threads` the blocks are asked for by several threads, in no order.
    """
    columns = x.shape[-1]
    tokens = x.reshape(-1, columns).contiguous()
    out = x.new_empty(tokens.shape[0], stop - start)
    pool, workers = _pool.get() or (None, 1)
    inference = torch.is_inference_mode_enabled()
    step = max(1, BLOCK_ELEMENTS // columns)
    if pool is not None and (stop - start) * columns >= 2 * CACHED_ELEMENTS:
        step = min(step, -(-(stop - start) // workers))

    def block(begin: int) -> None:
        end = min(begin + step, stop)
        with torch.inference_mode(inference):  # which each thread has for itself
            stored = weights(name, slice(begin, end))
            _product(stored, f"{name}, rows {begin} to {end},", tokens, out[:, begin - start : end - start])

    begins = range(start, stop, step)
    if pool is None or len(begins) == 1:
        for begin in begins:
            block(begin)
    else:
        for _ in pool.map(block, begins):
            pass
    return out.reshape(*x.shape[:-1], stop - start)


def _product(stored: Tensor, name: str, tokens: Tensor, out: Tensor) -> None:
    """`tokens` (tokens, columns) times `stored` rows, in float32, into `out` (tokens, rows)."""
    rows, columns = out.shape[1], tokens.shape[1]
    _checked_shape(stored, name, (rows, columns))
    step = max(1, CACHED_ELEMENTS // columns)
    # Which rounds twice as much, and gains nothing with small ones.
    multiply = _multiply() if tokens.dtype == torch.float32 and rows * columns >= ONEDNN_ELEMENTS else _by_torch
    wide = torch.empty(min(step, rows), columns)
    for first in range(0, rows, step):
        part = stored[first : first + step]
        out[:, first : first + len(part)] = multiply(tokens, wide[: len(part)].copy_(part))


@functools.cache
def _multiply() -> Callable[[Tensor, Tensor], Tensor]:
    """Of float32 matrices (tokens, columns) and (rows, columns) the product (tokens, rows).

    By oneDNN where torch has it: it uses the whole width of a processor whose BLAS, here MKL on AMD's, uses half. It
    is tried first, and what it is not there for, or not exact to float32, is left to torch's own product.
    """
    generator = torch.Generator().manual_seed(0)
    x, matrix = (torch.randn(size, 256, generator=generator) for size in (24, 32))
    wanted = x.double() @ matrix.double().t()
    try:
        found = _by_onednn(x, matrix)
    except (AttributeError, RuntimeError):
        return _by_torch
    exact = found.dtype == torch.float32 and torch.allclose(found.double(), wanted, rtol=0, atol=1e-4)
    return _by_onednn if exact else _by_torch


def _by_onednn(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")


def _by_torch(x: Tensor, matrix: Tensor) -> Tensor:
    return x @ matrix.t()


def rows_of(weights: Weights, name: str, start: int, stop: int, columns: int) -> Tensor:
    return _checked(weights(name, slice(start, stop)), f"{name}, rows {start} to {stop},", (stop - start, columns))


def _checked(tensor: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    _checked_shape(tensor, name, shape)
    return tensor.detach().float()


def _checked_shape(tensor: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ConversionError(
            f"{name} has shape {tuple(tensor.shape)} where the model's config asks for {shape}; "
            "the config and the weights are of two models."
        )
