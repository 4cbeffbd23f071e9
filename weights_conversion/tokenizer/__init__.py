"""Tokenizer files in and out, with the ids that Megatron-LLM's tokenizer gave them in training."""

from weights_conversion.tokenizer.files import source_tokenizer_files
from weights_conversion.tokenizer.plan import TokenizerOptions, TokenizerPlan, plan_tokenizer

__all__ = ["TokenizerOptions", "TokenizerPlan", "plan_tokenizer", "source_tokenizer_files"]
