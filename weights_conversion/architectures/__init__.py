"""The families: one file each, with its rows and every fact that is true of it and of no other.

FAMILIES' keys are the scripts' choices. A new family is one file, and one line here.
"""

from weights_conversion.architectures.codellama import CODELLAMA
from weights_conversion.architectures.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from weights_conversion.architectures.falcon import FALCON
from weights_conversion.architectures.family import Family
from weights_conversion.architectures.gemma3 import GEMMA3
from weights_conversion.architectures.glm4_moe import GLM4_MOE
from weights_conversion.architectures.glm4_moe_lite import GLM4_MOE_LITE
from weights_conversion.architectures.gpt_oss import GPT_OSS
from weights_conversion.architectures.llama import LLAMA, LLAMA2
from weights_conversion.architectures.llama3 import LLAMA3
from weights_conversion.architectures.mistral import MISTRAL
from weights_conversion.architectures.mixtral import MIXTRAL
from weights_conversion.architectures.nemotron_h import NEMOTRON_H
from weights_conversion.architectures.qwen2 import QWEN2
from weights_conversion.architectures.qwen2_moe import QWEN2_MOE
from weights_conversion.architectures.qwen3 import QWEN3
from weights_conversion.architectures.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from weights_conversion.architectures.qwen3_moe import QWEN3_MOE
from weights_conversion.architectures.qwen3_next import QWEN3_NEXT

_DENSE = (CODELLAMA, FALCON, GEMMA3, LLAMA, LLAMA2, LLAMA3, MISTRAL, QWEN2, QWEN3)
_EXPERTS = (GLM4_MOE, GPT_OSS, MIXTRAL, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE_LITE)
_HYBRIDS = (NEMOTRON_H, QWEN3_NEXT, QWEN3_5, QWEN3_5_MOE)
FAMILIES: dict[str, Family] = {family.family: family for family in (*_DENSE, *_EXPERTS, *_HYBRIDS)}
