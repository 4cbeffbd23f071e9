"""The Python API: `from weights_conversion import hf_to_megatron, megatron_to_hf, verify`; see docs/python_api.md.

Nothing is printed and no process is started or ended; progress goes to `logging`. Importing this imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weights_conversion.errors import ConversionError

if TYPE_CHECKING:
    from weights_conversion.engine.report import Report
    from weights_conversion.verification.report import Verification

__all__ = ["ConversionError", "hf_to_megatron", "megatron_to_hf", "verify"]


def hf_to_megatron(
    model: str, model_path: str | Path | None = None, *, out: str | Path | None = None, size: str | None = None,
    tensor_parallel: int = 1, pipeline_parallel: int = 1, target: str | None = None, ckpt_format: str | None = None,
    dtype: str = "keep", true_vocab_size: int | None = None, dry_run: bool = False, overwrite: bool = False,
    workers: int = 2, verify: bool = False, **more: Any,
) -> Report:  # fmt: skip
    """What hf_to_megatron.py does: `model` (a family) from `model_path` to the Megatron checkpoint at `out`.

    `model_path` is a folder or a repository (None: the family's own, of `size`); a Megatron checkpoint is written in
    another layout. `more` are further fields of weights_conversion.verbs.import_options.ImportOptions. Raises
    ConversionError for everything that is wrong, before a byte is written, and TypeError for an argument that there
    is not.
    """
    from weights_conversion.config import Parallelism
    from weights_conversion.verbs.import_options import ImportOptions
    from weights_conversion.verbs.to_megatron import hf_to_megatron as convert

    more.setdefault("parallel", Parallelism(tensor_parallel, pipeline_parallel))
    options = ImportOptions(
        model=_known(model), model_path=None if model_path is None else str(model_path), out=_path(out), size=size,
        target=target, ckpt_format=ckpt_format, dtype=dtype, true_vocab_size=true_vocab_size, dry_run=dry_run,
        overwrite=overwrite, workers=workers, verify=verify, **more,
    )  # fmt: skip
    return convert(options)


def megatron_to_hf(
    input_dir: str | Path, output_dir: str | Path, *, model: str | None = None, num_output_shards: int = 1,
    vocab_file: str | Path | None = None, no_tokenizer: bool = False, reference: str | Path | None = None,
    dtype: str = "keep", true_vocab_size: int | None = None, dry_run: bool = False, overwrite: bool = False,
    workers: int = 2, verify: bool = False, **more: Any,
) -> Report:  # fmt: skip
    """What megatron_to_hf.py does: the Megatron checkpoint at `input_dir` to a Hugging Face folder `output_dir`.

    `model` None: the family that the checkpoint says or shows. `more` are further fields of
    weights_conversion.verbs.to_hf.ExportOptions. Raises ConversionError and TypeError as hf_to_megatron does.
    """
    from weights_conversion.tokenizer import TokenizerOptions
    from weights_conversion.verbs.to_hf import ExportOptions
    from weights_conversion.verbs.to_hf import megatron_to_hf as convert

    more.setdefault("tokenizer", TokenizerOptions(vocab_file=_path(vocab_file)))
    options = ExportOptions(
        input_dir=Path(input_dir), output_dir=Path(output_dir), model=None if model is None else _known(model),
        num_output_shards=num_output_shards, no_tokenizer=no_tokenizer,
        reference=None if reference is None else str(reference), dtype=dtype, true_vocab_size=true_vocab_size,
        dry_run=dry_run, overwrite=overwrite, workers=workers, verify=verify, **more,
    )  # fmt: skip
    return convert(options)


def verify(
    source: str | Path, checkpoint: str | Path, model: str | None = None, *, workers: int = 2, exact_only: bool = False,
    **more: Any,
) -> Verification:  # fmt: skip
    """What `python -m weights_conversion.verify` does: whether `checkpoint` holds the same model as `source`.

    `found.same` says so and `found.text()` why. `more` are further arguments of weights_conversion.verify.verify.
    Raises ConversionError for a side that cannot be read.
    """
    from weights_conversion.verify import verify as compare

    model = None if model is None else _known(model)
    return compare(Path(source), Path(checkpoint), model, workers=workers, exact_only=exact_only, **more)


def _known(model: str) -> str:
    from weights_conversion.architectures import FAMILIES

    if model not in FAMILIES:
        raise ConversionError(f"there is no model {model!r}; there are {', '.join(FAMILIES)}")
    return model


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
