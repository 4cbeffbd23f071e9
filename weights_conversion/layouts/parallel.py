"""What a layout asks of a model: sizes that divide, and virtual stages."""

from __future__ import annotations

from dataclasses import replace

from weights_conversion.config import ModelConfig, Parallelism
from weights_conversion.errors import ConversionError
from weights_conversion.mapping.dialects import Dialect


def with_virtual(parallel: Parallelism, layers_per_stage: int | None, num_layers: int) -> Parallelism:
    """`parallel` with interleaved stages of so many layers each; None: they are not interleaved."""
    if layers_per_stage is None:
        return parallel
    if num_layers % (parallel.pipeline * layers_per_stage):
        raise ConversionError(
            f"{num_layers} layers cannot be divided among {parallel.pipeline} pipeline stages with "
            f"--num-layers-per-virtual-pipeline-stage {layers_per_stage}"
        )
    return replace(parallel, virtual=num_layers // (parallel.pipeline * layers_per_stage))


def check_parallelism(config: ModelConfig, parallel: Parallelism, vocabulary: int, dialect: Dialect) -> list[str]:
    """What keeps `config` from being cut as `parallel` says, as sentences; `vocabulary` counts the padded rows."""
    tp, pp, vpp = parallel.tensor, parallel.pipeline, parallel.virtual
    layers = config.num_layers * (2 if parallel.hybrid else 1)
    groups = config.num_query_groups
    divisors = [n for n in range(1, tp + 1) if groups % n == 0 and config.num_attention_heads % n == 0]
    # Megatron-Core gathers a group that was cut in rows
    shared = (
        dialect.splits_groups
        and tp % groups == 0
        and config.axes["gated_qkv" if config.attention_output_gate else "qkv"] % tp == 0
    )
    checks = [
        (tp if shared else groups, "query groups (num_key_value_heads)",
         f"; {dialect.name} cannot share a group so, use one of {divisors}"),
        (config.num_attention_heads, "attention heads", ""),
        (0 if config.moe is not None and config.moe.everywhere else config.ffn_hidden_size,
         "MLP rows (ffn_hidden_size)", ""),
        (vocabulary, "vocabulary rows", "; --make-vocab-size-divisible-by pads them"),
    ]  # fmt: skip
    if config.mla is not None:
        del checks[0]
    pattern = config.hybrid_layer_pattern
    if pattern is not None:
        checks = [*(checks[:2] if "*" in pattern else []), *(checks[2:3] if "-" in pattern else []), *checks[3:]]
    if config.mamba is not None:
        checks.append((config.mamba.num_groups, "groups of its state space (n_groups)", ""))
    if config.gated_delta is not None:
        delta = config.gated_delta
        checks += [
            (delta.num_key_heads, "key heads of the linear attention (linear_num_key_heads)", ""),
            (delta.num_value_heads, "value heads of the linear attention (linear_num_value_heads)", ""),
        ]
    if config.moe is not None and config.moe.shared_ffn_hidden_size:
        checks.append((config.moe.shared_ffn_hidden_size, "rows of the shared experts", ""))
    problems = [
        f"{count} {what} cannot be divided among --tensor-model-parallel-size {tp}{hint}"
        for count, what, hint in checks
        if count % tp
    ]
    problems += _check_experts(config, parallel)
    if vpp > 1 and pp == 1:
        problems.append("virtual pipeline stages need --pipeline-model-parallel-size 2 or more, not 1")
    if parallel.layers:
        return problems
    if layers % pp:
        problems.append(f"{layers} layers cannot be divided among --pipeline-model-parallel-size {pp}")
    elif layers % (pp * vpp):
        problems.append(f"{layers} layers cannot be divided among {pp} pipeline stages of {vpp} virtual stages each")
    return problems


def _check_experts(config: ModelConfig, parallel: Parallelism) -> list[str]:
    ep, etp, moe = parallel.expert, parallel.experts_tensor, config.moe
    if moe is None:
        sizes = {
            "--expert-model-parallel-size": parallel.expert,
            "--expert-tensor-parallel-size": parallel.expert_tensor,
        }
        given = [name for name, size in sizes.items() if size not in (None, 1)]
        return [f"{' and '.join(given)} was given, but {config.family} has no experts"] if given else []
    problems = []
    if moe.num_experts % ep:
        problems.append(f"{moe.num_experts} experts cannot be divided among --expert-model-parallel-size {ep}")
    if moe.ffn_hidden_size % etp:
        problems.append(f"{moe.ffn_hidden_size} rows of an expert cannot be divided among the {etp} ranks that cut it")
    if moe.biased and etp != 1:
        problems.append(
            f"Megatron-Core cannot cut experts that have biases among {etp} ranks: add --expert-tensor-parallel-size 1"
        )
    elif parallel.tensor % etp:
        problems.append(
            f"--expert-tensor-parallel-size {etp} does not divide --tensor-model-parallel-size {parallel.tensor}, so "
            "several ranks would have one file name; torch_dist has no such limit (--ckpt-format torch_dist)"
        )
    return problems
