"""Calls that fail: hints never end a conversion, refused direct writes go another way, and errors name their file."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
from conftest import Script

from tests.robustness import sources as samples
from weights_conversion.engine import streams
from weights_conversion.errors import ConversionError
from weights_conversion.tokenizer import checks

GQA = tm.MODELS["llama2-gqa"]


def failing(number: int) -> Any:
    def fails(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fails


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ESPIPE, errno.EIO])
def test_advice_is_no_order(number: int, sources, tmp_path: Path, to_megatron: Script, monkeypatch) -> None:
    monkeypatch.setattr(os, "posix_fadvise", failing(number))
    to_megatron("llama2", "--model-path", sources("llama2-gqa"), "--out", tmp_path / "out").succeeded()


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM])
def test_direct_writes_refused(
    number: int, after: int, sources, imported, tmp_path: Path, to_megatron: Script, monkeypatch
) -> None:
    """At the first write and in the middle of a file: what is written is the same."""
    write, seen = streams._write_all, [0]

    def refused(descriptor: int, view: memoryview, position: int) -> None:
        direct = os.get_blocking(descriptor) is not None and fcntl_flags(descriptor) & os.O_DIRECT
        seen[0] += bool(direct and view)
        if direct and view and seen[0] > after:
            raise OSError(number, os.strerror(number))
        write(descriptor, view, position)

    monkeypatch.setattr(streams, "_write_all", refused)
    to_megatron("llama2", "--model-path", sources("llama2-gqa"), "--out", tmp_path / "out").succeeded()
    assert samples.tree(tmp_path / "out") == samples.tree(imported("llama2-gqa"))


def fcntl_flags(descriptor: int) -> int:
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_GETFL)


@pytest.mark.parametrize(
    ("call", "doing", "file"),
    [
        ("preadv", "reading", "model.safetensors"),
        ("pwrite", "writing", "model_optim_rng.pt"),
        ("fsync", "", "model_optim_rng.pt"),
    ],
)
def test_errors_name_their_file(
    call: str, doing: str, file: str, sources, tmp_path: Path, to_megatron: Script, monkeypatch
) -> None:
    monkeypatch.setattr(os, call, failing(errno.EIO))
    line = ("llama2", "--model-path", sources("llama2-gqa"), "--out", tmp_path / "out")
    to_megatron(*line).refused(doing, file, "Input/output error")


@pytest.mark.parametrize("table", ["", "AA==", "AAAAAAAA", "/////////////w==", "BAAAAAAAAAAA"])
def test_a_broken_table_of_characters_ends_no_conversion(table: str) -> None:
    """Whatever the library does with it (an error, a panic, an abort), it is a sentence or it loads."""
    data = {
        "version": "1.0", "added_tokens": [], "normalizer": {"type": "Precompiled", "precompiled_charsmap": table},
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    }  # fmt: skip
    with contextlib.suppress(ConversionError):
        checks.check_loaded(data, {"a": 0}, None)
