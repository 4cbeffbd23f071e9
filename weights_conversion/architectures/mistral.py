"""Mistral 7B: Llama 2's parameters with grouped queries; the sliding window is in its config."""

from weights_conversion.architectures.llama import architecture

MISTRAL = architecture("mistral")
