"""The type of a family: its rows, and every fact that is true of it and of no other. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weights_conversion.mapping.parameters import Architecture


@dataclass(frozen=True)
class Structure:
    """What tensors and args show beyond doubt: a checkpoint must have it as a family's models have it."""

    parallel_attention: bool = False
    qkv_bias: bool = False
    qk_norms: bool = False
    llama3_rope: bool = False
    experts: bool = False
    shared_experts: bool = False
    shared_gate: bool = False
    sigmoid: bool = False
    latent: bool = False
    sinks: bool = False
    sub_blocks: bool = False  # each layer is one: attention, an MLP, experts or a state space
    gated_delta: bool = False
    post_norms: bool = False  # behind attention and MLP


@dataclass(frozen=True)
class Signs(Structure):
    """One way in which a family's models look. None: any value fits; features that the files do not state fit too.

    `rows` is a number of rows that no other family has: a checkpoint with so many is of this one. `rows_needed`: only
    such a checkpoint is meant. `ratio` and `least_positions`: one of the two is enough.
    """

    theta: float | None = None
    epsilon: float | None = None
    window: bool = False
    rows: int | None = None
    rows_needed: bool = False
    grouped: bool | None = None
    least_positions: int | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Outer:
    """The repository around a text model: its config's model_type, which holds the text's in text_config, and class.

    `others` begin the names of what is not the text model: it stays behind, and a reference gives it back. `usual`: a
    model of which nothing else is known is one of these. `outside`: the hub's files have language_model. in front of
    the text model's whole names, not within them.
    """

    model_type: str
    hf_class: str
    prefix: str = "model.language_model."
    others: tuple[str, ...] = ("model.visual.", "visual.")
    usual: bool = True
    outside: bool = False


@dataclass(frozen=True)
class Family(Architecture):
    """`repositories` are the default ones by size, whose keys are --size's choices; the first is the default.

    `defaults` are ModelConfig fields that a family uses where nothing that can be trusted says otherwise.
    `ropes` are the kinds of rope scaling that its transformers class computes. `features` name ModelConfig fields
    (add_qkv_bias, qk_layernorm) that every model of the family has. `own_args` are args of Megatron-Core that they all
    have, beside what a ModelConfig says; `own_flags` are the flags of those which a run does not take from a
    checkpoint. What a config.json says: configs/hf_keys.py, by `hf_class`. By `signs` a Megatron checkpoint that names
    no family is known; where it fits this one and `otherwise` too, it is that one's.
    """

    model_types: tuple[str, ...] = ("llama",)
    hf_class: str = "LlamaForCausalLM"
    repositories: Mapping[str, str] = field(default_factory=dict, hash=False)
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    ropes: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    features: frozenset[str] = frozenset()
    norm: str = "rms"  # or "layer", with biases
    gated: bool = True  # the MLP has a gate
    rotary: bool = True  # positions reach it by a rotary embedding
    windowed: bool = False
    own_args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    own_flags: tuple[str, ...] = ()
    parallel_attention: bool = False
    ties_in_megatron_llm: bool = False  # heads are tied there too, which the original's release files do not say
    tokenizer_type: str = "SentencePieceTokenizer"  # Megatron-LLM's class
    tokenizer_repository: str | None = None  # asked where no tokenizer is at hand
    infills: bool = False  # the tokenizer has a fill token
    meta_context: int | None = None  # context of a release in Meta's files, which do not state it
    meta_folders: tuple[str, ...] = ("llama-2-{}b", "{}B")  # Meta's names of a download, by size
    meta_in_cache_dir: bool = False  # --cache-dir may hold one
    meta_states_theta: bool = False  # models differ in theta, so that params.json has to say it
    signs: tuple[Signs, ...] = ()
    otherwise: str | None = None
    outer: Outer | None = None
    packs: bool = False  # hub files have all experts of a layer in one tensor
    target: str = "megatron-core"
    bridge_only: str = ""  # what it has that Megatron-Bridge's own layers alone can hold
    megatron_llm: bool = False  # Megatron-LLM trains it, and its tokenizer's rule for new ids holds

    @property
    def default_size(self) -> str:
        return next(iter(self.repositories))

    def has(self, feature: str) -> bool:
        return feature in self.features
