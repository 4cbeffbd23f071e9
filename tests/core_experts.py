"""Experts for megatron_core.py: their sizes, their tensors on a rank, and what megatron-core's config is told of them.

A second, naive conversion, which imports nothing of the package under test. Experts are SequentialMLP's here, which
megatron-core runs on a CPU without Transformer Engine; `spelled` gives them the names of TEGroupedMLP and back.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
# Hugging Face's names below `model.layers.N.`: (router, gate, up and down of expert {}).
NAMES = {
    "mixtral": ("block_sparse_moe.gate", *(f"block_sparse_moe.experts.{{}}.{name}" for name in ("w1", "w3", "w2"))),
    "": ("mlp.gate", *(f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down"))),
}
_EACH = re.compile(r"(.*\.mlp\.experts\.)local_experts\.(\d+)\.(linear_fc[12])\.weight")
_GROUPED = re.compile(r"(.*\.mlp\.experts\.)(linear_fc[12])\.weight(\d+)")


@dataclass(frozen=True)
class Experts:
    """What a config.json says of its experts. `layers`: which have them; `shared`: rows of the shared ones, 0: none."""

    kind: str
    number: int
    ffn: int
    topk: int
    layers: tuple[bool, ...]
    normed: bool
    sigmoid: bool = False
    scaling: float | None = None
    groups: int = 1
    group_topk: int = 1
    shared: int = 0
    gate: bool = False

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Experts | None:
        kind, layers = config["model_type"], config["num_hidden_layers"]
        if kind not in ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe"):
            return None
        number = next(
            config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(key)
        )
        topk = config["num_experts_per_tok"]
        if kind == "mixtral":
            return cls(kind, number, config["intermediate_size"], topk, (True,) * layers, True)
        ffn = config["moe_intermediate_size"]
        if kind == "glm4_moe":
            dense = config["first_k_dense_replace"]
            return cls(
                kind, number, ffn, topk, tuple(layer >= dense for layer in range(layers)), True, True,
                config["routed_scaling_factor"], config["n_group"], config["topk_group"],
                ffn * config["n_shared_experts"],
            )  # fmt: skip
        step, plain = config["decoder_sparse_step"], config.get("mlp_only_layers") or []
        has = tuple(layer not in plain and (layer + 1) % step == 0 for layer in range(layers))
        shared = config.get("shared_expert_intermediate_size", 0)
        return cls(kind, number, ffn, topk, has, config["norm_topk_prob"], shared=shared, gate=bool(shared))

    @property
    def stacked(self) -> bool:
        """Whether moe_layer_freq is 1, so that torch_dist stacks the layers."""
        return all(self.layers)

    @property
    def freq(self) -> int | list[int]:
        return 1 if self.stacked else [int(has) for has in self.layers]

    def config(self) -> dict[str, Any]:
        """Fields of megatron-core's TransformerConfig."""
        return {
            "num_moe_experts": self.number,
            "moe_ffn_hidden_size": self.ffn,
            "moe_router_topk": self.topk,
            "moe_layer_freq": self.freq,
            "moe_router_pre_softmax": not self.sigmoid and not self.normed,
            "moe_router_score_function": "sigmoid" if self.sigmoid else "softmax",
            "moe_router_enable_expert_bias": self.sigmoid,
            "moe_router_topk_scaling_factor": self.scaling,
            "moe_router_num_groups": self.groups if self.groups > 1 else None,
            "moe_router_group_topk": self.group_topk if self.groups > 1 else None,
            "moe_shared_expert_intermediate_size": self.shared or None,
            "moe_shared_expert_gate": self.gate,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "allgather",
        }

    def args(self) -> dict[str, Any]:
        """The same as Megatron-LM's args have it."""
        fields = self.config()
        return fields | {"num_experts": fields.pop("num_moe_experts"), "moe_grouped_gemm": False}

    def random(self, layer: int, hidden: int, matrix: Callable[[int, int], Tensor]) -> Tensors:
        """A layer's Hugging Face tensors, the prefix `model.layers.N.` left out."""
        router, gate, up, down = NAMES.get(self.kind, NAMES[""])
        tensors = {f"{router}.weight": matrix(self.number, hidden) * 4}  # tokens part more clearly
        if self.sigmoid:
            tensors[f"{router}.e_score_correction_bias"] = (matrix(1, self.number)[0] * 4).float()
        for expert in range(self.number):
            for name in (gate, up):
                tensors[f"{name.format(expert)}.weight"] = matrix(self.ffn, hidden)
            tensors[f"{down.format(expert)}.weight"] = matrix(hidden, self.ffn)
        if self.shared:
            shared = self._shared()
            tensors |= {f"{shared}.{name}_proj.weight": matrix(self.shared, hidden) for name in ("gate", "up")}
            tensors[f"{shared}.down_proj.weight"] = matrix(hidden, self.shared)
        if self.gate:
            tensors["mlp.shared_expert_gate.weight"] = matrix(1, hidden)
        return tensors

    def _shared(self) -> str:
        return "mlp.shared_expert" if self.kind == "qwen2_moe" else "mlp.shared_experts"

    def of_rank(self, hf: Tensors, source: str, target: str, tensor: tuple[int, int], expert: tuple[int, int],
                cut: tuple[int, int]) -> Tensors:  # fmt: skip
        """A layer's tensors on one rank. `tensor`, `expert` and `cut` (of an expert's matrices) are (rank, size)."""
        router, gate, up, down = (source + name for name in NAMES.get(self.kind, NAMES[""]))
        tensors = {f"{target}mlp.router.weight": hf[f"{router}.weight"]}
        if self.sigmoid:
            tensors[f"{target}mlp.router.expert_bias"] = hf[f"{router}.e_score_correction_bias"]
        each = self.number // expert[1]
        for local in range(each):
            number, prefix = expert[0] * each + local, f"{target}mlp.experts.local_experts.{local}."
            names = [f"{name.format(number)}.weight" for name in (gate, up, down)]
            tensors |= _mlp(hf, names, prefix, cut)
        if self.shared:
            names = [f"{source}{self._shared()}.{name}_proj.weight" for name in ("gate", "up", "down")]
            tensors |= _mlp(hf, names, f"{target}mlp.shared_experts.", tensor)
        if self.gate:
            tensors[f"{target}mlp.shared_experts.gate_weight"] = hf[f"{source}mlp.shared_expert_gate.weight"]
        return tensors


def _mlp(hf: Tensors, names: list[str], prefix: str, cut: tuple[int, int]) -> Tensors:
    rank, size = cut
    gate, up, down = (hf[name] for name in names)
    return {
        f"{prefix}linear_fc1.weight": torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]]),
        f"{prefix}linear_fc2.weight": down.chunk(size, dim=1)[rank].contiguous(),
    }


def spelled(name: str, how: str) -> str:
    """A tensor's name in a rank file, `how`: "each" (SequentialMLP) or "grouped" (TEGroupedMLP)."""
    if how == "grouped" and (match := _EACH.fullmatch(name)):
        return f"{match[1]}{match[3]}.weight{match[2]}"
    if how == "each" and (match := _GROUPED.fullmatch(name)):
        return f"{match[1]}local_experts.{match[3]}.{match[2]}.weight"
    return name


def grouped_gemm() -> None:
    """A module that GroupedMLP (megatron-core before 0.17) asks for when it is built; it computes with it."""
    import importlib.machinery
    import sys
    import types

    def gmm(x: Tensor, weight: Tensor, counts: Tensor, trans_b: bool = False) -> Tensor:
        parts = x.split(counts.tolist())
        return torch.cat([part @ (one.T if trans_b else one) for part, one in zip(parts, weight, strict=True)])

    module: Any = types.ModuleType("grouped_gemm")
    module.__spec__ = importlib.machinery.ModuleSpec("grouped_gemm", None)
    module.ops = types.SimpleNamespace(gmm=gmm)
    sys.modules.setdefault("grouped_gemm", module)
