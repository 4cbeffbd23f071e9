"""Files that are not what their names say: links, keys, pipes, pointers, and far too large ones."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
from conftest import Script, run
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from weights_conversion.errors import ConversionError
from weights_conversion.formats import dist_index, pickles, torch_files
from weights_conversion.formats.run_config import read_run_config
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


@pytest.mark.parametrize("what", ["docker", "deep"])
def test_no_generation_config_is_imported(what: str, tmp_path: Path, to_megatron: Script) -> None:
    """It is kept in the manifest, which everybody may read."""
    source = hf(tmp_path)
    (tmp_path / "private").write_text(NO_TOKENIZER[what])
    (source / "generation_config.json").unlink(missing_ok=True)
    (source / "generation_config.json").symlink_to(tmp_path / "private")
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out").refused("generation_config.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{}", '{"do_sample": true}', '{"transformers_version": "4.57.1"}'])
def test_what_is_a_generation_config(content: str, tmp_path: Path, to_megatron: Script) -> None:
    source = hf(tmp_path)
    (source / "generation_config.json").write_text(content)
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out").succeeded()


@pytest.mark.parametrize("what", ["key", "docker"])
def test_a_tracker_that_is_none_is_not_printed(what: str, imported, tmp_path: Path, to_hf: Script) -> None:
    source = Path(shutil.copytree(imported("llama2-gqa"), tmp_path / "source"))
    (tmp_path / "private").write_text(NO_TOKENIZER[what])
    (source / "latest_checkpointed_iteration.txt").unlink()
    (source / "latest_checkpointed_iteration.txt").symlink_to(tmp_path / "private")
    done = to_hf("--input_dir", source, "--output_dir", tmp_path / "out")
    done.refused("holds other text")
    assert NO_TOKENIZER[what].split()[1] not in done.text


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


# --- bounds -----------------------------------------------------------------------------------------------------------


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def pointer(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9976576152\n")


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


READ = {
    "config.json": "hf", "generation_config.json": "hf", "model.safetensors": "hf", "tokenizer.model": "hf",
    "tokenizer_config.json": "hf", "model.safetensors.index.json": "index", "pytorch_model.bin": "bin",
    "params.json": "meta", "consolidated.00.pth": "meta", "latest_checkpointed_iteration.txt": "ranks",
    "conversion_manifest.json": "ranks", "release/mp_rank_00/model_optim_rng.pt": "ranks",
    "release/.metadata": "dist", "release/common.pt": "dist", "release/__0_1.distcp": "dist",
}  # fmt: skip


def source_with(kind: str, tmp_path: Path, imported: Callable[..., Path]) -> tuple[Path, list[Any]]:
    """A sound source of a kind, and the command that reads it."""
    source = tmp_path / "source"
    if kind in ("ranks", "dist"):
        shutil.copytree(imported("llama2-gqa", *(["--target", "megatron-core"] if kind == "dist" else [])), source)
        out = ["--input_dir", source, "--output_dir", tmp_path / "out", "--no_tokenizer"]
        return source, ["megatron_to_hf", "--model", "llama2", *out]
    if kind == "meta":
        tm.write_meta(source, GQA, 1)
    else:
        tm.write_huggingface(source, GQA)
    if kind == "index":
        tm.write_json(source / "model.safetensors.index.json", {"weight_map": {"a": "model.safetensors"}})
        (source / "model.safetensors").rename(source / "other.safetensors")
    if kind == "bin":
        torch.save(GQA.tensors(), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    return source, ["hf_to_megatron", "llama2", "--model-path", source, "--out", tmp_path / "out"]


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("make", [fifo, pointer, folder])
def test_what_is_no_file_is_not_read(make: Callable[[Path], None], name: str, imported, tmp_path: Path) -> None:
    """It neither hangs, nor does what is no file count for one that is not there; a pointer is named as one."""
    source, line = source_with(READ[name], tmp_path, imported)
    make(source / name)
    if make is not pointer and name in ("generation_config.json", "tokenizer.model", "tokenizer_config.json"):
        assert run(*line).code in (0, 1)
        return
    said = run(*line).refused(*(["LFS"] if make is pointer else []))
    assert len(said.err.splitlines()) < 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"])
def test_files_far_too_large(name: str, tmp_path: Path, to_megatron: Script) -> None:
    source = hf(tmp_path)
    with (source / name).open("ab") as file:
        file.truncate(3 << 30)
    said = to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out").refused("3221225472 bytes", name)
    assert "at most" in said.err


BOMBS = {
    "sets": b"\x80\x02(" + b"\x8f" * 400_000 + b"l.",
    "dicts": b"\x80\x02(" + b"}" * 1_200_000 + b"l.",
    "memo": b"\x80\x04]" + b"\x94" * 1_600_000 + b".",
    "sizes": b"\x80\x04(" + b"K\x01" * 100_000 + b"t\x94ctorch\nSize\n\x94(" + b"h\x01h\x00\x85R" * 100_000 + b"l.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_of_many_objects(name: str) -> None:
    with pytest.raises(ConversionError, match="far more objects"):
        pickles.load(BOMBS[name], "x.pt")


def shared() -> list[Any]:
    value: list[Any] = ["x"]
    for _ in range(40):
        value = [value, value]
    return value


FIELDS = ("key", "size", "offsets", "sizes", "dtype", "fqn", "index offset", "path", "start", "transform")


@pytest.mark.parametrize("field", FIELDS)
def test_an_index_of_shared_lists(field: str, tmp_path: Path) -> None:
    """Some hundred bytes, whose repr has 2^40 parts."""
    bomb = shared()
    dtype = bomb if field == "dtype" else torch.float32
    offsets = bomb if field == "offsets" else torch.Size([0])
    sizes = bomb if field == "sizes" else torch.Size([4])
    chunk = dcp.ChunkStorageMetadata(offsets, sizes)  # pyright: ignore[reportArgumentType]
    size = bomb if field == "size" else torch.Size([4])
    entry = dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=dtype), size, [chunk])  # pyright: ignore
    info = _StorageInfo("__0_0.distcp", 0, 100)
    if field in ("path", "start", "transform"):
        name = {"path": "relative_path", "start": "offset", "transform": "transform_descriptors"}[field]
        object.__setattr__(info, name, bomb)
    index = dcp.MetadataIndex("a", torch.Size([0]))
    metadata = dcp.Metadata({"a": entry}, None, {index: info})
    if field in ("fqn", "index offset"):
        object.__setattr__(index, "fqn" if field == "fqn" else "offset", bomb)
    if field == "key":
        metadata.state_dict_metadata = {("a", 1): entry}  # pyright: ignore[reportAttributeAccessIssue]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata, protocol=2))
    with pytest.raises(ConversionError) as error:
        dist_index.read_metadata(tmp_path / ".metadata")
    assert len(str(error.value)) < 4100


YAML = {
    "many keys": "model:\n" + "".join(f"  k{n}: 1\n" for n in range(300_000)),
    "merges": "a: &a {x: 1}\nmodel: {<<: *a}\n",
    "flow": "model: " + "[" * 400_000,
    "block": "- " * 200_000,
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "run_config.yaml").write_text(YAML[name])
    with pytest.raises(ConversionError):
        read_run_config(tmp_path / "run_config.yaml")


def test_yaml_of_shared_lists(tmp_path: Path) -> None:
    lists = "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    both = f"a0: &a0 [x, x]\n{lists}b0: &b0 [x, x]\n{lists.replace('a', 'b')}"
    sections = "model:\n" + "".join(f"  {n}: {{num_layers: 1, hidden_size: 1, q: *{n}39}}\n" for n in "ab")
    (tmp_path / "run_config.yaml").write_text(both + sections)
    assert read_run_config(tmp_path / "run_config.yaml")["num_layers"] == 1


# --- torch files of other kinds ---------------------------------------------------------------------------------------


def legacy_source(tmp_path: Path) -> Path:
    source = tm.write_huggingface(tmp_path / "hf", GQA, tokenizer=False)
    (source / "model.safetensors").unlink()
    old = {"_use_new_zipfile_serialization": False}
    torch.save(GQA.tensors(), source / "pytorch_model.bin", **old)
    return source


def test_files_of_torch_before_1_6(tmp_path: Path, to_megatron: Script) -> None:
    source = legacy_source(tmp_path)
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out", "--verify").succeeded()


def test_views_in_files_of_torch_before_1_6(tmp_path: Path) -> None:
    whole = torch.arange(12, dtype=torch.float16).reshape(3, 4)
    content = {"a": whole, "b": whole[1:], "c": torch.nn.Parameter(torch.ones(2))}
    torch.save(content, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    opened = torch_files.read_torch_file(tmp_path / "x.bin")
    refs, data = torch_files.tensors(opened, opened.content), (tmp_path / "x.bin").read_bytes()
    for name, tensor in content.items():
        ref = refs[name]
        stored = torch.frombuffer(bytearray(data[ref.offset : ref.offset + ref.nbytes]), dtype=ref.dtype)
        assert torch.equal(stored.view(ref.shape), tensor)


@pytest.mark.parametrize("cut", [1, 700, 5000, -40])
def test_old_files_cut_off(cut: int, tmp_path: Path, to_megatron: Script) -> None:
    source = legacy_source(tmp_path)
    data = (source / "pytorch_model.bin").read_bytes()
    (source / "pytorch_model.bin").write_bytes(data[:cut])
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out").refused("pytorch_model.bin")


OTHERS = {
    b"GGUF\x03\0\0\0" + bytes(100): "GGUF",
    b"<!doctype html><html>no access</html>": "web page",
    b'{"error": "no access"}': "JSON",
    bytes(257) + b"ustar" + bytes(400): "0.1.10",
    b"\x1f\x8b\x08" + bytes(100): "gzip",
    pickle.dumps({"a": 1}): "bare pickle",
    (100).to_bytes(8, "little") + b'{"a":' + bytes(100): "safetensors",
    b"PK\x03\x04" + bytes(100): "cut off",
    b"\x00\x01" * 100: "cut off",
}


@pytest.mark.parametrize("data", OTHERS, ids=list(OTHERS.values()))
def test_other_kinds_are_told_by_their_first_bytes(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(ConversionError, match=OTHERS[data]):
        torch_files.read_torch_file(tmp_path / "x.bin")


def test_tensors_with_attributes(tmp_path: Path, to_megatron: Script) -> None:
    """As FSDP leaves them; torch's own weights_only loader reads such a file."""
    tensors = {name: tensor.clone() for name, tensor in GQA.tensors().items()}
    tensors["model.norm.weight"]._fsdp_flattened = True  # pyright: ignore[reportAttributeAccessIssue]
    parameter = torch.nn.Parameter(tensors["lm_head.weight"])
    parameter.sharded = False  # pyright: ignore[reportAttributeAccessIssue]
    source = tm.write_huggingface(tmp_path / "hf", GQA, tokenizer=False)
    (source / "model.safetensors").unlink()
    torch.save({**tensors, "lm_head.weight": parameter}, source / "pytorch_model.bin")
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "out").succeeded()
