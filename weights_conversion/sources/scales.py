"""Scales of quantised tensors, looked at before anything is written, as far as that costs little.

All of them are looked at again while the tensors are read (layouts/decoding.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace

from weights_conversion.engine.execute import read_rows
from weights_conversion.engine.streams import Scratch, Source
from weights_conversion.errors import ConversionError
from weights_conversion.layouts.decoding import BlockScaled, Mxfp4
from weights_conversion.layouts.placement import Placed, TensorRef, whole
from weights_conversion.mapping.ops import Range

_MOST = 4096  # tensors, each a read of its own: a second or a few on a filesystem that many share
_MOST_BYTES = 64 << 20  # of one tensor's scales
_STRIP_BYTES = 16 << 20  # of values that are read for scales of 0


def check(tensors: Mapping[str, Placed]) -> None:
    """Raises ConversionError, with all that is wrong, for scales that are no positive numbers. Reads data.

    Where a scale is 0, its values are read too: they must be 0.
    """
    refs = (block.ref for placed in tensors.values() for copy in placed.copies for block in copy)
    decoded = ((ref, ref.decoder) for ref in refs if isinstance(ref.decoder, (BlockScaled, Mxfp4)))
    few = ((ref, decoder) for ref, decoder in decoded if decoder.scales.nbytes <= _MOST_BYTES)
    source, scratch, problems = Source(), Scratch(), []
    try:
        for ref, decoder in itertools.islice(few, _MOST):
            try:
                scales = read_rows(whole(decoder.scales), (0, decoder.scales.shape[0]), source, scratch)
                decoder.check_scales(scales)
                if isinstance(decoder, BlockScaled):
                    _read_values(ref, decoder.zeroed(scales), source, scratch)
            except ConversionError as error:
                problems += error.problems
            scratch.reset()
    finally:
        source.close()
    if problems:
        raise ConversionError(*problems)


def _read_values(ref: TensorRef, ranges: Iterable[Range], source: Source, scratch: Scratch) -> None:
    """Decodes ranges of a tensor's rows, which its decoder checks."""
    width = ref.shape[-1]
    placed = whole(replace(ref, shape=(ref.numel // width, width)))  # a decoder's rows: of all experts
    step = max(_STRIP_BYTES // (placed.columns * ref.dtype.itemsize), 1)
    for first, last in ranges:
        for start in range(first, last, step):
            scratch.reset()
            read_rows(placed, (start, min(start + step, last)), source, scratch)
