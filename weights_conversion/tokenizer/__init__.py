"""Tokenizer files in and out, with the ids that Megatron-LLM's tokenizer gave them in training."""

from weights_conversion.tokenizer.files import source_tokenizer_files
from weights_conversion.tokenizer.plan import TokenizerOptions, TokenizerPlan, plan_tokenizer
from weights_conversion.tokenizer.special_tokens import megatron_token_ids

__all__ = ["TokenizerOptions", "TokenizerPlan", "megatron_token_ids", "plan_tokenizer", "source_tokenizer_files"]
