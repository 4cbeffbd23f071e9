"""Scales of quantised tensors, looked at before anything is written, as far as that costs little.

All of them are looked at again while the tensors are read (layouts/decoding.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from weights_conversion.engine.execute import read_rows
from weights_conversion.engine.streams import Scratch, Source
from weights_conversion.errors import ConversionError
from weights_conversion.layouts.decoding import BlockScaled, Mxfp4
from weights_conversion.layouts.placement import Placed, whole

_MOST = 4096  # tensors, each a read of its own: a second or a few on a filesystem that many share
_MOST_BYTES = 64 << 20  # of one tensor's scales


def check(tensors: Mapping[str, Placed]) -> None:
    """Raises ConversionError, with all that is wrong, for scales that are no positive numbers. Reads data."""
    decoders = (block.ref.decoder for placed in tensors.values() for copy in placed.copies for block in copy)
    scaled = (each for each in decoders if isinstance(each, (BlockScaled, Mxfp4)) and each.scales.nbytes <= _MOST_BYTES)
    source, scratch, problems = Source(), Scratch(), []
    try:
        for decoder in itertools.islice(scaled, _MOST):
            try:
                decoder.check_scales(read_rows(whole(decoder.scales), (0, decoder.scales.shape[0]), source, scratch))
            except ConversionError as error:
                problems += error.problems
            scratch.reset()
    finally:
        source.close()
    if problems:
        raise ConversionError(*problems)
