"""Sliding windows of models with experts: every layer has it, as transformers reads the config; both ways, and computed
by the forward pass as by transformers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import moe_models
import pytest
import tiny_models as tm
import torch
import transformers
from moe_families import CONFIGS, from_args, read
from test_moe_config import args_of

from weights_conversion.configs import hf_config, hf_write
from weights_conversion.mapping.dialects import MEGATRON_CORE
from weights_conversion.verification.conventions import HF
from weights_conversion.verification.forward import trace
from weights_conversion.verification.whole import huggingface_weights

ON = {
    "mixtral": {"sliding_window": 7},
    "qwen3-moe": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
}


@pytest.mark.parametrize("family", ON)
def test_through_args_and_back(family: str) -> None:
    config = read(family, **ON[family])
    assert (config.sliding_window, config.window_layers) == (7, None)
    args = args_of(family, **ON[family])
    assert args["window_size"] == [6, 0]
    assert from_args(family, args) == config
    source = {**CONFIGS[family], **ON[family]}
    for base in (source, CONFIGS[family], {}):
        written = hf_write.write_config(config, base, "bfloat16")
        assert hf_config.read_config(family, written, MEGATRON_CORE, "config.json") == config
    assert {key: hf_write.write_config(config, source, "bfloat16")[key] for key in source} == source


@pytest.mark.parametrize(
    "off",
    [{"use_sliding_window": False, "sliding_window": 7}, {"sliding_window": 7}, {"use_sliding_window": True,
     "sliding_window": None}],
    ids=str,
)  # fmt: skip
def test_a_switch_that_is_off(off: dict[str, Any]) -> None:
    """sliding_window means nothing then, and stays as the source has it."""
    config = read("qwen3-moe", use_sliding_window=..., sliding_window=...)
    assert read("qwen3-moe", **off) == config
    source = {**CONFIGS["qwen3-moe"], **off}
    written = hf_write.write_config(config, source, "bfloat16")
    assert {key: written[key] for key in off} == off
    trained = dataclasses.replace(config, sliding_window=9)
    again = hf_write.write_config(trained, source, "bfloat16")
    assert (again["use_sliding_window"], again["sliding_window"]) == (True, 9)


@pytest.mark.parametrize("family", ON)
def test_both_ways(family: str, tmp_path: Path, to_megatron, to_hf) -> None:
    base = moe_models.MODELS[family]
    model = dataclasses.replace(base, changes=(*base.changes, *ON[family].items()))
    source = tm.write_huggingface(tmp_path / "hf", model, tokenizer=False)
    out = tmp_path / "mt"
    said = to_megatron(family, "--model-path", source, "--out", out, "--verify").succeeded()
    assert "--window-size 6,0" in said.out
    (out / "conversion_manifest.json").unlink()
    said = to_hf("--input_dir", out, "--output_dir", tmp_path / "back", "--no_tokenizer", "--verify").succeeded()
    assert f"model      {family}" in said.out
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: config[key] for key in ON[family] if key != "max_window_layers"} == {
        key: value for key, value in ON[family].items() if key != "max_window_layers"
    }
    ids = torch.arange(1, 33).view(1, -1)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        wanted = loaded(ids).logits[0]
    read_again = hf_config.read_config(family, config, MEGATRON_CORE, "config.json")
    *_, (_, _, found) = trace(read_again, HF, huggingface_weights(tmp_path / "back"), ids)
    assert (found[0] - wanted).abs().max() < 1e-5
    *_, (_, _, whole) = trace(
        dataclasses.replace(read_again, sliding_window=None), HF, huggingface_weights(tmp_path / "back"), ids
    )
    assert (whole[0] - wanted).abs().max() > 1e-2  # these prompts feel the window
