"""The families: one file each, with its rows and every fact that is true of it and of no other.

FAMILIES' keys are the scripts' choices. A new family is one file, and one line here.
"""

from weights_conversion.architectures.codellama import CODELLAMA
from weights_conversion.architectures.falcon import FALCON
from weights_conversion.architectures.family import Family
from weights_conversion.architectures.llama import LLAMA, LLAMA2
from weights_conversion.architectures.llama3 import LLAMA3
from weights_conversion.architectures.mistral import MISTRAL
from weights_conversion.architectures.qwen2 import QWEN2
from weights_conversion.architectures.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {
    family.family: family for family in (CODELLAMA, FALCON, LLAMA, LLAMA2, LLAMA3, MISTRAL, QWEN2, QWEN3)
}
