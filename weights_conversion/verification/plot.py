"""Where two checkpoints part, to be seen: the error of each layer as a line of text, and as a picture."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio

if TYPE_CHECKING:
    from weights_conversion.verification.report import Verification

_BARS, _PLAIN = "▁▂▃▄▅▆▇█", ".:-=+*%#"  # from 1e-5 of the values' spread and less to 1 and more
_LOWEST = -5


def sparkline(errors: Sequence[float]) -> str:
    """The embedding's error, the layers', and the end's, a character each; in ASCII where stdout takes no other."""
    try:
        _BARS.encode(getattr(sys.stdout, "encoding", None) or "ascii")
        bars = _BARS
    except (UnicodeEncodeError, LookupError):
        bars = _PLAIN
    first, *layers, last = "".join(bars[_height(error)] for error in errors)
    return (
        f"embedding {first} layers {''.join(layers)} end {last}   "
        f"({bars[0]} rounding, {bars[-1]} the values' own size; layers 0 to {len(layers) - 1})"
    )


def _height(error: float) -> int:
    if error <= 10.0**_LOWEST:
        return 0
    return min(max(round((len(_BARS) - 1) * (1 - math.log10(error) / _LOWEST)), 1), len(_BARS) - 1)


def check(file: Path) -> None:
    """Raises ConversionError, before the work, where no picture could be drawn into `file`."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConversionError(f"--plot needs matplotlib: '{sys.executable} -m pip install matplotlib', or leave it out")
    if file.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ConversionError(f"--plot {file} is not named as a picture; end its name in .png, .pdf or .svg")
    if not fileio.is_folder(file.absolute().parent):
        raise ConversionError(f"--plot {file}: its folder does not exist")
    if os.path.lexists(file) and (fileio.is_link(file) or not fileio.is_file(file)):
        raise ConversionError(f"--plot {file} is a link or no regular file; name a new file")


def draw(found: Verification, file: Path) -> None:
    """The error of each layer in the forward pass, and the share of each layer's weights that differ."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    layers = found.source.config.num_layers
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 5), layout="constrained")
    if found.numeric is not None and found.numeric.errors:
        places = [-1, *range(layers), layers]
        above.bar(places, [max(error, 1e-8) for error in found.numeric.errors])
    above.set_yscale("log")
    above.set_ylim(1e-8, None)
    above.set_ylabel("error / spread")
    differing = dict.fromkeys([-1, *range(layers), layers], 0)
    for difference in found.exact.differences if found.exact else ():
        at = difference.layer if difference.layer is not None else -1 if "embed" in difference.tensor else layers
        differing[at] += difference.values
    below.bar(list(differing), list(differing.values()))
    below.set_ylabel("weights that differ")
    below.set_xlabel("layer (-1: embedding; last: behind the layers)")
    figure.suptitle(f"{found.source.path} and {found.checkpoint.path}: {found.verdict}", fontsize=9)
    figure.savefig(file)
    pyplot.close(figure)
