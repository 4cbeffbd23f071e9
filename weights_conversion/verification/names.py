"""Stored names of a model's parts, as a side spells them. Types alone: the sides are in conventions.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertNames:
    """Stored names of a layer's experts; `{}` is the number of one. `inner` is as Names.mlp_in."""

    norm: str  # in front of them
    router: str
    inner: tuple[str, ...]
    outer: str
    bias: str = ""  # that chooses experts, and does not weigh them
    router_bias: str = ""  # that is part of the router's scores, as biases of a linear layer are
    inner_bias: tuple[str, ...] = ()
    outer_bias: str = ""
    shared_inner: tuple[str, ...] = ()
    shared_outer: str = ""
    shared_gate: str = ""
    latent_in: str = ""  # in front of them and behind them, where they work on projections
    latent_out: str = ""


@dataclass(frozen=True)
class MambaNames:
    """Stored names of a state-space layer, `before` is the norm in front of it. in_proj and conv join parts."""

    before: str
    in_proj: str = "mixer.in_proj.weight"
    conv_weight: str = "mixer.conv1d.weight"
    conv_bias: str = "mixer.conv1d.bias"
    a_log: str = "mixer.A_log"
    d: str = "mixer.D"
    dt: str = "mixer.dt_bias"
    norm: str = "mixer.norm.weight"
    out_proj: str = "mixer.out_proj.weight"


@dataclass(frozen=True)
class DeltaNames:
    """Stored names of a layer with linear attention by the gated delta rule.

    `projections` have q, k, v, z, b and a: end to end, or (`by_head`) those of each key head together, or each apart.
    `shifted`: what the norm behind it scales by is stored less one.
    """

    before: str  # the norm in front of it
    projections: tuple[str, ...]
    conv: str
    norm: str
    out_proj: str
    a_log: str
    dt_bias: str
    by_head: bool = False
    shifted: bool = False


@dataclass(frozen=True)
class LatentNames:
    """Stored names of multi-head latent attention."""

    norm: str  # in front of it
    q: str  # where it has no latent
    q_down: str
    q_norm: str
    q_up: str
    kv_down: str
    kv_norm: str
    kv_up: str


@dataclass(frozen=True)
class Names:
    """Stored names. Those of a layer stand behind `layer`; `{}` is the global layer number."""

    embedding: str
    layer: str
    attention_norm: str
    qkv: tuple[str, ...]  # q, k and v; or one fused matrix
    dense: str
    mlp_norm: str
    mlp_in: tuple[str, ...]  # two halves of a GLU, or one matrix: both halves fused, or all there is without a GLU
    mlp_out: str
    final_norm: str
    head: str
    qkv_bias: tuple[str, ...] = ()  # as `qkv`; empty: this side's model has none
    q_norm: str = ""  # of one head's dimensions, the same for all heads; empty: this side's model has none
    k_norm: str = ""
    dense_bias: str = ""
    sinks: str = ""
    experts: ExpertNames | None = None  # None: this side's model has none
    latent: LatentNames | None = None
    mamba: MambaNames | None = None
    delta: DeltaNames | None = None
    after_attention: str = ""  # norms of what attention and MLP give; empty: this side's model has none
    after_mlp: str = ""
