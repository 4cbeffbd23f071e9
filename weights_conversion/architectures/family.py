"""The type of a family: its rows, and every fact that is true of it and of no other. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weights_conversion.mapping.parameters import Architecture


@dataclass(frozen=True)
class Family(Architecture):
    """`repositories` are the default ones by size, whose keys are --size's choices; the first is the default.

    `defaults` are ModelConfig fields that a family uses where nothing that can be trusted says otherwise.
    `ropes` are the kinds of rope scaling that its transformers class computes. `features` name ModelConfig fields
    (add_qkv_bias, qk_layernorm) that every model of the family has. `meta_context` is the context of a release in
    Meta's files, whose params.json does not state it. What a config.json says: configs/hf_keys.py, by `hf_class`.
    """

    model_types: tuple[str, ...] = ("llama",)
    hf_class: str = "LlamaForCausalLM"
    repositories: Mapping[str, str] = field(default_factory=dict, hash=False)
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    ropes: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    features: frozenset[str] = frozenset()
    windowed: bool = False
    parallel_attention: bool = False
    meta_context: int | None = None
    target: str = "megatron-core"
    megatron_llm: bool = False  # Megatron-LLM trains it, and its tokenizer's rule for new ids holds

    @property
    def default_size(self) -> str:
        return next(iter(self.repositories))

    def has(self, feature: str) -> bool:
        return feature in self.features
