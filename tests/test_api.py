"""The Python API: three functions that do what the commands do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file

from weights_conversion import ConversionError, hf_to_megatron, megatron_to_hf, verify
from weights_conversion.verify import main  # the module of the same name, which must not take the function's place

assert callable(main)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_round(sources, imported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same bytes as by the commands; nothing printed, and torch's threads are the caller's again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        report = hf_to_megatron("llama2", sources("llama2-gqa"), out=tmp_path / "mt", tensor_parallel=2)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "mt") == contents(imported("llama2-gqa", "--tensor-model-parallel-size", 2))
    assert report.out == tmp_path / "mt"
    assert report.seconds is not None
    assert len(report.files) == 2
    back = megatron_to_hf(tmp_path / "mt", str(tmp_path / "hf"), no_tokenizer=True)
    tensors = load_file(sources("llama2-gqa") / "model.safetensors").values()
    assert back.nbytes == sum(tensor.nbytes for tensor in tensors)
    found = verify(sources("llama2-gqa"), tmp_path / "hf")
    assert found.same, found.text()
    assert found.verdict == "identical"
    assert capsys.readouterr().out == ""


def test_a_dry_run(sources, tmp_path: Path) -> None:
    report = hf_to_megatron("llama2", str(sources("llama2-gqa")), out=tmp_path / "mt", dry_run=True)
    assert report.seconds is None
    assert report.nbytes > 0
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_is_raised(sources, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="there is no model 'llama-2'; there are"):
        hf_to_megatron("llama-2", sources("llama2-gqa"), out=tmp_path / "mt")
    with pytest.raises(ConversionError) as found:
        hf_to_megatron("llama2", sources("llama2-gqa"), out=tmp_path / "mt", tensor_parallel=3)
    assert found.value.problems
    with pytest.raises(TypeError, match="tensor_paralel"):
        hf_to_megatron("llama2", sources("llama2-gqa"), out=tmp_path / "mt", tensor_paralel=3)
    assert list(tmp_path.iterdir()) == []


def test_importing_it_imports_no_torch() -> None:
    code = "import sys; from weights_conversion import hf_to_megatron, verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
