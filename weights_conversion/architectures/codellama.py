"""Code Llama: Llama 2's parameters; what differs (rope theta, context, vocabulary) is in its config."""

from weights_conversion.architectures.llama import architecture

CODELLAMA = architecture("codellama")
