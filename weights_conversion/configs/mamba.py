"""State-space layers (Mamba 2) of a hybrid model: config.json <-> Mamba <-> Megatron-Core's args.

Sources: transformers' modeling_nemotron_h.py, Megatron-Core's mamba_mixer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weights_conversion.config import Mamba, ModelConfig
from weights_conversion.mapping.hybrid import PATTERN, SPEC

HF_KEYS = {
    "state_dim": "ssm_state_size",
    "head_dim": "mamba_head_dim",
    "num_groups": "n_groups",
    "num_heads": "mamba_num_heads",
}
ARGS = {field: f"mamba_{field}" for field in HF_KEYS}
# Megatron-Core's norm behind the state space has it, whatever the model's epsilon is (mamba_mixer.py).
NORM_EPSILON = 1e-5
_EXPAND = 2  # where no number of heads is given, they are as many as twice the hidden size takes


def read_hf(full: Mapping[str, Any]) -> Mamba | list[str]:
    """The sizes of a config.json, or what is wrong, in words that follow "has". `full` has the class's defaults."""
    problems: list[str] = []
    return _sizes({field: (key, full.get(key)) for field, key in HF_KEYS.items()}, problems) or problems


def _sizes(stated: Mapping[str, tuple[str, Any]], problems: list[str]) -> Mamba | None:
    problems += [
        f"{name} {value!r}, where a positive int was expected"
        for name, value in stated.values()
        if type(value) is not int or value <= 0
    ]
    if problems:
        return None
    mamba = Mamba(**{field: value for field, (_, value) in stated.items()})
    if mamba.num_heads % mamba.num_groups:
        problems.append(
            f"{mamba.num_heads} heads of its state space ({stated['num_heads'][0]}), which cannot be divided among "
            f"{mamba.num_groups} groups ({stated['num_groups'][0]})"
        )
        return None
    return mamba


def write_hf(mamba: Mamba, result: dict[str, Any]) -> None:
    result.update({key: getattr(mamba, field) for field, key in HF_KEYS.items()})


def epsilon_problem(pattern: str, epsilon: float) -> str | None:
    """Both sides have an epsilon of this norm: Hugging Face the model's, Megatron-Core a constant."""
    if "M" not in pattern or epsilon == NORM_EPSILON:
        return None
    return (
        f"an epsilon of {epsilon:g}, where Megatron-Core's norm behind a state space has {NORM_EPSILON:g}, a constant, "
        "and Hugging Face's the model's: no file can be right for both"
    )


# --- Megatron-Core ----------------------------------------------------------------------------------------------------

# Args that a hybrid model may have: read here or beside, and refused by value.
READ = frozenset({
    *ARGS.values(), "hybrid_layer_pattern", "hybrid_override_pattern", "is_hybrid_model", "gated_linear_unit", "mamba",
})  # fmt: skip


def read_core(args: Mapping[str, Any]) -> Mamba | list[str] | None:
    """The sizes that Megatron-Core's args state, or what is wrong; None: it has no such layer.

    Each file of Megatron-LM has these args, with the defaults of its parser: they count where the pattern has an M.
    """
    if "M" not in (args.get("hybrid_layer_pattern") or ""):
        return None
    stated = {field: (name, args.get(name)) for field, name in ARGS.items()}
    head_dim, hidden = args.get(ARGS["head_dim"]), args.get("hidden_size")
    if args.get(ARGS["num_heads"]) is None and type(head_dim) is int and head_dim > 0 and type(hidden) is int:
        stated["num_heads"] = (ARGS["num_heads"], _EXPAND * hidden // head_dim)
    problems: list[str] = []
    return _sizes(stated, problems) or problems


def write_core(config: ModelConfig) -> dict[str, Any]:
    """Args of a hybrid model; of any other, none."""
    if config.hybrid_layer_pattern is None:
        return {}
    sizes = {} if config.mamba is None else {name: getattr(config.mamba, field) for field, name in ARGS.items()}
    return {
        **{"mamba_state_dim": 128, "mamba_head_dim": 64, "mamba_num_groups": 8, "mamba_num_heads": None},  # defaults
        **sizes,
        PATTERN: config.hybrid_layer_pattern,
        "spec": SPEC,
        "moe_layer_freq": 1,
    }


def misfits(args: Mapping[str, Any], family: str) -> list[str]:
    """What a hybrid model of ours cannot be, by args in Megatron-LLM's names, behind "holds a model"."""
    pattern = args.get("hybrid_layer_pattern")
    if pattern is None:
        return [f"whose layers have attention and an MLP each (hybrid_layer_pattern is None), where {family}'s are one "
                "of them"]  # fmt: skip
    lacks, wrong = f"which {family} does not have", []
    if args.get("gated_linear_unit"):
        wrong.append(f"with a gate in its MLPs (gated_linear_unit), {lacks}")
    epsilon = args.get("layernorm_epsilon")
    if epsilon is not None and (problem := epsilon_problem(pattern, epsilon)):
        wrong.append(f"with {problem}")
    return wrong
