"""The type of a transformers config class: what it reads from a config.json. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ExpertKeys:
    """How a class spells experts and their router, and what its code computes whatever a config says.

    `experts`: keys of their number, each of which is written. `layers`: "first" (first_k_dense_replace dense ones),
    "step" (decoder_sparse_step and mlp_only_layers), "pattern" (ConfigClass.pattern), or "" (every layer has experts).
    `norm`: whether the scores of the chosen experts are made to sum up to 1; None: as norm_topk_prob says. `groups`:
    "always" (n_group and topk_group), "method" (they count where topk_method is group_limited_greedy), or "". `shared`
    is the key of their number (n_shared_experts) or of their size; "": there are none. `biased`: router and experts
    have biases. `clamp` is the key of what bounds their activation. `latent`: experts may work on projections
    (moe_latent_size).
    """

    experts: tuple[str, ...]
    ffn: str = "moe_intermediate_size"
    layers: str = ""
    score: str = "softmax"
    norm: bool | None = None
    scaled: bool = False
    groups: str = ""
    shared: str = ""
    gate: bool = False
    bias: bool = False
    biased: bool = False
    clamp: str = ""
    latent: bool = False


@dataclass(frozen=True)
class ConfigClass:
    """One config class.

    `fields`: ModelConfig field -> its keys; the first is the class's own, the others are those of older releases.
    `defaults`: key -> what the class takes where the key is absent. `plain`: key -> the values that our models have;
    any other one asks for a forward pass that no model of ours computes.

    `flags`: ModelConfig's switch -> the key that decides it; a family's switch without a key is always on. `aliases`:
    keys of one value beside those of `fields`, the class's own first. `idle`: keys that change nothing (losses, code of
    the source's own). `written`: what a config made from nothing says for the source's own code. `rotary_percent` is
    what the class takes where partial_rotary_factor is absent. `latent`: its attention is MLA.
    `mixed_windows`: layer_types says of each layer whether it has the window. `rope` is what the class takes where no
    rope is stated.
    `pattern`: keys that say which one sub-block each layer is, by symbols or a list of names; (): layers are alike.
    `gated_delta`: layer_types, or full_attention_interval, says
    which layers have linear attention. `mtp_apart`: layers that predict further tokens stand beside the model, as mtp.,
    not behind its last layer. `rope_idle`: keys of its rope that say nothing to a model of text alone.
    `local_rope`: layers with a window have a rope of their own (rope_local_base_freq; in transformers 5 rope_parameters
    has one for each kind of layers), sliding_window_pattern says which they are where layer_types does not, and scores
    are divided by the root of query_pre_attn_scalar.
    `window_switch` is the key without which sliding_window means nothing: with it, every layer has the window.
    `whole_heads`: transformers 5 refuses a hidden size that is no multiple of the heads, whatever head_dim says.
    """

    fields: Mapping[str, tuple[str, ...]]
    defaults: Mapping[str, Any]
    plain: Mapping[str, tuple[Any, ...]]
    flags: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[tuple[str, ...], ...] = ()
    idle: frozenset[str] = frozenset()
    written: Mapping[str, Any] = field(default_factory=dict)
    experts: ExpertKeys | None = None
    latent: bool = False
    rotary_percent: float = 1.0
    whole_heads: bool = False
    mixed_windows: bool = False
    rope: Mapping[str, Any] | None = None
    pattern: tuple[str, ...] = ()
    gated_delta: bool = False
    mtp_apart: bool = False
    window_switch: str = ""
    rope_idle: tuple[str, ...] = ()
    local_rope: bool = False

    @property
    def clamp(self) -> float | None:
        """The usual bound of the experts' activation."""
        return self.defaults.get(self.experts.clamp) if self.experts is not None else None

    def knows(self, key: str) -> bool:
        return key in self.defaults or key in self.idle or any(key in keys for keys in self._groups())

    def _groups(self) -> tuple[tuple[str, ...], ...]:
        return (*self.fields.values(), *self.aliases)

    @property
    def further(self) -> tuple[str, ...]:
        """Keys of the number of layers that predict further tokens."""
        names = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
        return next((keys for keys in self._groups() if set(keys) & set(names)), ())

    @property
    def predicts(self) -> bool:
        return self.mtp_apart or bool(self.further)

    def spellings(self, key: str) -> tuple[str, ...]:
        """All keys of the value that `key` states, that one first."""
        group = next((keys for keys in self._groups() if key in keys), ())
        return (key, *(other for other in group if other != key))

    def completed(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """`raw` with the class's defaults for the keys that are absent under each of their spellings."""
        stated = set(raw)
        for keys in self._groups():
            if stated & set(keys):
                stated |= set(keys)
        return {**{key: value for key, value in self.defaults.items() if key not in stated}, **raw}
