"""The forward pass of Llama 3, Qwen2, Qwen3 and newer Mistral models against transformers, and against mistakes.

Megatron-Core's tensors are made here, head by head, without the package's own mapping.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from weights_conversion.config import ModelConfig, RopeScaling
from weights_conversion.errors import ConversionError
from weights_conversion.verification import forward
from weights_conversion.verification.conventions import HF, MEGATRON_CORE, MEGATRON_LLM, META, Convention

BOUND = 1e-5  # of single logits, in float32
TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5


BASE = ModelConfig(
    family="llama3",
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=80,
    num_attention_heads=6,
    num_query_groups=2,
    head_dim=8,
    vocab_size=97,
    max_position_embeddings=4096,
    layernorm_epsilon=1e-5,
    rope_theta=5e5,
)
LLAMA3 = RopeScaling("llama3", 8.0, 256)
YARN = RopeScaling("yarn", 4.0, 512)
QWEN2 = replace(BASE, family="qwen2", layernorm_epsilon=1e-6, rope_theta=1e6, add_qkv_bias=True)
QWEN3 = replace(BASE, family="qwen3", layernorm_epsilon=1e-6, rope_theta=1e6, qk_layernorm=True, head_dim=16)
CONFIGS = {
    "llama3 8B": BASE,
    "llama3.1": replace(BASE, rope_scaling=LLAMA3),
    "llama3.2 tied": replace(BASE, rope_scaling=replace(LLAMA3, factor=32.0), tie_word_embeddings=True),
    "llama linear": replace(BASE, rope_scaling_factor=4.0),
    "qwen2": QWEN2,
    "qwen2 tied": replace(QWEN2, tie_word_embeddings=True),
    "qwen2 yarn": replace(QWEN2, rope_scaling=YARN),
    "qwen3": QWEN3,
    "qwen3 tied": replace(QWEN3, tie_word_embeddings=True),
    "qwen3 yarn": replace(QWEN3, rope_scaling=replace(YARN, attention_factor=1.3, beta_fast=24.0, beta_slow=2.0)),
    "mistral nemo": replace(BASE, family="mistral", head_dim=16, rope_theta=1e6),
    "mistral window": replace(BASE, family="mistral", head_dim=16, sliding_window=7),
}
CLASSES = {"llama3": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
CASES = [pytest.param(name, side, id=f"{name}-{side.title}") for name in CONFIGS for side in (HF, MEGATRON_CORE)]


def transformers_model(config: ModelConfig) -> Any:
    """A random model with random norms and biases, in float32."""
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.layernorm_epsilon,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": 0.2,
        "attn_implementation": "eager",
    }
    if config.family != "qwen2":  # which has no key for it
        fields["head_dim"] = config.head_dim
    if config.family == "mistral":
        fields["sliding_window"] = config.sliding_window
    theta, kind = config.rope_theta, config.rope.kind
    scaling = {"rope_type": kind} | ({"factor": config.rope_scaling_factor} if kind == "linear" else {})
    if config.rope_scaling:
        scaling |= {k: v for k, v in vars(config.rope_scaling).items() if v is not None and k != "kind"}
    if TRANSFORMERS_5:
        fields["rope_parameters"] = {**scaling, "rope_theta": theta}
    else:
        fields |= {"rope_theta": theta, "rope_scaling": scaling if kind != "default" else None}
    name = CLASSES[config.family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.3)
    return model.eval()


def reference(config: ModelConfig) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """(HF tensors, prompts, positions, transformers' logits)."""
    model, prompts = transformers_model(config), forward.default_prompts(config)
    positions = forward.default_positions(config, prompts.shape[1])
    # Without a mask, transformers takes positions that jump for the borders of packed sequences.
    given = {"position_ids": positions.expand_as(prompts), "attention_mask": torch.ones_like(prompts)}
    with torch.no_grad():
        logits = model(prompts, **given, use_cache=False).logits
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, prompts, positions, logits


def grouped(config: ModelConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[q .. q, k, v] of every query group, head by head."""
    dim, each = config.head_dim, config.num_attention_heads // config.num_query_groups
    heads: list[Tensor] = []
    for group in range(config.num_query_groups):
        heads += q.split(dim)[group * each : (group + 1) * each]
        heads += [k.split(dim)[group], v.split(dim)[group]]
    return torch.cat(heads)


def core(config: ModelConfig, hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """Megatron-Core's full tensors, with rows of NaN behind the vocabulary, which nobody may read."""
    padding = torch.full((3, config.hidden_size), float("nan"))
    out = {
        "embedding.word_embeddings.weight": torch.cat([hf["model.embed_tokens.weight"], padding]),
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        out["output_layer.weight"] = torch.cat([hf["lm_head.weight"], padding])
    for layer in range(config.num_layers):
        old, new = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias") if config.add_qkv_bias else ("weight",):
            parts = (hf[f"{old}self_attn.{name}_proj.{kind}"] for name in "qkv")
            out[f"{new}self_attention.linear_qkv.{kind}"] = grouped(config, *parts)
        if config.qk_layernorm:
            for name in "qk":
                out[f"{new}self_attention.{name}_layernorm.weight"] = hf[f"{old}self_attn.{name}_norm.weight"]
        out |= {
            f"{new}self_attention.linear_qkv.layer_norm_weight": hf[f"{old}input_layernorm.weight"],
            f"{new}self_attention.linear_proj.weight": hf[f"{old}self_attn.o_proj.weight"],
            f"{new}mlp.linear_fc1.layer_norm_weight": hf[f"{old}post_attention_layernorm.weight"],
            f"{new}mlp.linear_fc1.weight": torch.cat([hf[f"{old}mlp.{name}_proj.weight"] for name in ("gate", "up")]),
            f"{new}mlp.linear_fc2.weight": hf[f"{old}mlp.down_proj.weight"],
        }
    return out


def logits_of(config: ModelConfig, side: Convention, tensors: dict[str, Tensor], prompts: Tensor, at: Tensor) -> Tensor:
    unread = set(tensors)

    def weights(name: str, rows: slice | None) -> Tensor:
        unread.discard(name)
        return tensors[name] if rows is None else tensors[name][rows]

    *_, (stage, _, logits) = forward.trace(config, side, weights, prompts, positions=at)
    assert stage == "logits"
    assert unread <= {"lm_head.weight"}, "a tensor that decides nothing"
    return logits


@pytest.mark.parametrize(("name", "side"), CASES)
def test_logits_are_those_of_transformers(name: str, side: Convention) -> None:
    config = CONFIGS[name]
    hf, prompts, positions, wanted = reference(config)
    tensors = hf if side is HF else core(config, hf)
    found = logits_of(config, side, tensors, prompts, positions)
    assert float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1)) <= BOUND


def test_positions_stand_apart_only_where_rope_is_scaled() -> None:
    assert forward.default_positions(BASE, 24).tolist() == list(range(24))
    assert forward.default_positions(CONFIGS["llama3.1"], 24)[-1] == 61 * 23
    assert forward.default_positions(replace(CONFIGS["llama3.1"], max_position_embeddings=50), 24)[-1] == 2 * 23


def _swap(tensors: dict[str, Tensor], one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other], tensors[one]


def _ungrouped(tensors: dict[str, Tensor], name: str) -> None:
    """[q .. q, k, v] per group becomes all q, all k, all v."""
    heads = tensors[name].unflatten(0, (QWEN2.num_query_groups, -1, QWEN2.head_dim))
    tensors[name] = torch.cat([part.flatten(0, 2) for part in heads.split([3, 1, 1], dim=1)])


L1 = "decoder.layers.1.self_attention."
FAULTS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any]]] = {
    "groups of the bias mixed": ("qwen2", lambda t: _ungrouped(t, f"{L1}linear_qkv.bias")),
    "ranks of the bias exchanged": (
        "qwen2",
        lambda t: t.update({f"{L1}linear_qkv.bias": torch.cat(t[f"{L1}linear_qkv.bias"].chunk(2)[::-1])}),
    ),
    "bias never loaded": ("qwen2", lambda t: t.update({f"{L1}linear_qkv.bias": torch.zeros(80)})),
    "norms of q and k exchanged": (
        "qwen3",
        lambda t: _swap(t, f"{L1}q_layernorm.weight", f"{L1}k_layernorm.weight"),
    ),
    "norm of k never loaded": ("qwen3", lambda t: t.update({f"{L1}k_layernorm.weight": torch.ones(16)})),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_tensor_is_far_beyond_the_bound(fault: str) -> None:
    name, spoil = FAULTS[fault]
    config = CONFIGS[name]
    hf, prompts, positions, wanted = reference(config)
    tensors = core(config, hf)
    spoil(tensors)
    assert float((logits_of(config, MEGATRON_CORE, tensors, prompts, positions) - wanted).abs().max()) > 1000 * BOUND


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama3.1", {"rope_scaling": None}),
        ("llama3.2 tied", {"rope_scaling": LLAMA3}),  # what stock training does with factor 32
        ("llama3.1", {"rope_scaling": replace(LLAMA3, low_freq_factor=2.0)}),
        ("llama3.1", {"rope_scaling": replace(LLAMA3, high_freq_factor=8.0)}),
        ("llama3.1", {"rope_scaling": replace(LLAMA3, original_max_position_embeddings=512)}),
        ("llama linear", {"rope_scaling_factor": 1.0}),
        ("qwen2 yarn", {"rope_scaling": None}),
        ("qwen2 yarn", {"rope_scaling": replace(YARN, factor=8.0)}),
        ("qwen2 yarn", {"rope_scaling": replace(YARN, attention_factor=1.0)}),
        ("qwen3 yarn", {"rope_scaling": YARN}),
        ("qwen3", {"rope_theta": 1e4}),
        ("qwen3", {"layernorm_epsilon": 1e-4}),
        ("qwen2", {"tie_word_embeddings": True}),
    ],
)
def test_a_wrong_value_is_far_beyond_the_bound(name: str, changes: dict[str, Any]) -> None:
    config = CONFIGS[name]
    hf, prompts, positions, wanted = reference(config)
    found = logits_of(replace(config, **changes), HF, hf, prompts, positions)
    assert float((found - wanted).abs().max()) > 100 * BOUND


def test_hypotheses_mend_what_a_writer_did() -> None:
    """A report names a cause by running a layer under another convention."""
    hf, prompts, positions, wanted = reference(QWEN2)
    tensors = core(QWEN2, hf)
    for layer in range(QWEN2.num_layers):
        _ungrouped(tensors, f"decoder.layers.{layer}.self_attention.linear_qkv.bias")
    found = logits_of(QWEN2, replace(MEGATRON_CORE, grouped_bias=False), tensors, prompts, positions)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)

    hf, prompts, positions, wanted = reference(QWEN3)
    tensors = core(QWEN3, hf)
    for layer in range(QWEN3.num_layers):
        prefix = f"decoder.layers.{layer}.self_attention."
        _swap(tensors, f"{prefix}q_layernorm.weight", f"{prefix}k_layernorm.weight")
    names = MEGATRON_CORE.names
    exchanged = replace(MEGATRON_CORE, names=replace(names, q_norm=names.k_norm, k_norm=names.q_norm))
    found = logits_of(QWEN3, exchanged, tensors, prompts, positions)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", [META, MEGATRON_LLM], ids=lambda side: side.title)
@pytest.mark.parametrize(("name", "what"), [("qwen2", "biases of q, k and v"), ("qwen3", "norms of q and k")])
def test_what_a_side_cannot_hold_is_refused(side: Convention, name: str, what: str) -> None:
    with pytest.raises(ConversionError, match=f"{side.title} checkpoints cannot hold {what}, which a {name} model has"):
        side.names_for(CONFIGS[name])
