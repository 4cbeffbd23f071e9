"""Globals in a checkpoint's pickle that are on no list: where they may stand, and which are refused anywhere.

Every release of training has new classes in its args and states. Since nothing is imported they are harmless names.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

from weights_conversion.formats.stand_ins import Foreign

# The keys of a checkpoint whose values are training's own, of whatever classes its release has. No weight is there.
_OF_TRAINING = frozenset({
    *("args", "optimizer", "opt_param_scheduler", "lr_scheduler", "scheduler", "grad_scaler", "content_metadata"),
    *("rng_state", "random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state", "rng_tracker_states"),
    *("rerun_state_machine", "ft_state", "run_config", "train_state", "dataloader_state"),
})  # fmt: skip
# Of Python's own modules, those (and those of the builtins) that training's values are of. The rest can do harm, were
# another loader to run it: a file that names it is refused.
_HARMLESS_MODULES = frozenset({
    *("collections", "copyreg", "copy_reg", "datetime", "decimal", "enum", "fractions", "functools", "inspect"),
    *("ipaddress", "numbers", "pathlib", "re", "signal", "types", "typing", "uuid", "zoneinfo"),
})  # fmt: skip
_HARMLESS_BUILTINS = frozenset({
    *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set"),
    *("slice", "str", "tuple", "type"),
})  # fmt: skip


def is_harmful(module: str, name: str) -> bool:
    """Whether a global is one of Python's own that training has no use for."""
    top = module.partition(".")[0]
    if top in ("builtins", "__builtin__"):
        return name not in _HARMLESS_BUILTINS
    if module == "_io":
        return name != "BytesIO"
    return top in sys.stdlib_module_names and top not in _HARMLESS_MODULES


def misplaced(content: Any, unlisted: Collection[str]) -> str | None:
    """The first of the `unlisted` globals that stands elsewhere than in training's own values. Each part is seen once.

    Containers in a pickle can share their parts, so that to walk them by path takes forever.
    """
    if not unlisted:
        return None
    (root,) = content if isinstance(content, list) and len(content) == 1 else (content,)
    if type(root).__name__ == "Arguments":  # torch_dcp keeps the args as an item of their own
        return None
    values = root.items() if isinstance(root, dict) else (("", root),)
    if hasattr(root, "state_dict_metadata") and hasattr(root, "storage_data"):  # an index, which plans may stand in
        values = [("", getattr(root, name)) for name in ("state_dict_metadata", "storage_data")]
    waiting: list[Any] = [part for key, value in values if key not in _OF_TRAINING for part in (key, value)]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Foreign) and value.name in unlisted:
            return value.name
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting += value.keys()
            waiting += [part for key, part in value.items() if not str(key).endswith("_extra_state")]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += value
        elif hasattr(value, "__dict__") and not isinstance(value, (Foreign, type)):
            waiting += vars(value).values()
    return None
