"""Files that are not what their names say: links, keys, pipes, pointers, and far too large ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_models as tm
from conftest import Script

from weights_conversion.tokenizer import content

GQA = tm.MODELS["llama2-gqa"]
KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n-----END OPENSSH PRIVATE KEY-----\n"
NO_TOKENIZER = {
    "key": KEY,
    "docker": '{"auths": {"registry": {"auth": "c2VjcmV0"}}}',
    "list": "[1, 2]",
    "text": "export PATH=$PATH:/opt/bin\nalias ll='ls -l'\n",
    "bytes": "\x00\x01\x02\x03",
    "deep": '{"a":' * 2000 + "1" + "}" * 2000,
    "deeper": "[" * 200_000,
}
FILES = [
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
]  # fmt: skip


def hf(tmp_path: Path) -> Path:
    return tm.write_huggingface(tmp_path / "hf", GQA)


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", NO_TOKENIZER)
def test_no_tokenizer_is_imported(what: str, name: str, tmp_path: Path, to_megatron: Script) -> None:
    """A shared model's file is a link to a private file of the user: none of its bytes are in OUT."""
    source = hf(tmp_path)
    (tmp_path / "private").write_text(NO_TOKENIZER[what])
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "private")
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out").refused(name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", ["key", "docker", "deep"])
def test_no_tokenizer_is_exported(what: str, name: str, imported, tmp_path: Path, to_hf: Script) -> None:
    source = Path(shutil.copytree(imported("llama2-gqa"), tmp_path / "source"))
    (source / name).write_text(NO_TOKENIZER[what])
    to_hf("--input_dir", source, "--output_dir", tmp_path / "out").refused(name)
    assert not (tmp_path / "out").exists()


def test_what_is_a_tokenizers_file(tmp_path: Path) -> None:
    """Also tiktoken's format, which Llama 3 calls tokenizer.model, and settings of few words."""
    for name, text in {
        "tokenizer.model": "IQ== 0\nIg== 1\nIw== 2\n",
        "tokenizer_config.json": '{"model_max_length": 4096}',
        "special_tokens_map.json": "{}",
        "added_tokens.json": '{"<pad>": 32000}',
        "chat_template.jinja": "{% for message in messages %}{{ message }}{% endfor %}",
        "tokenizer.json": '{"model": {"vocab": {"a": 0}}}',
    }.items():
        (tmp_path / name).write_text(text)
        content.check_files({name: tmp_path / name})


def test_links_that_leave_are_named(sources, tmp_path: Path, to_megatron: Script, to_hf: Script) -> None:
    source = hf(tmp_path)
    shutil.move(source / "tokenizer.model", tmp_path / "shared.model")
    (source / "tokenizer.model").symlink_to(tmp_path / "shared.model")
    shutil.move(source / "config.json", tmp_path / "shared.json")
    (source / "config.json").symlink_to(tmp_path / "shared.json")
    (source / "special").mkdir()
    shutil.move(source / "tokenizer_config.json", source / "special/tokenizer_config.json")
    (source / "tokenizer_config.json").symlink_to("special/tokenizer_config.json")
    said = to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out").succeeded().out
    assert f"{source / 'tokenizer.model'} is a link to {tmp_path / 'shared.model'}" in said
    assert f"{source / 'config.json'} is a link to {tmp_path / 'shared.json'}" in said
    assert "tokenizer_config.json is a link" not in said
    line = ("--input_dir", tmp_path / "out", "--output_dir", tmp_path / "back", "--vocab_file", source)
    assert "is a link to" in to_hf(*line).succeeded().out


def test_links_into_the_hubs_cache_are_usual(tmp_path: Path) -> None:
    folder, blob = tmp_path / "models--x/snapshots/abc", tmp_path / "models--x/blobs/123"
    folder.mkdir(parents=True)
    blob.parent.mkdir()
    blob.write_text("{}")
    (folder / "tokenizer.json").symlink_to("../../blobs/123")
    (folder / "tokenizer.model").symlink_to(tmp_path / "elsewhere")
    assert len(content.links([folder / "tokenizer.json", folder / "tokenizer.model"])) == 1


@pytest.mark.parametrize("mode", [0o600, 0o440, 0o644])
def test_a_copy_is_as_private_as_its_source(mode: int, tmp_path: Path, to_megatron: Script) -> None:
    source = hf(tmp_path)
    (source / "tokenizer.model").chmod(mode)
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out").succeeded()
    assert (tmp_path / "out/tokenizer.model").stat().st_mode & 0o777 & ~mode == 0
    assert (tmp_path / "out/tokenizer.model").stat().st_mode & 0o400
