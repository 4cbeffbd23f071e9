"""Converts checkpoints between Hugging Face and Megatron without Megatron, CUDA, or a process group.

The Python API is three functions: hf_to_megatron, megatron_to_hf, verify (api.py, docs/python_api.md).
"""

import sys

# Said in a sentence, before anything that an older one cannot read.
if sys.version_info < (3, 10):  # noqa: UP036
    raise SystemExit(
        f"error: {sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]}, 3.10 or newer is needed; "
        "activate another environment, or make one with 'python3.10 -m venv'"
    )

__version__ = "1.0.0"

from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weights_conversion.api import ConversionError, hf_to_megatron, megatron_to_hf, verify

__all__ = ["ConversionError", "__version__", "hf_to_megatron", "megatron_to_hf", "verify"]


class _Package(ModuleType):
    """The API by name, imported when it is asked for. `verify` is the function, although a module has that name too."""

    def __getattr__(self, name):
        if name in __all__:
            from weights_conversion import api

            return getattr(api, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    @property
    def verify(self):
        from weights_conversion import api

        return api.verify

    @verify.setter
    def verify(self, module):
        """Python's import puts the module of that name here, which sys.modules has all the same."""


sys.modules[__name__].__class__ = _Package
