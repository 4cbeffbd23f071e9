"""The five families."""

from weights_conversion.architectures.codellama import CODELLAMA
from weights_conversion.architectures.falcon import FALCON
from weights_conversion.architectures.llama import LLAMA, LLAMA2
from weights_conversion.architectures.mistral import MISTRAL
from weights_conversion.mapping.parameters import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    "codellama": CODELLAMA,
    "falcon": FALCON,
    "llama": LLAMA,
    "llama2": LLAMA2,
    "mistral": MISTRAL,
}
