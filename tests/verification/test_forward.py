"""The forward pass against transformers, on every family and stored convention, and against deliberate mistakes.

The stored tensors of Meta, Megatron-LLM and Megatron-Core are made here, head by head and row by row, without the
package's own mapping.
"""

from __future__ import annotations

import argparse
import codecs
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from torch import Tensor

from weights_conversion.config import ModelConfig
from weights_conversion.errors import ConversionError
from weights_conversion.verification import forward, linear
from weights_conversion.verification.conventions import HF, MEGATRON_CORE, MEGATRON_LLM, META, Convention
from weights_conversion.verification.forward import Weights, default_prompts, trace

BOUND = 2e-6  # of the logits' spread
OTHERS = ("core-", "bridge-")  # of Megatron-Core
LLM_FOLDERS = sorted(path for path in GOLDEN.glob("*/megatron-*") if not path.parent.name.startswith(OTHERS))

LLAMA = ModelConfig(
    family="llama2",
    num_layers=3,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=2,
    head_dim=8,
    vocab_size=101,
    max_position_embeddings=128,
    layernorm_epsilon=1e-5,
)
FALCON = replace(LLAMA, family="falcon", ffn_hidden_size=256, tie_word_embeddings=True)
CONFIGS = {
    "llama": replace(LLAMA, family="llama", num_query_groups=8, layernorm_epsilon=1e-6),
    "llama2 grouped": LLAMA,
    "llama2 multi-query": replace(LLAMA, num_query_groups=1),
    "llama2 linear scaling": replace(LLAMA, rope_scaling_factor=4.0),
    "llama2 wide heads": replace(LLAMA, head_dim=16),
    "llama2 tied": replace(LLAMA, tie_word_embeddings=True),
    "codellama theta": replace(LLAMA, family="codellama", rope_theta=1e6),
    "mistral window": replace(LLAMA, family="mistral", sliding_window=7),
    "mistral narrow heads": replace(LLAMA, family="mistral", head_dim=4, rope_theta=1e6),
    "falcon 7B": replace(FALCON, num_query_groups=1),
    "falcon 40B": replace(FALCON, num_layernorms=2),
    "falcon2 11B": replace(FALCON, tie_word_embeddings=False),
    "falcon theta scaling": replace(FALCON, num_layernorms=2, rope_theta=1e6, rope_scaling_factor=2.0),
}
CASES = [
    pytest.param(name, convention, id=f"{name}-{convention.title}")
    for name, config in CONFIGS.items()
    for convention in (HF, META, MEGATRON_LLM, MEGATRON_CORE)
    if config.family != "falcon" or convention.parallel
]


def whole_tensors(read: Callable[[str], Tensor]) -> Weights:
    """`Weights` over a reader that knows no row ranges: keeps the last tensor, and only that one, in memory."""
    last: tuple[str, Tensor] | None = None

    def weights(name: str, rows: slice | None) -> Tensor:
        nonlocal last
        if last is None or last[0] != name:
            last = None  # let go of one tensor before the next is read
            last = (name, read(name))
        return last[1] if rows is None else last[1][rows]

    return weights


# ---- transformers


def transformers_model(config: ModelConfig, dtype: torch.dtype = torch.float32, initializer_range: float = 0.08) -> Any:
    """A random model whose norms are random as well, with weights that `dtype` can hold, in float32."""
    import transformers

    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": initializer_range,
        "attn_implementation": "eager",
    }
    scaled = config.rope_scaling_factor != 1.0
    scaling = {"rope_type": "linear", "factor": config.rope_scaling_factor} if scaled else {"rope_type": "default"}
    if int(transformers.__version__.split(".")[0]) >= 5:
        common["rope_parameters"] = {**scaling, "rope_theta": config.rope_theta}
    else:
        common["rope_theta"] = config.rope_theta
        common["rope_scaling"] = scaling if scaled else None
    if config.family == "falcon":
        multi_query = config.num_query_groups == 1
        model = transformers.FalconForCausalLM(
            transformers.FalconConfig(
                **common,
                ffn_hidden_size=config.ffn_hidden_size,
                layer_norm_epsilon=config.layernorm_epsilon,
                num_kv_heads=config.num_query_groups,
                multi_query=multi_query,
                new_decoder_architecture=not multi_query,
                num_ln_in_parallel_attn=None if multi_query else config.num_layernorms,
            )
        )
    else:
        common |= {
            "intermediate_size": config.ffn_hidden_size,
            "num_key_value_heads": config.num_query_groups,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.layernorm_epsilon,
        }
        if config.family == "mistral":
            common["sliding_window"] = config.sliding_window
            model = transformers.MistralForCausalLM(transformers.MistralConfig(**common))
        else:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.3)
            parameter.copy_(
                parameter.to(dtype)
            )  # not model.to(dtype), which would round the rotary frequencies as well
    return model.eval()


def reference(config: ModelConfig, **kwargs) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """HF tensors, prompts and transformers' logits."""
    torch.manual_seed(0)
    model = transformers_model(config, **kwargs)
    prompts = default_prompts(config)
    with torch.no_grad():
        logits = model(prompts, use_cache=False).logits
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, prompts, logits


# ---- the other sides, made naively from HF's tensors


def interleave(head: Tensor) -> Tensor:
    """One head's rows from halves to pairs: 0, d/2, 1, d/2 + 1, .."""
    half = len(head) // 2
    return torch.stack([head[half * (row % 2) + row // 2] for row in range(len(head))])


def stored(config: ModelConfig, convention: Convention, hf: dict[str, Tensor], padding: int = 3) -> dict[str, Tensor]:
    """The full tensors of `convention`. Tables get rows of NaN behind the vocabulary, which nobody may read."""
    if convention is HF:
        return hf
    per_group, dim = config.num_attention_heads // config.num_query_groups, config.head_dim
    pad = torch.full((padding, config.hidden_size), float("nan"), dtype=next(iter(hf.values())).dtype)

    def group(q: list[Tensor], k: Tensor, v: Tensor) -> list[Tensor]:
        if convention is MEGATRON_CORE:
            return [*q, k, v]
        return [*(interleave(head) for head in q), interleave(k), v]

    out: dict[str, Tensor] = {}
    if config.family == "falcon":
        decoder = "language_model.encoder."
        out["language_model.embedding.word_embeddings.weight"] = torch.cat(
            [hf["transformer.word_embeddings.weight"], pad]
        )
        if not config.tie_word_embeddings:
            out["language_model.lm_head"] = torch.cat([hf["lm_head.weight"], pad])
        for kind in ("weight", "bias"):
            out[f"{decoder}final_layernorm.{kind}"] = hf[f"transformer.ln_f.{kind}"]
        for i in range(config.num_layers):
            old, new = f"transformer.h.{i}.", f"{decoder}layers.{i}."
            for kind in ("weight", "bias"):
                if config.num_layernorms == 2:
                    out[f"{new}input_layernorm.{kind}"] = hf[f"{old}ln_attn.{kind}"]
                    out[f"{new}mlp_layernorm.{kind}"] = hf[f"{old}ln_mlp.{kind}"]
                else:
                    out[f"{new}input_layernorm.{kind}"] = hf[f"{old}input_layernorm.{kind}"]
            for name in ("self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"):
                out[f"{new}{name}.weight"] = hf[f"{old}{name}.weight"]
            heads = hf[f"{old}self_attention.query_key_value.weight"].split(dim)
            rows: list[Tensor] = []
            for start in range(0, len(heads), per_group + 2):
                *q, k, v = heads[start : start + per_group + 2]
                rows += group(q, k, v)
            out[f"{new}self_attention.query_key_value.weight"] = torch.cat(rows)
        return out

    tables = {META: ("tok_embeddings.weight", "norm.weight", "output.weight")}
    tables[MEGATRON_CORE] = (
        "embedding.word_embeddings.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    )
    tables[MEGATRON_LLM] = (
        "language_model.embedding.word_embeddings.weight",
        "language_model.encoder.final_layernorm.weight",
        "language_model.lm_head",
    )
    embedding, final_norm, head = tables[convention]
    out[embedding] = torch.cat([hf["model.embed_tokens.weight"], pad])
    out[final_norm] = hf["model.norm.weight"]
    if not config.tie_word_embeddings:
        out[head] = torch.cat([hf["lm_head.weight"], pad])
    for i in range(config.num_layers):
        old = f"model.layers.{i}."
        q, k, v, o = (hf[f"{old}self_attn.{name}_proj.weight"] for name in "qkvo")
        gate, up, down = (hf[f"{old}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        norms = hf[f"{old}input_layernorm.weight"], hf[f"{old}post_attention_layernorm.weight"]
        rows = []
        for g in range(config.num_query_groups):
            q_heads = q.split(dim)[g * per_group : (g + 1) * per_group]
            rows += group(list(q_heads), k.split(dim)[g], v.split(dim)[g])
        fused = torch.cat(rows)
        if convention is META:
            out |= {
                f"layers.{i}.attention.wq.weight": torch.cat([interleave(head) for head in q.split(dim)]),
                f"layers.{i}.attention.wk.weight": torch.cat([interleave(head) for head in k.split(dim)]),
                f"layers.{i}.attention.wv.weight": v,
                f"layers.{i}.attention.wo.weight": o,
                f"layers.{i}.feed_forward.w1.weight": gate,
                f"layers.{i}.feed_forward.w3.weight": up,
                f"layers.{i}.feed_forward.w2.weight": down,
                f"layers.{i}.attention_norm.weight": norms[0],
                f"layers.{i}.ffn_norm.weight": norms[1],
            }
        elif convention is MEGATRON_LLM:
            new = f"language_model.encoder.layers.{i}."
            out |= {
                f"{new}self_attention.query_key_value.weight": fused,
                f"{new}self_attention.dense.weight": o,
                f"{new}mlp.dense_h_to_4h.weight": torch.cat([up, gate]),
                f"{new}mlp.dense_4h_to_h.weight": down,
                f"{new}input_layernorm.weight": norms[0],
                f"{new}post_attention_layernorm.weight": norms[1],
            }
        else:
            new = f"decoder.layers.{i}."
            out |= {
                f"{new}self_attention.linear_qkv.weight": fused,
                f"{new}self_attention.linear_proj.weight": o,
                f"{new}mlp.linear_fc1.weight": torch.cat([gate, up]),
                f"{new}mlp.linear_fc2.weight": down,
                f"{new}self_attention.linear_qkv.layer_norm_weight": norms[0],
                f"{new}mlp.linear_fc1.layer_norm_weight": norms[1],
            }
    return out


def stages(
    config: ModelConfig, convention: Convention, tensors: dict[str, Tensor], prompts: Tensor
) -> dict[tuple[str, int | None], Tensor]:
    traced = trace(config, convention, whole_tensors(tensors.__getitem__), prompts)
    return {(name, index): out for name, index, out in traced}


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, as a fraction of the spread of `theirs`."""
    return ((ours - theirs).abs().max() / (theirs.max() - theirs.min())).item()


# ---- agreement with transformers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "convention"), CASES)
def test_logits_equal_transformers(name: str, convention: Convention, dtype: torch.dtype) -> None:
    config = CONFIGS[name]
    hf, prompts, logits = reference(config, dtype=dtype)
    tensors = stored(config, convention, {key: tensor.to(dtype) for key, tensor in hf.items()})
    ours = stages(config, convention, tensors, prompts)["logits", None]
    assert ours.dtype == torch.float32
    assert distance(ours, logits) <= BOUND


def test_window_equals_transformers_sdpa_too() -> None:
    config = CONFIGS["mistral window"]
    torch.manual_seed(0)
    model = transformers_model(config)
    model.set_attn_implementation("sdpa")
    prompts = default_prompts(config)
    with torch.no_grad():
        logits = model(prompts, use_cache=False).logits
    ours = stages(config, HF, model.state_dict(), prompts)["logits", None]
    assert distance(ours, logits) <= BOUND


HOOKS = {
    "llama": {
        "attention_norm": "input_layernorm",
        "attention": "self_attn",
        "mlp_norm": "post_attention_layernorm",
        "mlp": "mlp",
        "layer": "",
    },
    "falcon": {
        "attention_norm": "input_layernorm",
        "attention": "self_attention",
        "mlp": "mlp",
        "layer": "",
    },
}
HOOKS["falcon two norms"] = HOOKS["falcon"] | {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"}


@pytest.mark.parametrize(
    ("name", "hooks"),
    [
        ("mistral window", "llama"),
        ("falcon 7B", "falcon"),
        ("falcon 40B", "falcon two norms"),
        ("falcon2 11B", "falcon"),
    ],
)
def test_every_stage_equals_the_transformers_module(name: str, hooks: str) -> None:
    config = CONFIGS[name]
    torch.manual_seed(0)
    model = transformers_model(config)
    theirs: dict[tuple[str, int | None], Tensor] = {}

    def watch(module: torch.nn.Module, stage: str, index: int | None) -> None:
        def keep(_module, _inputs, output) -> None:
            # Falcon adds to the MLP's output in place.
            theirs[stage, index] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        module.register_forward_hook(keep)

    falcon = config.family == "falcon"
    watch(model.get_input_embeddings(), "embedding", None)
    for index, block in enumerate(model.transformer.h if falcon else model.model.layers):
        for stage, path in HOOKS[hooks].items():
            watch(block.get_submodule(path), stage, index)
    watch(model.transformer.ln_f if falcon else model.model.norm, "final_norm", None)
    watch(model.lm_head, "logits", None)
    prompts = default_prompts(config)
    with torch.no_grad():
        model(prompts, use_cache=False)

    ours = stages(config, HF, model.state_dict(), prompts)
    assert ours.keys() == theirs.keys()
    assert max(distance(ours[stage], theirs[stage]) for stage in ours) <= BOUND
    order = ["attention_norm", "attention", "mlp_norm", "mlp", "layer"]
    assert [stage for stage, index in ours if index == 1] == [stage for stage in order if stage in HOOKS[hooks]]


@pytest.mark.parametrize(("name", "convention"), [case for case in CASES if case.values[1] is not HF])
def test_two_sides_agree_stage_by_stage(name: str, convention: Convention) -> None:
    config = CONFIGS[name]
    hf, prompts, _ = reference(config)
    left = stages(config, HF, hf, prompts)
    right = stages(config, convention, stored(config, convention, hf), prompts)
    assert list(left) == list(right)
    assert max(distance(right[stage], left[stage]) for stage in left) <= BOUND


# ---- mistakes


def first_parting(left: dict, right: dict) -> tuple[str, int | None] | None:
    return next((stage for stage in left if not distance(right[stage], left[stage]) <= BOUND), None)


CONVENTION_FAULTS = {
    "rotary order": ({"interleaved_rotary": lambda c: not c.interleaved_rotary}, ("attention", 0)),
    "gate and up": ({"gate_first": lambda c: not c.gate_first}, ("mlp", 0)),
    "groups": ({"grouped_qkv": lambda c: False}, ("attention", 0)),
}


@pytest.mark.parametrize(
    ("convention", "fault"),
    [
        pytest.param(convention, fault, id=f"{convention.title}-{fault}")
        for convention in (HF, META, MEGATRON_LLM, MEGATRON_CORE)
        for fault in CONVENTION_FAULTS
        if fault != "groups" or len(convention.names.qkv) == 1
    ],
)
def test_a_wrong_convention_is_far_beyond_the_bound(convention: Convention, fault: str) -> None:
    hf, prompts, logits = reference(LLAMA)
    changes, place = CONVENTION_FAULTS[fault]
    wrong = replace(convention, **{field: change(convention) for field, change in changes.items()})
    tensors = stored(LLAMA, convention, hf)
    found = stages(LLAMA, wrong, tensors, prompts)
    assert first_parting(stages(LLAMA, convention, tensors, prompts), found) == place
    assert distance(found["logits", None], logits) > 1000 * BOUND


CONFIG_FAULTS = {
    "theta": ("codellama theta", {"rope_theta": 1e4}, ("attention", 0)),
    "eps": ("llama", {"layernorm_epsilon": 1e-5}, ("attention_norm", 0)),
    "falcon eps": ("falcon 40B", {"layernorm_epsilon": 1e-6}, ("attention_norm", 0)),
    "no window": ("mistral window", {"sliding_window": None}, ("attention", 0)),
    "window off by one": ("mistral window", {"sliding_window": 8}, ("attention", 0)),
    "rope scaling": ("llama2 linear scaling", {"rope_scaling_factor": 1.0}, ("attention", 0)),
    "head tied by mistake": ("llama2 grouped", {"tie_word_embeddings": True}, ("logits", None)),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_wrong_config_is_far_beyond_the_bound(fault: str) -> None:
    name, changes, place = CONFIG_FAULTS[fault]
    config = CONFIGS[name]
    # 0.02 is what models are made with, and the size of the embedding decides what eps does.
    hf, prompts, logits = reference(config, initializer_range=0.02 if "eps" in fault else 0.08)
    found = stages(replace(config, **changes), HF, hf, prompts)
    assert first_parting(stages(config, HF, hf, prompts), found) == place
    assert distance(found["logits", None], logits) > 100 * BOUND


L1 = "language_model.encoder.layers.1."
L2 = "language_model.encoder.layers.2."


def _swap(tensors: dict[str, Tensor], a: str, b: str) -> None:
    tensors[a], tensors[b] = tensors[b], tensors[a]


def _deinterleave(tensors: dict[str, Tensor], which: slice) -> None:
    """Leaves heads `which` of every group of layer 1 without the rotary permutation."""
    name, dim = f"{L1}self_attention.query_key_value.weight", LLAMA.head_dim
    groups = tensors[name].clone().unflatten(0, (LLAMA.num_query_groups, -1, dim))
    groups[:, which] = torch.cat([groups[:, which, 0::2], groups[:, which, 1::2]], dim=2)
    tensors[name] = groups.flatten(0, 2)


def _permute_rows(tensors: dict[str, Tensor], name: str, blocks: int, order: list[int]) -> None:
    chunks = tensors[name].chunk(blocks)
    tensors[name] = torch.cat([chunks[i] for i in order])


def _shift_rows(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = torch.cat([tensors[name][:1], tensors[name][:-1]])


WEIGHT_FAULTS = {
    "q not permuted": (lambda t: _deinterleave(t, slice(0, 4)), ("attention", 1)),
    "k not permuted": (lambda t: _deinterleave(t, slice(4, 5)), ("attention", 1)),
    "v permuted": (lambda t: _deinterleave(t, slice(5, 6)), ("attention", 1)),
    "groups exchanged": (
        lambda t: _permute_rows(t, f"{L1}self_attention.query_key_value.weight", 2, [1, 0]),
        ("attention", 1),
    ),
    "GLU cut as one block": (lambda t: _permute_rows(t, f"{L1}mlp.dense_h_to_4h.weight", 4, [0, 2, 1, 3]), ("mlp", 1)),
    "layers exchanged": (
        lambda t: _swap(t, f"{L1}self_attention.dense.weight", f"{L2}self_attention.dense.weight"),
        ("attention", 1),
    ),
    "norm left at ones": (
        lambda t: t.update({f"{L1}post_attention_layernorm.weight": torch.ones(LLAMA.hidden_size)}),
        ("mlp_norm", 1),
    ),
    "final norm left at ones": (
        lambda t: t.update({"language_model.encoder.final_layernorm.weight": torch.ones(LLAMA.hidden_size)}),
        ("final_norm", None),
    ),
    "embedding shifted": (
        lambda t: _shift_rows(t, "language_model.embedding.word_embeddings.weight"),
        ("embedding", None),
    ),
    "head shifted": (lambda t: _shift_rows(t, "language_model.lm_head"), ("logits", None)),
    "one NaN": (lambda t: t[f"{L2}mlp.dense_4h_to_h.weight"][3, 5].fill_(float("nan")), ("mlp", 2)),
}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_a_wrong_tensor_is_found_in_its_place(fault: str) -> None:
    hf, prompts, logits = reference(LLAMA)
    spoil, place = WEIGHT_FAULTS[fault]
    tensors = {name: tensor.clone() for name, tensor in stored(LLAMA, MEGATRON_LLM, hf).items()}
    spoil(tensors)
    found = stages(LLAMA, MEGATRON_LLM, tensors, prompts)
    assert first_parting(stages(LLAMA, HF, hf, prompts), found) == place
    assert not distance(found["logits", None], logits) <= 1000 * BOUND


@pytest.mark.parametrize("names", [("ln_attn.weight", "ln_mlp.weight"), ("ln_attn.bias", "ln_mlp.bias")])
def test_falcon_norms_exchanged(names: tuple[str, str]) -> None:
    config = CONFIGS["falcon 40B"]
    hf, prompts, logits = reference(config)
    right = stages(config, HF, hf, prompts)
    _swap(hf, f"transformer.h.1.{names[0]}", f"transformer.h.1.{names[1]}")
    found = stages(config, HF, hf, prompts)
    assert first_parting(right, found) == ("attention_norm", 1)
    assert distance(found["logits", None], logits) > 1000 * BOUND


def test_a_hypothesis_about_one_layer_mends_it() -> None:
    """What a report does to name a cause: the same layer, from the same input, under another convention."""
    hf, prompts, _ = reference(LLAMA)
    right = stages(LLAMA, HF, hf, prompts)
    tensors = stored(LLAMA, MEGATRON_LLM, hf)
    _permute_rows(tensors, f"{L1}mlp.dense_h_to_4h.weight", 2, [1, 0])
    weights, entry = whole_tensors(tensors.__getitem__), right["layer", 0]

    def mlp(convention: Convention) -> Tensor:
        return next(out for stage, _, out in forward.layer(LLAMA, convention, weights, 1, entry) if stage == "mlp")

    assert distance(mlp(MEGATRON_LLM), right["mlp", 1]) > 1000 * BOUND
    assert distance(mlp(replace(MEGATRON_LLM, gate_first=True)), right["mlp", 1]) <= BOUND


# ---- what is read


@pytest.mark.parametrize(("name", "convention"), CASES)
def test_reads_every_row_once_in_blocks_and_no_padding(
    name: str, convention: Convention, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIGS[name]
    monkeypatch.setattr(linear, "BLOCK_ELEMENTS", 1000)
    hf, prompts, logits = reference(config)
    tensors = stored(config, convention, hf)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    reads: dict[str, list[int]] = {}

    def weights(key: str, rows: slice | None) -> Tensor:
        tensor = tensors[key] if rows is None else tensors[key][rows]
        reads.setdefault(key, []).extend(range(*(rows or slice(None)).indices(len(tensors[key]))))
        assert rows is None or (rows.start < rows.stop <= len(tensors[key]) and rows.step is None)
        assert tensor.numel() <= 1000
        return tensor

    ours = {stage: out for stage, _, out in trace(config, convention, weights, prompts)}["logits"]
    assert distance(ours, logits) <= BOUND
    assert reads.keys() == tensors.keys()
    names = convention.names_for(config)
    looked_up, vocabulary = sorted(set(prompts.flatten().tolist())), list(range(config.vocab_size))
    for key, rows in reads.items():
        if key == names.embedding:
            assert rows == looked_up + (vocabulary if config.tie_word_embeddings else [])
        else:
            assert rows == list(range(len(rows)))
            assert len(rows) == (config.vocab_size if key == names.head else len(tensors[key]))


def test_no_layer_is_read_before_its_turn() -> None:
    hf, prompts, _ = reference(LLAMA)
    read: set[str] = set()

    def weights(key: str, rows: slice | None) -> Tensor:
        read.add(key)
        return hf[key] if rows is None else hf[key][rows]

    for _stage, index, _out in trace(LLAMA, HF, weights, prompts):
        layers = {int(key.split(".")[2]) for key in read if key.startswith("model.layers.")}
        assert index is None or layers == set(range(index + 1))
    assert read == hf.keys()


def test_whole_tensors_keeps_one() -> None:
    count: list[str] = []
    weights = whole_tensors(lambda name: count.append(name) or torch.arange(10))
    assert weights("a", slice(2, 4)).tolist() == [2, 3]
    assert weights("a", None).tolist() == list(range(10))
    weights("b", slice(0, 1))
    weights("a", slice(0, 1))
    assert count == ["a", "b", "a"]


def test_a_second_copy_of_a_tied_table_can_be_the_head() -> None:
    config = CONFIGS["falcon 7B"]
    hf, prompts, logits = reference(config)
    tensors = stored(config, MEGATRON_LLM, hf)
    table = tensors["language_model.embedding.word_embeddings.weight"]
    tensors["word_embeddings_for_head.weight"] = table.roll(1, 0).nan_to_num()
    weights = whole_tensors(tensors.__getitem__)
    out = {}
    for head in (None, "word_embeddings_for_head.weight"):
        *_, (_, _, out[head]) = trace(config, MEGATRON_LLM, weights, prompts, head=head)
    assert distance(out[None], logits) <= BOUND
    assert distance(out["word_embeddings_for_head.weight"], logits) > 1000 * BOUND


# ---- refusals


def test_a_tensor_of_another_shape_is_named() -> None:
    hf, prompts, _ = reference(LLAMA)
    hf["model.layers.1.self_attn.k_proj.weight"] = hf["model.layers.1.self_attn.k_proj.weight"][:-1]
    with pytest.raises(
        ConversionError, match=r"layers\.1\.self_attn\.k_proj\.weight, rows 0 to 16, has shape \(15, 64\)"
    ):
        stages(LLAMA, HF, hf, prompts)


@pytest.mark.parametrize("convention", [META, MEGATRON_CORE], ids=lambda c: c.title)
def test_falcon_is_refused_where_it_cannot_be_stored(convention: Convention) -> None:
    with pytest.raises(ConversionError, match="cannot hold a falcon model"):
        next(trace(FALCON, convention, whole_tensors({}.__getitem__), default_prompts(FALCON)))


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    for token in (-1, LLAMA.vocab_size):
        with pytest.raises(ValueError, match="token ids must be"):
            next(trace(LLAMA, HF, whole_tensors({}.__getitem__), torch.tensor([[token]])))


# ---- prompts


@pytest.mark.parametrize("vocab_size", [2, 101, 32000, 65024, 256000])
def test_prompts_spread_over_the_vocabulary(vocab_size: int) -> None:
    config = replace(LLAMA, vocab_size=vocab_size)
    prompts = default_prompts(config)
    assert prompts.shape == (3, 24)
    assert prompts.dtype == torch.int64
    assert torch.equal(prompts, default_prompts(config))
    assert prompts.min() >= 0
    assert prompts.max() < vocab_size
    shards = {token * 8 // vocab_size for token in prompts.flatten().tolist()}
    assert len(shards) == min(8, vocab_size)  # every rank of TP 8 is looked up


def test_prompts_exceed_a_short_window_only() -> None:
    assert default_prompts(replace(LLAMA, sliding_window=7)).shape == (3, 24)
    assert default_prompts(replace(LLAMA, sliding_window=32)).shape == (3, 40)
    assert default_prompts(replace(LLAMA, sliding_window=4096)).shape == (3, 24)
    assert default_prompts(LLAMA, count=2, length=5).shape == (2, 5)


# ---- what the original code wrote


class _Enum:
    """Stands for Megatron's enums, which the forward pass has no use for."""

    def __init__(self, *_args) -> None: ...


def _load(path: Path) -> dict:
    import numpy

    reconstruct = numpy.zeros(1).__reduce__()[0]  # of the one module's two names, across numpy 1 and 2
    allowed = [
        argparse.Namespace,
        (_Enum, "megatron.model.enums.PositionEmbeddingType"),
        (_Enum, "megatron.model.enums.ModelType"),
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        numpy.ndarray,
        numpy.dtype,
        type(numpy.dtype("uint32")),
        (codecs.encode, "_codecs.encode"),
    ]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, weights_only=True, mmap=True)


def _golden_config(case: Path) -> ModelConfig:
    """From the files that stand beside the weights, by hand."""
    family = json.loads((case / "case.json").read_text())["family"]
    if (case / "meta").is_dir():
        made = json.loads((case / "case.json").read_text())
        params = json.loads((case / "meta" / "params.json").read_text())
        heads = params["n_heads"]
        return ModelConfig(
            family, params["n_layers"], params["dim"], made["ffn"], heads, heads, params["dim"] // heads,
            made["vocab"], 2048, params["norm_eps"],
        )  # fmt: skip
    raw = json.loads((case / "hf" / "config.json").read_text())
    heads = raw["num_attention_heads"]
    dim = raw.get("head_dim") or raw["hidden_size"] // heads
    common: dict[str, Any] = {
        "family": family,
        "num_layers": raw["num_hidden_layers"],
        "hidden_size": raw["hidden_size"],
        "num_attention_heads": heads,
        "head_dim": dim,
        "vocab_size": raw["vocab_size"],
        "max_position_embeddings": raw["max_position_embeddings"],
        "rope_theta": (raw.get("rope_parameters") or raw)["rope_theta"],
        "tie_word_embeddings": raw["tie_word_embeddings"],
    }
    if family == "falcon":
        return ModelConfig(**common, ffn_hidden_size=raw["ffn_hidden_size"], num_query_groups=1, layernorm_epsilon=1e-5)
    return ModelConfig(
        **common,
        ffn_hidden_size=raw["intermediate_size"],
        num_query_groups=raw["num_key_value_heads"],
        layernorm_epsilon=raw["rms_norm_eps"],
    )


def _join(ranks: list[Tensor], name: str, glu: bool) -> Tensor:
    if len(ranks) == 1 or "norm" in name:
        return ranks[0]
    if name.endswith("dense_h_to_4h.weight") and glu:
        halves = [rank.chunk(2) for rank in ranks]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    columns = name.endswith(("dense.weight", "dense_4h_to_h.weight"))
    return torch.cat(ranks, dim=1 if columns else 0)


def _golden_megatron(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Full tensors in the training spelling, from all ranks of one checkpoint."""
    stages_of: dict[int, list[dict[str, Tensor]]] = {}
    for path in sorted(folder.glob("*/mp_rank_*/model_optim_rng.pt")):
        stage = int(path.parent.name.split("_")[3]) if path.parent.name.count("_") == 3 else 0
        model = _load(path)["model"]
        flat: dict[str, Tensor] = {}
        for part, tensors in model["language_model"].items():
            if isinstance(tensors, Tensor):
                flat[f"language_model.{part}"] = tensors
            for name, tensor in tensors.items() if isinstance(tensors, dict) else ():
                name, tensor = (f"{name}.weight", tensor["weight"]) if isinstance(tensor, dict) else (name, tensor)
                name = name.replace(".attention.", ".self_attention.")
                flat[f"language_model.{'encoder' if part == 'transformer' else part}.{name}"] = tensor
        if "word_embeddings_for_head" in model:
            flat["word_embeddings_for_head.weight"] = model["word_embeddings_for_head"]["weight"]
        stages_of.setdefault(stage, []).append(flat)
    out: dict[str, Tensor] = {}
    for stage, ranks in stages_of.items():
        for name in ranks[0]:
            words = name.split(".")
            if "layers" in words:
                at = words.index("layers") + 1
                words[at] = str(int(words[at]) + stage * config.num_layers // len(stages_of))
            out[".".join(words)] = _join([rank[name] for rank in ranks], name, config.family != "falcon")
    return out


def _golden_source(case: Path) -> tuple[Convention, dict[str, Tensor]]:
    from safetensors.torch import load_file

    if (case / "hf").is_dir():
        return HF, load_file(case / "hf" / "model.safetensors")
    ranks = [torch.load(path, weights_only=True) for path in sorted((case / "meta").glob("consolidated.*.pth"))]
    by_columns = ("wo.weight", "w2.weight", "tok_embeddings.weight")
    return META, {
        name: tensor if tensor.ndim == 1 else torch.cat([rank[name] for rank in ranks], int(name.endswith(by_columns)))
        for name, tensor in ranks[0].items()
    }


@pytest.mark.parametrize("folder", [pytest.param(path, id=f"{path.parent.name}-{path.name}") for path in LLM_FOLDERS])
def test_golden_checkpoints_agree_with_their_source(folder: Path) -> None:
    config = _golden_config(folder.parent)
    convention, source = _golden_source(folder.parent)
    megatron = _golden_megatron(folder, config)
    prompts = default_prompts(config)
    left = stages(config, convention, source, prompts)
    right = stages(config, MEGATRON_LLM, megatron, prompts)
    assert max(distance(right[stage], left[stage]) for stage in left) <= BOUND
    if "word_embeddings_for_head.weight" in megatron:
        weights = whole_tensors(megatron.__getitem__)
        *_, (_, _, logits) = trace(config, MEGATRON_LLM, weights, prompts, head="word_embeddings_for_head.weight")
        assert distance(logits, left["logits", None]) <= BOUND
    wrong = stages(config, replace(MEGATRON_LLM, interleaved_rotary=False), megatron, prompts)
    assert distance(wrong["logits", None], left["logits", None]) > 1000 * BOUND
