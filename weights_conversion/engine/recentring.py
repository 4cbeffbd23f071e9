"""A number added to what rows hold that one side stores around zero and the other around one."""

from __future__ import annotations

import torch
from torch import Tensor

from weights_conversion.engine.streams import Scratch


def recentred(tensors: list[Tensor], by: float, scratch: Scratch) -> list[Tensor]:
    """`tensors` and a number, in float32 (or wider, where they are); whoever writes them rounds them, once."""
    wide = [torch.promote_types(tensor.dtype, torch.float32) for tensor in tensors]
    return [scratch.take(t.shape, dtype).copy_(t).add_(by) for t, dtype in zip(tensors, wide, strict=True)]
