"""Options that one command has and another does not: who gives one to the wrong command is told whose it is.

A table, since no command imports another; a test compares it with the parsers.
"""

from __future__ import annotations

IMPORT, EXPORT, VERIFY = "hf_to_megatron.py", "megatron_to_hf.py", "verify.py"
# Commands -> their options that the others lack, as they are documented there.
OPTIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    (IMPORT,): (
        "--ckpt-format", "--core-release", "--expert-model-parallel-size", "--expert-tensor-parallel-size",
        "--hybrid-layer-pattern", "--make-vocab-size-divisible-by", "--mla-down-proj-fusion", "--model-path",
        "--moe-grouped-gemm", "--moe-layer-freq", "--new-rows", "--num-layers-per-virtual-pipeline-stage", "--out",
        "--pipeline-model-parallel-size", "--revision", "--size", "--spec", "--target",
        "--tensor-model-parallel-size",
    ),
    (EXPORT,): (
        "--adapter_alpha", "--adapter_as", "--input_dir", "--new_tokens", "--no_new_tokens", "--no_tokenizer",
        "--num_output_shards", "--output_dir", "--override_special_tokens", "--reference", "--vocab_extra_ids_list",
        "--vocab_file", "--weights",
    ),
    (EXPORT, VERIFY): ("--model",),
    (IMPORT, EXPORT): (
        "--adapter", "--cache_dir", "--checksums", "--dry-run", "--dtype", "--filesystem-bandwidth",
        "--layernorm_epsilon", "--max_position_embeddings", "--overwrite", "--rank-rate", "--ranks",
        "--rope_scaling_factor", "--rope_theta", "--sliding_window_size", "--true_vocab_size", "--verify",
    ),
    (VERIFY,): ("--exact-only", "--plot"),
}  # fmt: skip


def having(name: str) -> str:
    """Whose option `name` is (without its dashes in front), in words; "": of no command, or of all of them."""
    plain = name.replace("_", "-")
    found = {option: owners for owners, options in OPTIONS.items() for option in options}
    option = next((each for each in found if each[2:].replace("_", "-") == plain), None)
    return "" if option is None else f"{option} is an option of {' and '.join(found[option])}"
