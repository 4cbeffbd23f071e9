"""A config.json is read by transformers' own classes too, and what the converter reads otherwise is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import delta_models
import pytest
import tiny_models as tm
from conftest import run

from weights_conversion.configs import hf_config
from weights_conversion.verification import sides
from weights_conversion.verification.hf_values import misread


@pytest.mark.parametrize("name", tm.MODELS)
def test_the_tiny_models_are_read_as_transformers_reads_them(name: str, sources: Callable[[str], Path]) -> None:
    model = sides.open_model(sources(name), tm.MODELS[name].family)
    assert misread(sources(name), model.config) == ([], [])


OVERLOOKED: dict[str, Any] = {
    "layernorm_epsilon": 1e-3,
    "rope_theta": 123.0,
    "rope_scaling_factor": 2.0,
    "sliding_window": 77,
    "tie_word_embeddings": True,
    "max_position_embeddings": 12,
    "num_query_groups": 3,
}


@pytest.mark.parametrize("field", OVERLOOKED)
def test_a_value_that_is_read_otherwise_is_named(field: str, sources: Callable[[str], Path]) -> None:
    folder = sources("mistral-v0.2")
    config = sides.open_model(folder, "mistral").config
    problems, _ = misread(folder, replace(config, **{field: OVERLOOKED[field]}))
    word = "rope" if field.startswith("rope") else field
    assert len(problems) == 1
    assert problems[0].startswith(f"{word} in config.json is ")


@pytest.mark.parametrize(
    ("key", "word"), [("rms_norm_eps", "layernorm_epsilon"), ("sliding_window", "sliding_window"), ("rope", "rope")]
)
def test_defaults_of_transformers_are_known(
    key: str, word: str, tmp_path: Path, sources: Callable[[str], Path]
) -> None:
    """Mistral's window is 4096 where config.json does not say so; the like holds of the others."""
    folder = sources("mistral-v0.1")
    raw = tm.read_json(folder / "config.json")
    for name in [name for name in raw if name.startswith(key)]:
        del raw[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = sides.open_model(folder, "mistral").config
    wrong = replace(config, layernorm_epsilon=0.5, sliding_window=None, rope_theta=5.0)
    problems, unknown = misread(tmp_path, wrong)
    assert any(sentence.startswith(word) for sentence in problems)
    assert unknown == []


def test_an_overlooked_value_on_both_sides_fails_verification(
    tmp_path: Path, sources: Callable[[str], Path], to_megatron, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = hf_config.read_config
    monkeypatch.setattr(hf_config, "read_config", lambda *given: replace(right(*given), rope_theta=5.0))
    source = sources("llama2")
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out").succeeded()
    result = run("weights_conversion.verify", source, tmp_path / "out", "--json", tmp_path / "found.json")
    found = tm.read_json(tmp_path / "found.json")
    assert result.code == 1
    assert found["exact"]["differences"] == []
    (problem,) = found["config"]["problems"]
    assert problem.startswith("source: rope in config.json is")


def test_a_model_type_that_transformers_does_not_know_is_a_note(tmp_path: Path, sources: Callable[[str], Path]) -> None:
    config = sides.open_model(sources("llama2"), "llama2").config
    (tmp_path / "config.json").write_text('{"model_type": "RefinedWebModel"}')
    problems, (note,) = misread(tmp_path, config)
    assert problems == []
    assert note.startswith("transformers cannot read config.json (")


def test_a_width_that_a_class_does_not_have_is_not_compared(tmp_path: Path) -> None:
    """Qwen3.5's class with experts has no intermediate_size: a file that states one is read as if it did not."""
    folder = delta_models.write(tmp_path / "hf", delta_models.DELTAS["3.5-moe"])
    raw = tm.read_json(folder / "config.json")
    raw.get("text_config", raw)["intermediate_size"] = 40
    (folder / "config.json").write_text(json.dumps(raw))
    config = sides.open_model(folder, "qwen3.5-moe").config
    assert misread(folder, config) == ([], [])
    assert config.moe is not None
    wrong = replace(config, moe=replace(config.moe, ffn_hidden_size=40))
    assert [problem.split()[0] for problem in misread(folder, wrong)[0]] == ["ffn_hidden_size"]
