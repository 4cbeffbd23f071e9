"""Converts checkpoints between Hugging Face and Megatron without Megatron, CUDA, or a process group."""

import sys

# Said in a sentence, before anything that an older one cannot read.
if sys.version_info < (3, 10):  # noqa: UP036
    raise SystemExit(
        f"error: {sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]}, 3.10 or newer is needed; "
        "activate another environment, or make one with 'python3.10 -m venv'"
    )

__version__ = "1.0.0"
