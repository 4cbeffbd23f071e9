"""Python 3.11.0 to 3.11.3 pickle members of enumerations as getattr(class, name)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Script, run
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING


def by_name(self: Any, _: int) -> tuple[Any, ...]:
    return getattr, (self.__class__, self._name_)


def test_an_index_that_such_a_python_wrote(
    sources, tmp_path: Path, to_megatron: Script, to_hf: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", by_name)
        line = ("llama2", "--model-path", sources("llama2-gqa"), "--out", tmp_path / "m", "--target", "megatron-core")
        to_megatron(*line).succeeded()
    assert b"getattr" in (tmp_path / "m" / "release" / ".metadata").read_bytes()
    to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "hf").succeeded()
    run("weights_conversion.verify", sources("llama2-gqa"), tmp_path / "m").succeeded()
