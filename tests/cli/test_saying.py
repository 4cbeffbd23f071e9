"""What is printed: one line for each thing said, short, and nothing that others wrote into it steers it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from string import ascii_lowercase

import pytest
import tiny_models as tm
import torch
from conftest import Script

from tests.robustness import sources as samples
from weights_conversion.errors import ConversionError, text
from weights_conversion.formats.stand_ins import EnumMember
from weights_conversion.launch import saying
from weights_conversion.sources import naming
from weights_conversion.verify import verify

GQA = tm.MODELS["llama2-gqa"]
FORGED = "x\nIDENTICAL   (0.0 s)\r\u2028the same\x1b[2J\u202e model\n"


def test_a_name_prints_no_lines_of_its_own(tmp_path: Path, to_megatron: Script) -> None:
    source = tm.write_huggingface(tmp_path / "hf", GQA, tensors={**GQA.tensors(), FORGED: torch.zeros(4)})
    said = to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out").refused(r"x\nIDENTICAL")
    assert len(said.err.splitlines()) == 1


def test_a_report_is_a_line_for_each_note(tmp_path: Path, to_megatron: Script) -> None:
    place = tmp_path / "a\nIDENTICAL   (0.0 s)\n"
    source = tm.write_huggingface(place, GQA, tokenizer=False)
    said = to_megatron("llama2", "--model-path", source, "--out", place / "out", "--verify").succeeded()
    assert sum(line.startswith("IDENTICAL") for line in said.text.splitlines()) == 1
    assert sum(line.startswith("IDENTICAL") for line in verify(source, place / "out").text().splitlines()) == 1


def test_a_log_is_a_line_for_each_record(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        saying.log_to_stderr()
        logging.getLogger("weights_conversion").warning("%s", FORGED)
    finally:
        root.handlers[:], root.level = before
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_many_problems_are_counted() -> None:
    lines = str(ConversionError(*(f"problem {letter}" for letter in ascii_lowercase[:24]))).splitlines()
    assert lines[0] == "24 problems:"
    assert lines[-2:] == ["  - problem j", "  - and 14 more"]
    assert len(lines) == 12


def test_a_sentence_has_an_end() -> None:
    said = str(ConversionError(f"begin {'x' * 34_000_000}\n end"))
    assert said.startswith("begin xxx")
    assert said.endswith(r"\n end")
    assert len(said) < 4100


def shared(times: int) -> list:
    value: list = ["x"]
    for _ in range(times):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1 << 5000, "<an integer of 5001 bits>"),
        ("a" * 1000, "'" + "a" * 97 + "..." + "a" * 98 + "'"),
        (list(range(100)), "[0, 1, 2, 3, 4, 5, 6, 7, ...]"),
        (shared(40), "[[[[...], [...]], [[...], [...]]], [[[...], [...]], [[...], [...]]]]"),
        (EnumMember("AttnBackend", 5), "AttnBackend 5"),
        (object(), "<object>"),
        (None, "None"),
        (torch.float16, "torch.float16"),
    ],
)
def test_short(value: object, shown: str) -> None:
    assert text.short(value) == shown


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("cannot reach http://alice:very/se@cret@hub/x", "cannot reach http://***@hub/x"),
        ("cannot reach http://carol:other@proxy:80", "cannot reach http://***@proxy:80"),
        ("a password, very/se@cret, alone", "a password, ***, alone"),
        ("sent hf_abcdefghijklmnopqrstuvwx", "sent hf_***"),
        ("my-own-token is refused", "*** is refused"),
        ("see https://huggingface.co/@user", "see https://huggingface.co/@user"),
    ],
)
def test_passwords_are_masked(said: str, shown: str) -> None:
    environment = {"HF_ENDPOINT": "http://alice:very/se@cret@hub", "HF_TOKEN": "my-own-token"}
    assert text.masked(said, environment) == shown


PREFIXES = ["module.", "_orig_mod.", "base_model.model.", "state_dict.model.module."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_behind_a_wrappers_prefix(prefix: str) -> None:
    missing = {name: f"no {name}" for name in GQA.tensors()}
    unexpected = {prefix + name: f"a {prefix}{name}" for name in missing}
    (said,) = naming.mismatch("the source", missing, unexpected)
    assert f"{len(missing)} tensors" in said
    assert repr(prefix) in said


def test_a_bare_model(tmp_path: Path, to_megatron: Script) -> None:
    """Saved from LlamaModel: no `model.` in front, and no head."""
    tensors = {name.removeprefix("model."): value for name, value in GQA.tensors().items() if "lm_head" not in name}
    source = tm.write_huggingface(tmp_path / "hf", GQA, tensors=tensors, tokenizer=False)
    said = to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out").refused("'model.'", "lm_head")
    assert len(said.err.splitlines()) == 1


def test_quantised_names(tmp_path: Path, to_megatron: Script) -> None:
    tensors = {
        name.replace(".weight", ".qweight") if "layers" in name else name: value
        for name, value in GQA.tensors().items()
    }
    source = tm.write_huggingface(tmp_path / "hf", GQA, tensors=tensors, tokenizer=False)
    said = to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out").refused("quantised")
    assert len(said.err.splitlines()) == 1


def test_another_programs_names_are_few_lines(tmp_path: Path, to_megatron: Script) -> None:
    tensors = {"".join(reversed(name)): value for name, value in GQA.tensors().items()}
    source = tm.write_huggingface(tmp_path / "hf", GQA, tensors=tensors, tokenizer=False)
    said = to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out").refused("has no tensor")
    assert len(said.err.splitlines()) <= 12


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_secrets_are_not_carried_on(tmp_path: Path, to_megatron: Script, to_hf: Script) -> None:
    source = tm.write_huggingface(tmp_path / "hf", GQA)
    secret = "hf_" + "s3cr3t" * 6
    config = {**GQA.config(), "hub_token": "not-to-be-seen", "a": {"api_key": "not-to-be-seen", "b": [{"c": secret}]}}
    tm.write_json(source / "config.json", config)
    tm.write_json(source / "generation_config.json", {"bos_token_id": 1, "use_auth_token": secret})
    settings = json.loads((source / "tokenizer_config.json").read_text())
    tm.write_json(source / "tokenizer_config.json", {**settings, "token": "not-to-be-seen"})
    line = ("--model-path", source, "--out", tmp_path / "out", "--verify")
    said = to_megatron("llama2", *line).succeeded()
    for name in ("hub_token", "a.api_key", "a.b.c", "use_auth_token", "token in"):
        assert name in said.text
    to_hf("--input_dir", tmp_path / "out", "--output_dir", tmp_path / "back").succeeded()
    for folder in ("out", "back"):
        for path in (tmp_path / folder).rglob("*.json"):
            assert "not-to-be-seen" not in path.read_text()
            assert secret not in path.read_text()
    assert settings.get("bos_token") == json.loads((tmp_path / "out/tokenizer_config.json").read_text())["bos_token"]


# --- closed descriptors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_closed_descriptors_change_neither_work_nor_code(closed: str, sources, tmp_path: Path) -> None:
    root, model = samples.TESTS.parent, sources("llama2-gqa")

    def ended(*line: object) -> subprocess.CompletedProcess:
        shell = ["sh", "-c", f'exec "$@" {closed}', "x", sys.executable, *map(str, line)]
        return subprocess.run(shell, cwd=root, capture_output=True, text=True, timeout=120)

    done = ended("hf_to_megatron.py", "llama2", "--model-path", model, "--out", tmp_path / "out")
    assert (done.returncode, "Traceback" in done.stderr + done.stdout) == (0, False), done.stderr
    proof = ended("-m", "weights_conversion.verify", model, tmp_path / "out", "--exact-only")
    assert proof.returncode == 0, proof.stderr
    again = ended("hf_to_megatron.py", "llama2", "--model-path", model, "--out", tmp_path / "out")
    assert again.returncode == 0, again.stderr
    refused = ended("hf_to_megatron.py", "llama2", "--model-path", tmp_path / "none", "--out", tmp_path / "other")
    assert (refused.returncode, "Traceback" in refused.stderr) == (1, False)
