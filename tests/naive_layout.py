"""A slow, literal statement of where every row of a Hugging Face model stands in a Megatron-LLM checkpoint.

Nothing is shared with the converter: loops over heads and groups, plain slices, lists of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Ranks = dict[tuple[int, int, int], dict[str, Tensor]]


@dataclass(frozen=True)
class Facts:
    """What the rule needs to know of a model, as its config.json has it."""

    falcon: bool
    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    two_norms: bool
    tied: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> Facts:
        falcon = config["model_type"] == "falcon"
        heads = config["num_attention_heads"]
        new = falcon and config["new_decoder_architecture"]
        kv_heads = config.get("num_kv_heads" if falcon else "num_key_value_heads") or heads
        return cls(
            falcon=falcon,
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            groups=1 if falcon and not new else kv_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            two_norms=new and config.get("num_ln_in_parallel_attn") in (None, 2),
            tied=config.get("tie_word_embeddings", falcon),
        )


def interleave(head: Tensor) -> Tensor:
    """[d, H]: pair i of the rotation is rows (i, d/2 + i) in Hugging Face and rows (2i, 2i + 1) in Megatron-LLM."""
    half = head.shape[0] // 2
    rows = []
    for pair in range(half):
        rows += [head[pair], head[half + pair]]
    return torch.stack(rows)


def query_key_value(facts: Facts, hf: dict[str, Tensor], layer: int) -> list[Tensor]:
    """The groups of one layer's QKV, each [q .. q, k, v] with q and k interleaved."""
    d, per_group = facts.head_dim, facts.heads // facts.groups
    groups = []
    if facts.falcon:
        fused = hf[f"transformer.h.{layer}.self_attention.query_key_value.weight"]
        for g in range(facts.groups):
            block = fused[g * (per_group + 2) * d : (g + 1) * (per_group + 2) * d]
            heads = [block[i * d : (i + 1) * d] for i in range(per_group + 2)]
            groups.append(torch.cat([interleave(head) for head in heads[:-1]] + [heads[-1]]))
        return groups
    prefix = f"model.layers.{layer}.self_attn"
    q, k, v = (hf[f"{prefix}.{name}_proj.weight"] for name in "qkv")
    for g in range(facts.groups):
        parts = []
        for head in range(g * per_group, (g + 1) * per_group):
            parts.append(interleave(q[head * d : (head + 1) * d]))
        parts.append(interleave(k[g * d : (g + 1) * d]))
        parts.append(v[g * d : (g + 1) * d])
        groups.append(torch.cat(parts))
    return groups


def padded_rows(rows: int, tp: int, divisible_by: int = 128) -> int:
    while rows % (divisible_by * tp):
        rows += 1
    return rows


def pad(table: Tensor, rows: int) -> Tensor:
    """Added rows repeat the last one."""
    return torch.cat([table] + [table[-1:]] * (rows - table.shape[0]))


def rows_of(tensor: Tensor, rank: int, tp: int) -> Tensor:
    each = tensor.shape[0] // tp
    assert each * tp == tensor.shape[0]
    return tensor[rank * each : (rank + 1) * each]


def columns_of(tensor: Tensor, rank: int, tp: int) -> Tensor:
    each = tensor.shape[1] // tp
    assert each * tp == tensor.shape[1]
    return tensor[:, rank * each : (rank + 1) * each]


def layer_tensors(facts: Facts, hf: dict[str, Tensor], layer: int, rank: int, tp: int) -> dict[str, Tensor]:
    """One rank's share of one layer, names without the layer's prefix."""
    groups = query_key_value(facts, hf, layer)
    each = facts.groups // tp
    assert each * tp == facts.groups
    out = {"self_attention.query_key_value.weight": torch.cat(groups[rank * each : (rank + 1) * each])}
    if facts.falcon:
        p = f"transformer.h.{layer}"
        norms = {"input_layernorm": "ln_attn", "mlp_layernorm": "ln_mlp"}
        if not facts.two_norms:
            norms = {"input_layernorm": "input_layernorm"}
        for ours, theirs in norms.items():
            for part in ("weight", "bias"):
                out[f"{ours}.{part}"] = hf[f"{p}.{theirs}.{part}"]
        out["self_attention.dense.weight"] = columns_of(hf[f"{p}.self_attention.dense.weight"], rank, tp)
        out["mlp.dense_h_to_4h.weight"] = rows_of(hf[f"{p}.mlp.dense_h_to_4h.weight"], rank, tp)
        out["mlp.dense_4h_to_h.weight"] = columns_of(hf[f"{p}.mlp.dense_4h_to_h.weight"], rank, tp)
        return out
    p = f"model.layers.{layer}"
    out["input_layernorm.weight"] = hf[f"{p}.input_layernorm.weight"]
    out["post_attention_layernorm.weight"] = hf[f"{p}.post_attention_layernorm.weight"]
    out["self_attention.dense.weight"] = columns_of(hf[f"{p}.self_attn.o_proj.weight"], rank, tp)
    up = rows_of(hf[f"{p}.mlp.up_proj.weight"], rank, tp)
    gate = rows_of(hf[f"{p}.mlp.gate_proj.weight"], rank, tp)
    out["mlp.dense_h_to_4h.weight"] = torch.cat([up, gate])
    out["mlp.dense_4h_to_h.weight"] = columns_of(hf[f"{p}.mlp.down_proj.weight"], rank, tp)
    return out


def megatron_ranks(
    config: dict[str, Any], hf: dict[str, Tensor], tp: int = 1, pp: int = 1, vpp: int = 1, rows: int | None = None
) -> Ranks:
    """{(tensor rank, stage, chunk): {name in the training spelling: tensor}}; `rows` are the padded rows, if any."""
    facts = Facts.of(config)
    embedding = hf["transformer.word_embeddings.weight" if facts.falcon else "model.embed_tokens.weight"]
    head = embedding if facts.tied else hf["lm_head.weight"]
    rows = rows or embedding.shape[0]
    in_chunk = facts.layers // (pp * vpp)
    assert in_chunk * pp * vpp == facts.layers
    ranks: Ranks = {}
    for rank in range(tp):
        for stage in range(pp):
            for chunk in range(vpp):
                ranks[rank, stage, chunk] = here = {}
                if stage == 0 and chunk == 0:
                    here["embedding.word_embeddings.weight"] = rows_of(pad(embedding, rows), rank, tp)
                for local in range(in_chunk):
                    layer = chunk * (facts.layers // vpp) + stage * in_chunk + local
                    for name, tensor in layer_tensors(facts, hf, layer, rank, tp).items():
                        here[f"encoder.layers.{local}.{name}"] = tensor
                if stage == pp - 1 and chunk == vpp - 1:
                    final = "transformer.ln_f" if facts.falcon else "model.norm"
                    here["encoder.final_layernorm.weight"] = hf[f"{final}.weight"]
                    if facts.falcon:
                        here["encoder.final_layernorm.bias"] = hf[f"{final}.bias"]
                    if not facts.tied:
                        here["lm_head"] = rows_of(pad(head, rows), rank, tp)
                    elif pp > 1:
                        here["word_embeddings_for_head.weight"] = rows_of(pad(embedding, rows), rank, tp)
    return ranks


def meta_to_huggingface(meta: list[dict[str, Tensor]], heads: int, groups: int) -> dict[str, Tensor]:
    """Meta's parts joined and renamed, q and k brought from pairs to halves: what a Hugging Face folder would hold."""

    def joined(name: str, dim: int | None) -> Tensor:
        parts = [part[name] for part in meta]
        return parts[0] if dim is None else torch.cat(parts, dim)

    def halves(tensor: Tensor, count: int) -> Tensor:
        d = tensor.shape[0] // count
        rows = []
        for head in range(count):
            rows += [tensor[head * d + i] for i in range(0, d, 2)]
            rows += [tensor[head * d + i] for i in range(1, d, 2)]
        return torch.stack(rows)

    out = {
        "model.embed_tokens.weight": joined("tok_embeddings.weight", 1),
        "model.norm.weight": joined("norm.weight", None),
        "lm_head.weight": joined("output.weight", 0),
    }
    layers = 1 + max(int(name.split(".")[1]) for name in meta[0] if name.startswith("layers."))
    for i in range(layers):
        m, h = f"layers.{i}", f"model.layers.{i}"
        out[f"{h}.self_attn.q_proj.weight"] = halves(joined(f"{m}.attention.wq.weight", 0), heads)
        out[f"{h}.self_attn.k_proj.weight"] = halves(joined(f"{m}.attention.wk.weight", 0), groups)
        out[f"{h}.self_attn.v_proj.weight"] = joined(f"{m}.attention.wv.weight", 0)
        out[f"{h}.self_attn.o_proj.weight"] = joined(f"{m}.attention.wo.weight", 1)
        out[f"{h}.mlp.gate_proj.weight"] = joined(f"{m}.feed_forward.w1.weight", 0)
        out[f"{h}.mlp.down_proj.weight"] = joined(f"{m}.feed_forward.w2.weight", 1)
        out[f"{h}.mlp.up_proj.weight"] = joined(f"{m}.feed_forward.w3.weight", 0)
        out[f"{h}.input_layernorm.weight"] = joined(f"{m}.attention_norm.weight", None)
        out[f"{h}.post_attention_layernorm.weight"] = joined(f"{m}.ffn_norm.weight", None)
    return out
