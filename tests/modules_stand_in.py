"""Modules that are not installed, put in place of those that megatron-core imports."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any


def install(
    contents: Mapping[str, Mapping[str, Any]], make: Callable[[str], types.ModuleType] = types.ModuleType
) -> None:
    """Each name of `contents` is a package with these attributes; one comes after the package that it is in."""
    for name, values in contents.items():
        module = make(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        module.__dict__.update(values)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
