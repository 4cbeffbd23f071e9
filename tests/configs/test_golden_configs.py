"""Configs of the hub's models and the args that Megatron-LM itself wrote for them say the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import REPOSITORY
from moe_families import CORE, NAMES, families

from weights_conversion.configs import core_args, core_foreign, hf_config, megatron_args
from weights_conversion.formats.iterations import find_iteration
from weights_conversion.formats.torch_dist import open_dist
from weights_conversion.sources.families import Features, decide_family, read_features

__all__ = ["families"]
GOLDEN = REPOSITORY.parent / "shared" / "golden"
CASES = ["core-mixtral", "core-qwen2-moe", "core-qwen3-moe", "core-deepseek-v2-lite", "core-deepseek-v3-fp8",
         "core-moonlight"]  # fmt: skip


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden files are not here")
@pytest.mark.parametrize("case", CASES)
def test_args_say_what_the_config_says(case: str) -> None:
    family = json.loads((GOLDEN / case / "case.json").read_text())["family"]
    raw = json.loads((GOLDEN / case / "hf" / "config.json").read_text())
    config = hf_config.read_config(family, raw, CORE, "config.json")
    folder, iteration = find_iteration(GOLDEN / case / "megatron-torch_dist", None)
    files = open_dist(folder, iteration)
    args = core_args.normalise(files.args, folder)
    args |= core_foreign.shown(files.names, args)
    assert core_foreign.foreign_tensors(files.names, family, folder) == []
    assert core_foreign.foreign_to_family(args, family, folder) == []
    assert core_foreign.unknown(args) == []
    assert decide_family({}, read_features(args, files.names, config.vocab_size)) == (family,)
    assert decide_family({}, read_features({}, files.names, config.vocab_size)) == (family,)  # by tensors alone
    assert megatron_args.resolve(family, args, None, {}, config.vocab_size).config == config
    others = {name for name in NAMES if name != family and not core_foreign.foreign_to_family(args, name, Path("x"))}
    assert others == set()


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ({"experts": True}, ("mixtral",)),
        ({"experts": True, "qk_norms": True}, ("qwen3-moe",)),
        ({"experts": True, "qkv_bias": True, "shared_experts": True, "shared_gate": True}, ("qwen2-moe",)),
        ({"experts": True, "qkv_bias": True, "shared_experts": True}, ()),
        ({"experts": True, "qkv_bias": True, "shared_experts": True, "sigmoid": True}, ("glm4-moe",)),
        ({"experts": True, "shared_experts": True, "sigmoid": True, "qk_norms": True}, ("glm4-moe",)),
        ({"experts": True, "shared_experts": True, "latent": True}, ("deepseek-v2",)),
        ({"experts": True, "shared_experts": True, "latent": True, "sigmoid": True}, ("deepseek-v3",)),
        ({"latent": True}, ()),
    ],
)
def test_what_a_checkpoint_shows(shown: dict[str, bool], expected: tuple[str, ...]) -> None:
    assert decide_family({}, Features(**shown)) == expected
