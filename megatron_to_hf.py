#!/usr/bin/env python
"""Convert a Megatron checkpoint to a Hugging Face model, with its tokenizer.

Set --input_dir to the root of the checkpoint (the folder that holds latest_checkpointed_iteration.txt) and --output_dir
to the folder for the Hugging Face model. Every tensor, pipeline and virtual pipeline parallel size is read, with or
without a distributed optimizer; optimizer state is not touched. No GPU, no Megatron and little memory are needed.

The tokenizer is rebuilt with the ids that training used: from --vocab_file, the checkpoint, what its args name, the
files of the import, or the hub, in this order. --no_tokenizer leaves it out.
"""

# Without "from __future__ import annotations", which Python 3.6 cannot read: the package tells it what it lacks.
from typing import TYPE_CHECKING

from weights_conversion import cli
from weights_conversion.architectures import FAMILIES
from weights_conversion.cli import arguments, helptext, reporting

if TYPE_CHECKING:
    from weights_conversion.engine.report import Report


EXAMPLES = (
    "python megatron_to_hf.py --input_dir runs/llama2 --output_dir models/llama2",
    "python megatron_to_hf.py --input_dir runs/llama2 --load_iters 800 \\\n"
    "    --output_dir models/llama2-800 --num_output_shards 15 --verify",
)


def build_parser() -> arguments.Parser:
    parser = arguments.Parser(
        prog="megatron_to_hf.py", usage="%(prog)s --input_dir DIR --output_dir DIR [options]", description=__doc__,
        epilog=helptext.epilog(EXAMPLES, helptext.CONVERSION_CODES),
    )  # fmt: skip
    places = parser.add_argument_group("what is read, and where the model goes")
    places.add_argument(
        "--input_dir", type=arguments.path, required=True, metavar="DIR", help="root of the Megatron checkpoint"
    )
    places.add_argument(
        "--output_dir", type=arguments.path, required=True, metavar="DIR", help="folder for the Hugging Face model"
    )
    places.add_argument(
        "--model", choices=FAMILIES, metavar="MODEL",
        help=f"what the checkpoint holds (default: what it says or shows), one of {', '.join(FAMILIES)}; a checkpoint "
        "that says otherwise is an error",
    )  # fmt: skip
    places.add_argument(
        "--num_output_shards", type=cli.positive, default=1, metavar="N",
        help="how many safetensors files to write (default: 1)",
    )  # fmt: skip
    places.add_argument(
        "--reference", metavar="PATH_OR_REPO",
        help="a Hugging Face model whose tokenizer, generation config and fields that Megatron's args cannot carry are "
        "taken; what it contradicts is named",
    )  # fmt: skip
    tokenizer = parser.add_argument_group("tokenizer and vocabulary")
    tokenizer.add_argument(
        "--cache_dir", type=arguments.path, metavar="DIR", help="the hub's cache, should a tokenizer be fetched"
    )
    tokenizer.add_argument(
        "--vocab_file", type=arguments.path, metavar="FILE",
        help="tokenizer.model, or a folder that holds tokenizer files (default: the checkpoint's own)",
    )  # fmt: skip
    tokenizer.add_argument(
        "--vocab_extra_ids_list", metavar="A,B",
        help="special tokens that training added, separated by commas (default: from the checkpoint's args)",
    )  # fmt: skip
    tokenizer.add_argument(
        "--override_special_tokens", nargs="*", action="extend", default=[], metavar="KEY=TOKEN",
        help="make TOKEN the bos, cls, eos, mask, pad, sep or unk token; set in the configs too",
    )  # fmt: skip
    new_tokens = tokenizer.add_mutually_exclusive_group()
    for name, value, text in (
        (
            "--new_tokens",
            True,
            "CLS, SEP, EOD, MASK and PAD were added in training (default: as the args say; else no)",
        ),
        ("--no_new_tokens", False, "they were not added"),
    ):
        new_tokens.add_argument(name, action="store_const", const=value, dest="new_tokens", help=text)
    tokenizer.add_argument("--no_tokenizer", action="store_true", help="export the weights and configs alone")
    tokenizer.add_argument(
        "--true_vocab_size", type=cli.positive, metavar="N",
        help="vocabulary rows to keep (default: as recorded at import; all, where nothing is recorded)",
    )  # fmt: skip
    places.add_argument(
        "--load_iters", type=cli.iteration, metavar="N", help="another iteration than the tracker's, or release"
    )  # fmt: skip
    places.add_argument(
        "--weights", choices=("model", "master"), default="model",
        help="which to export: the model's own (default), or the optimizer's float32 weights, where the checkpoint's "
        "format stores them by name; --dtype bfloat16 rounds them once",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", type=arguments.path, metavar="DIR",
        help="LoRA adapters that Megatron-Bridge or NeMo 2 trained apart from --input_dir (default: those in it)",
    )  # fmt: skip
    parser.add_argument(
        "--adapter_as", choices=("merged", "peft"), default="merged",
        help="what becomes of Megatron's adapters: merged into the model (default), or a folder of PEFT's",
    )  # fmt: skip
    parser.add_argument(
        "--adapter_alpha", type=cli.positive_float, metavar="A", help="their alpha, where no file says it"
    )  # fmt: skip
    cli.add_fields(parser)
    cli.add_common(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    cli.check_common(parser, args)
    fields = cli.stated_fields(parser, args)
    if args.no_tokenizer and args.override_special_tokens:
        parser.error("--override_special_tokens needs the tokenizer, which --no_tokenizer leaves out")

    def work() -> "Report":
        from weights_conversion.tokenizer import TokenizerOptions
        from weights_conversion.verbs.to_hf import ExportOptions, megatron_to_hf

        options = ExportOptions(
            **cli.run_options(args),
            input_dir=args.input_dir,
            output_dir=args.output_dir,
            model=args.model,
            num_output_shards=args.num_output_shards,
            tokenizer=TokenizerOptions(
                vocab_file=args.vocab_file,
                vocab_extra_ids_list=args.vocab_extra_ids_list,
                override_special_tokens=tuple(args.override_special_tokens),
                new_tokens=args.new_tokens,
                cache_dir=args.cache_dir,
            ),
            no_tokenizer=args.no_tokenizer,
            true_vocab_size=args.true_vocab_size,
            load_iters=args.load_iters,
            reference=args.reference,
            weights=args.weights,
            adapter=args.adapter,
            adapter_as=args.adapter_as,
            adapter_alpha=args.adapter_alpha,
            fields=fields,
        )
        return megatron_to_hf(options)

    return cli.run(reporting.reported(work, args.json))


if __name__ == "__main__":
    cli.script(main)
