"""What Nemotron-H's layers are, in each spelling: keys that are null say nothing, and are not written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hybrid_models as hm
import pytest
from transformers import AutoConfig

from weights_conversion.configs import exported, hf_config, hf_write
from weights_conversion.errors import ConversionError
from weights_conversion.mapping.dialects import MEGATRON_CORE

NAMES = ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp", "linear_attention"]
KEYS = ("hybrid_override_pattern", "layers_block_type", "layer_types")


def stated(**keys: Any) -> dict[str, Any]:
    return {key: value for key, value in hm.CONFIG.items() if key not in KEYS} | keys


@pytest.mark.parametrize(
    "keys",
    [
        {"hybrid_override_pattern": "M-M*-M", "layer_types": None},
        {"hybrid_override_pattern": "M-M*-M", "layers_block_type": None, "layer_types": None},
        {"hybrid_override_pattern": None, "layers_block_type": NAMES},
        {"layer_types": NAMES, "layers_block_type": None},
    ],
    ids=str,
)
def test_null_beside_what_says_it(keys: dict[str, Any], tmp_path: Path) -> None:
    """transformers takes some of these nulls for values, and refuses them: it reads what is written."""
    raw = stated(**keys)
    config = hf_config.read_config("nemotron-h", raw, MEGATRON_CORE, "config.json")
    assert config.hybrid_layer_pattern == "M-M*-M"
    written = hf_write.write_config(config, raw, "bfloat16")
    (tmp_path / "config.json").write_bytes(exported.as_json(written))
    assert AutoConfig.from_pretrained(tmp_path).layers_block_type == NAMES
    assert hf_config.read_config("nemotron-h", written, MEGATRON_CORE, "config.json") == config


def test_nothing_but_null() -> None:
    raw = stated(layer_types=None, layers_block_type=None)
    with pytest.raises(ConversionError, match="no hybrid_override_pattern, which says what each layer is"):
        hf_config.read_config("nemotron-h", raw, MEGATRON_CORE, "config.json")
