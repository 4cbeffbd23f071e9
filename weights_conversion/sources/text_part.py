"""The text model's tensors of a Hugging Face folder that may be a repository with vision.

Names begin with model.language_model. there, or with model. where the text model is alone; wrappers may have taken the
first part off. What is not the text model's stays behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weights_conversion.architectures import FAMILIES
from weights_conversion.layouts.placement import Placed
from weights_conversion.mapping.dialects import HF, HF_OUTSIDE, HF_TEXT, Dialect


@dataclass(frozen=True)
class TextPart:
    """`tensors` of the text model in the names that `dialect` spells; `others` are those that stay behind."""

    tensors: Mapping[str, Placed]
    dialect: Dialect = HF
    others: Mapping[str, Placed] | None = None

    @property
    def notes(self) -> list[str]:
        if not self.others:
            return []
        first = next(iter(self.others))
        return [
            f"vision     {len(self.others)} tensors that are not the text model's stay behind ({first} and so on); "
            "--reference gives them back to an export"
        ]


def text_part(family: str, tensors: Mapping[str, Placed]) -> TextPart:
    outer = FAMILIES[family].outer
    if outer is None:
        return TextPart(tensors)
    inner = outer.prefix.removeprefix("model.")
    if outer.outside and any(name.startswith(f"{inner}model.") for name in tensors):
        others = {name: placed for name, placed in tensors.items() if name.startswith(outer.others)}
        return TextPart({name: each for name, each in tensors.items() if name not in others}, HF_OUTSIDE, others)
    if any(name.startswith(inner) for name in tensors):  # every name began with model., which was taken for a wrapper's
        tensors = {name if _beside(name) else f"model.{name}": placed for name, placed in tensors.items()}
    others = {name: placed for name, placed in tensors.items() if name.startswith(outer.others)}
    text = {name: placed for name, placed in tensors.items() if name not in others}
    alone = not any(name.startswith(outer.prefix) for name in text)
    return TextPart(text, HF_TEXT if alone else HF, others)


def _beside(name: str) -> bool:
    return name.startswith(("mtp.", "lm_head.", "model."))
