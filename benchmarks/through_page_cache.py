"""One of the two scripts with direct writes off: `python -m benchmarks.through_page_cache hf_to_megatron llama2 ...`.

It shows what a conversion costs on a filesystem that refuses O_DIRECT. The scripts have no option for that, since they
find it out by themselves.
"""

from __future__ import annotations

import functools
import importlib
import sys

from weights_conversion.engine import run as convert
from weights_conversion.engine.streams import Target

if __name__ == "__main__":
    script, *arguments = sys.argv[1:]
    convert.Target = functools.partial(Target, direct=False)  # pyright: ignore[reportAttributeAccessIssue]
    sys.exit(importlib.import_module(script).main(arguments))
