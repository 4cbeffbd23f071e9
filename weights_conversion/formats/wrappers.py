"""Names of tensors that a wrapper around the model has lengthened: what it added changes nothing and is taken off."""

from __future__ import annotations

import re
from collections.abc import Iterable

# In front of every name: DistributedDataParallel, torch.compile, peft (without adapters), a dict around the weights.
_PREFIXES = ("module.", "_orig_mod.", "model.module.", "base_model.model.", "state_dict.", "model_state_dict.")
# Between the parts of a name: torch.compile, FSDP and activation checkpointing around a layer.
_BETWEEN = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# The model as the field `model` of something, which a Hugging Face model's own `model.` is not.
_FIELD = re.compile(r"model\.(model|decoder|embedding|language_model)\.")
_LORA = re.compile(r"\.(lora_|base_layer\.|adapter\.)")


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Each of `names` -> the model's own name of it; the same where nothing was added, or not to all of them."""
    given = list(names)
    if any(_LORA.search(name) for name in given):  # adapters are for the reader to refuse
        return {name: name for name in given}
    plain = [_BETWEEN.sub("", name) for name in given]
    while prefix := _common(plain):
        plain = [name.removeprefix(prefix) for name in plain]
    if len(set(plain)) != len(given):
        plain = given
    return dict(zip(given, plain, strict=True))


def _common(names: list[str]) -> str | None:
    """A wrapper's prefix that all of `names` have."""
    if not names:
        return None
    if all(name.startswith("model.") for name in names) and any(_FIELD.match(name) for name in names):
        return "model."
    return next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in names)), None)
