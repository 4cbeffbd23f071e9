"""Inputs of `fuzz` in formats and of families of which no golden case is small enough: fp8 in blocks, rows and whole
tensors, MXFP4, and models with state spaces, gated deltas, latent attention and GPT-OSS, both ways."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from tests.robustness.borrowed import Borrowed, export_line, import_line
from tests.robustness.sources import tm

import delta_models  # isort: skip
import gpt_oss_models  # isort: skip
import hybrid_models  # isort: skip
import latent_models as lm  # isort: skip
import mxfp4_files  # isort: skip

_PLAIN = tm.MODELS["llama2-gqa"]
_COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "float-quantized",
    "config_groups": {"group_0": {
        "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}, "targets": ["Linear"],
    }},
}  # fmt: skip


def write(root: Path) -> list[Borrowed]:
    """All of them below `root`; exports are of what the imports make."""
    sources = dict(_sources(root))
    made = [Borrowed(name, folder, import_line(family)) for name, (family, folder) in sources.items()]
    for name in ("hybrid", "delta", "latent", "gpt_oss"):
        family, folder = sources[name]
        out = root / f"{name}-megatron"
        _run(import_line(family)(folder, out))
        made.append(Borrowed(f"{name}_megatron", out, export_line(family)))
    return made


def _sources(root: Path) -> Iterator[tuple[str, tuple[str, Path]]]:
    """(its name, (family, folder))."""
    plain = root / "fp8-plain"
    tm.write_huggingface(plain, _PLAIN, parts=1)
    blocks = {**lm.FP8, "weight_block_size": [32, 48]}
    yield "fp8_block", ("llama2", lm.write_fp8(plain, root / "fp8-block", (32, 48), config=blocks))
    rows = lm.write_fp8(plain, root / "fp8-row", (1, 4096), suffix="_scale", config=_COMPRESSED)
    yield "fp8_row", ("llama2", rows)
    whole = {"quant_method": "fp8", "weight_block_size": None}
    yield "fp8_tensor", ("llama2", lm.write_fp8(plain, root / "fp8-tensor", None, config=whole))
    yield "mxfp4", ("gpt-oss", mxfp4_files.quantised_folder(root)[0])
    yield "gpt_oss", ("gpt-oss", gpt_oss_models.write(root / "gpt-oss", gpt_oss_models.model(num_hidden_layers=2)))
    yield "hybrid", ("nemotron-h", hybrid_models.write(root / "hybrid"))
    delta = delta_models.DELTAS["next"]
    yield "delta", (delta.family, delta_models.write(root / "delta", delta))
    yield "latent", ("deepseek-v3", lm.write(root / "latent"))


def _run(line: list[str]) -> None:
    main: Callable[[list[str]], int] = importlib.import_module(line[0]).main
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = main(line[1:])
    if code:
        raise RuntimeError(f"{' '.join(line)}: exit {code}\n{said.getvalue()}")
