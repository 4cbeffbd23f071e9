"""Prove that two checkpoints hold the same model.

Either side may be a Hugging Face folder, a folder of Meta's files, or the root of a Megatron-LLM or Megatron-Core
checkpoint of any layout. No GPU, no Megatron and little memory are needed: both sides stream from their files.

Three things are compared. The configs: rope theta and scaling, epsilon, window, vocabulary, heads, context. Every
weight, both sides mapped to Hugging Face's tensors, bit by bit; a recast (--dtype) is the same where every value is the
other side's value rounded to the narrower type. And what both models compute: a forward pass in float32 on a few
prompts, straight from the stored tensors of each side and sharing nothing with the converter's mapping, which names the
first layer and sub-module where the sides part. If the checkpoint holds checksums.sha256, its files are checked too.
"""

# The object that --json writes has these keys, which stay:
#   same, verdict ("identical", "equal after rounding", "different"), family, seconds, causes and notes [sentence]
#   source, checkpoint: path, kind, layout, dtype
#   config: same, problems [sentence], fields {name: source, checkpoint, same, assumed [side whose files are silent]}
#   exact (null where shapes differ): same, tensors, values, different, rounded (tensors), copies, padding [sentence],
#       nonfinite {tensor: source, checkpoint}, differences and recast [tensor, layer, shape, source_dtype,
#       checkpoint_dtype, different_values, rounded_values, not_finite_on_one_side, largest_absolute_error,
#       largest_relative_error, row, column, source_value, checkpoint_value, first [row, column], files {file: values},
#       cause]; relative errors are of the larger value; tensors, rows, columns are those of the Hugging Face model
#   numeric (null with --exact-only): same, stage, layer, error, logits_error, cause, prompts, prompt_tokens,
#       experts_reached and experts (of all layers; null without experts), errors [of the embedding, each layer, and
#       behind the layers]
#   checksums (null without checksums.sha256): same, problems [sentence]

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weights_conversion import cli
from weights_conversion.architectures import FAMILIES
from weights_conversion.cli import arguments, helptext
from weights_conversion.cli.reporting import check_json, write_json
from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio

if TYPE_CHECKING:
    from weights_conversion.verification.report import Verification


def verify(
    source: Path, checkpoint: Path, model: str | None = None, *, workers: int = 2, exact_only: bool = False,
    source_iters: int | str | None = None, checkpoint_iters: int | str | None = None, allow_inconsistent: bool = False,
    fields: Mapping[str, Any] | None = None, true_vocab_size: int | None = None, weights: str = "model",
    adapter: Path | None = None, adapter_alpha: float | None = None, mtp: str = "keep", unread: bool = True,
) -> Verification:  # fmt: skip
    """Compares `checkpoint` with `source`, which is taken as right where only one of them can be.

    `model` is the family (None: what the sides state); `source_iters` and `checkpoint_iters` other iterations than the
    trackers'; `allow_inconsistent`: copies on the source's ranks may differ, the first is taken; `fields` (of
    ModelConfig) and `true_vocab_size` are what the user states about a Megatron source; `weights` "master": its
    optimizer's float32 weights are what is compared; `adapter` is one that the source is to have (PEFT's or
    Megatron's), with `adapter_alpha` where its files do not say it; `mtp` "drop": both sides without layers
    that predict further tokens; `unread` False: of the source may be lost what training loads and no conversion reads
    (Transformer Engine's states). Raises ConversionError for a side that cannot be read.
    """
    from weights_conversion.verification.proof import prove

    return prove(
        source, checkpoint, model, workers=workers, exact_only=exact_only, source_iters=source_iters,
        checkpoint_iters=checkpoint_iters, allow_inconsistent=allow_inconsistent, fields=fields,
        true_vocab_size=true_vocab_size, weights=weights, adapter=adapter, adapter_alpha=adapter_alpha, mtp=mtp,
        unread=unread,
    )  # fmt: skip


def proof(source: Path, model: str, **settings: Any) -> Callable[[Path], str]:
    """What --verify does with a finished folder: its report, or ConversionError. `settings` are arguments of verify."""

    def prove(folder: Path) -> str:
        found = verify(source, folder, model, unread=False, **settings)  # OUT is made of what was read
        if not found.same:
            raise ConversionError("the output has failed its proof", *found.text().splitlines(), whole=True)
        return found.text()

    return prove


EXAMPLES = (
    "python verify.py models/Llama-2-7b-hf checkpoints/llama2-7b",
    "python verify.py runs/llama2 models/llama2-800 --load-iters 800 --json p.json",
)


def build_parser() -> arguments.Parser:
    parser = arguments.Parser(
        prog="python -m weights_conversion.verify", usage="%(prog)s SOURCE CHECKPOINT [options]", description=__doc__,
        epilog=helptext.epilog(EXAMPLES, helptext.VERIFY_CODES),
    )  # fmt: skip
    parser.add_argument("source", type=arguments.path, metavar="SOURCE", help="the checkpoint that is taken as right")
    parser.add_argument(
        "checkpoint", type=arguments.path, metavar="CHECKPOINT", help="the checkpoint that is to be proven"
    )
    parser.add_argument(
        "--model", choices=FAMILIES, metavar="MODEL", help="the family (default: as the checkpoints say)"
    )
    parser.add_argument("--json", type=arguments.path, metavar="FILE", help="write the findings as JSON too")
    parser.add_argument(
        "--workers", type=cli.positive, default=cli.cores(), metavar="N", help="threads (default: cores, at most 4)"
    )
    parser.add_argument(
        "--exact-only", action="store_true", help="compare configs and weights, and run no forward pass"
    )  # fmt: skip
    parser.add_argument(
        "--load-iters", type=cli.iteration, metavar="N", help="iteration of Megatron sides (default: tracker's)"
    )  # fmt: skip
    parser.add_argument(
        "--mtp", choices=("keep", "drop"), default="keep",
        help="layers that predict further tokens: compared, or left out of both sides (default: keep)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-inconsistent", action="store_true",
        help="where the source's ranks hold different values of one parameter, take the first",
    )  # fmt: skip
    parser.add_argument(
        "--plot", type=arguments.path, metavar="FILE.png",
        help="draw the error of each layer (with matplotlib): where two checkpoints part",
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.json is not None and not fileio.is_folder(args.json.absolute().parent):
        parser.error(f"--json {args.json}: its folder does not exist")
    same: bool | None = None

    def work() -> str:
        nonlocal same
        from weights_conversion.verification import plot

        check_json(args.json)
        if args.plot is not None:
            plot.check(args.plot)
        found = verify(
            args.source, args.checkpoint, args.model, workers=args.workers, exact_only=args.exact_only,
            source_iters=args.load_iters, checkpoint_iters=args.load_iters,
            allow_inconsistent=args.allow_inconsistent, mtp=args.mtp,
        )  # fmt: skip
        if args.plot is not None:
            plot.draw(found, args.plot)
        if args.json is not None:
            write_json(args.json, found.json())
        same = found.same
        return found.text()

    code = cli.run(work)
    if same is None:
        return 2 if code == 1 else code
    return code or (0 if same else 1)


if __name__ == "__main__":
    cli.script(main)
