#!/usr/bin/env python
"""Convert Hugging Face (or Meta) weights to a Megatron checkpoint.

The weights come from a Hugging Face repository, which is downloaded to the hub's cache, from a local folder
(--model-path), or, for llama and llama2, from the files that Meta distributes: then --cache-dir is the folder that
holds consolidated.00.pth, or the folder above it (with 7B, 13B ... or llama-2-7b, llama-2-13b ... inside). With a
--cache-dir that holds neither, it is the hub's cache. For gated repositories (Llama 2), log in first: `hf auth login`.

The checkpoint is written to --out, ready for training with any tensor and pipeline parallel size; nothing that was
downloaded is removed. No GPU, no Megatron and little memory are needed: weights stream from file to file.
"""

# Without "from __future__ import annotations", which Python 3.6 cannot read: the package tells it what it lacks.
from typing import TYPE_CHECKING

from weights_conversion import cli
from weights_conversion.architectures import FAMILIES
from weights_conversion.cli import arguments, helptext, reporting

if TYPE_CHECKING:
    from weights_conversion.engine.report import Report


EXAMPLES = (
    "python hf_to_megatron.py llama2 --size 7 --out checkpoints/llama2-7b",
    "python hf_to_megatron.py llama2 --model-path models/Llama-2-70b-hf \\\n"
    "    --out checkpoints/llama2-70b \\\n"
    "    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4",
    "python hf_to_megatron.py llama2 --size 70 --dry-run",
)


def build_parser() -> arguments.Parser:
    parser = arguments.Parser(
        prog="hf_to_megatron.py", usage="%(prog)s MODEL [options]", description=__doc__,
        epilog=helptext.epilog(EXAMPLES, helptext.CONVERSION_CODES),
    )  # fmt: skip
    parser.add_argument("model", choices=FAMILIES, metavar="MODEL", help=f"one of {', '.join(FAMILIES)}")
    places = parser.add_argument_group("what is read, and where the checkpoint goes")
    places.add_argument(
        "--size", metavar="SIZE",
        help="size in billions of parameters, as the family has it (7, 0.5): picks the default repository; when given, "
        "it is checked against the model's own config",
    )  # fmt: skip
    places.add_argument(
        "--out", type=arguments.path, metavar="OUT",
        help="folder of the Megatron checkpoint (default: MODEL-SIZEb-megatron, or NAME-megatron of a local NAME)",
    )  # fmt: skip
    places.add_argument(
        "--cache-dir", type=arguments.path, metavar="DIR",
        help="the hub's cache; or, for llama and llama2, the folder of Meta's weights or the one above it",
    )  # fmt: skip
    places.add_argument(
        "--model-path", metavar="PATH_OR_REPO",
        help="a local folder, or another repository of the same architecture; or the root of a Megatron checkpoint, to "
        "write it in another layout",
    )  # fmt: skip
    places.add_argument("--revision", metavar="REV", help="branch, tag or commit of the repository (default: main)")
    places.add_argument(
        "--load_iters", type=cli.iteration, metavar="N",
        help="where --model-path is a Megatron checkpoint: another iteration than its tracker's, or release",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", type=arguments.path, metavar="PATH",
        help="a LoRA adapter of PEFT's for the model, a folder or a repository: merged in float32, rounded once",
    )  # fmt: skip
    layout = parser.add_argument_group("layout of the checkpoint")
    layout.add_argument(
        "--tensor-model-parallel-size", type=cli.positive, default=1, metavar="N",
        help="ranks to cut each layer into (default: 1)",
    )  # fmt: skip
    layout.add_argument(
        "--pipeline-model-parallel-size", type=cli.positive, default=1, metavar="N",
        help="pipeline stages (default: 1)",
    )  # fmt: skip
    layout.add_argument(
        "--num-layers-per-virtual-pipeline-stage", type=cli.positive, metavar="N",
        help="layers of each interleaved stage (default: stages are not interleaved)",
    )  # fmt: skip
    layout.add_argument(
        "--expert-model-parallel-size", type=cli.positive, default=1, metavar="N",
        help="ranks that experts are dealt to, in format torch (default: 1)",
    )  # fmt: skip
    layout.add_argument(
        "--expert-tensor-parallel-size", type=cli.positive, metavar="N",
        help="ranks that cut each expert, in format torch (default: as many as other tensors)",
    )  # fmt: skip
    layout.add_argument(
        "--moe-grouped-gemm", action="store_true",
        help="experts for Megatron-Core's grouped kernels (TEGroupedMLP), in format torch (default: one by one)",
    )  # fmt: skip
    layout.add_argument(
        "--moe-layer-freq", metavar="EXPR",
        help="Megatron-LM's own, as '([0]*1+[1]*47)': keys of torch_dist are stacked for 1, else layer by layer "
        "(default: 1 where every layer has experts)",
    )  # fmt: skip
    layout.add_argument(
        "--mla-down-proj-fusion", action="store_true",
        help="for runs with Megatron-LM's flag of this name: both down projections of latent attention, and the norm "
        "in front of them, as one module in format torch (default: apart)",
    )  # fmt: skip
    layout.add_argument(
        "--make-vocab-size-divisible-by", type=cli.positive, metavar="N",
        help="vocabulary rows become a multiple of N x TP (default: 128); without this, a TP size or --true-vocab-size "
        "the table keeps its rows",
    )  # fmt: skip
    layout.add_argument(
        "--true-vocab-size", type=cli.positive, metavar="N",
        help="tokens that training will use, new ones included: rows are added up to it, then padded",
    )  # fmt: skip
    layout.add_argument(
        "--new-rows", choices=("last", "mean"), default="last",
        help="what added rows hold: a copy of the last row, or the mean row (default: last)",
    )  # fmt: skip
    layout.add_argument(
        "--target", choices=("megatron-llm", "megatron-core", "megatron-bridge"),
        help="whose checkpoint to write (default: megatron-llm for codellama, falcon, llama, llama2 and mistral, which "
        "it trains; megatron-core for the others)",
    )  # fmt: skip
    layout.add_argument(
        "--ckpt-format", choices=("torch", "torch_dist"),
        help="format on disk (default: torch; for megatron-core torch_dist, which fits any TP and PP)",
    )  # fmt: skip
    layout.add_argument(
        "--core-release", choices=("auto", "before-0.19", "0.19"), default="auto",
        help="for torch_dist: a release that must read it; 0.19 has no common.pt (default: readable by all)",
    )  # fmt: skip
    layout.add_argument(
        "--hybrid-layer-pattern", metavar="PATTERN",
        help="for torch_dist: write a HybridModel of this pattern, as *-*- for two layers (Megatron-LM's flag)",
    )  # fmt: skip
    layout.add_argument(
        "--spec", nargs=2, metavar=("MODULE", "NAME"),
        help="Megatron-LM's flag beside the pattern: the two names of its stack of layers",
    )  # fmt: skip
    cli.add_fields(parser)
    cli.add_common(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    cli.check_common(parser, args)
    sizes = FAMILIES[args.model].repositories
    if args.size is not None and args.size not in sizes:
        parser.error(f"{args.model} comes in sizes {', '.join(sizes)}, not {args.size}")

    fields = cli.stated_fields(parser, args)

    def work() -> "Report":
        from weights_conversion.config import Parallelism
        from weights_conversion.verbs.to_megatron import ImportOptions, hf_to_megatron

        options = ImportOptions(
            **cli.run_options(args),
            model=args.model,
            size=args.size,
            out=args.out,
            cache_dir=args.cache_dir,
            model_path=args.model_path,
            revision=args.revision,
            parallel=Parallelism(
                args.tensor_model_parallel_size,
                args.pipeline_model_parallel_size,
                expert=args.expert_model_parallel_size,
                expert_tensor=args.expert_tensor_parallel_size,
            ),
            layers_per_virtual_stage=args.num_layers_per_virtual_pipeline_stage,
            divisible_by=args.make_vocab_size_divisible_by,
            moe_grouped_gemm=args.moe_grouped_gemm,
            moe_layer_freq=args.moe_layer_freq,
            mla_down_proj_fusion=args.mla_down_proj_fusion,
            true_vocab_size=args.true_vocab_size,
            new_rows=args.new_rows,
            load_iters=args.load_iters,
            adapter=args.adapter,
            core_release=args.core_release,
            hybrid_layer_pattern=args.hybrid_layer_pattern,
            spec=tuple(args.spec) if args.spec else None,
            target=args.target,
            ckpt_format=args.ckpt_format,
            fields=fields,
        )
        return hf_to_megatron(options)

    return cli.run(reporting.reported(work, args.json))


if __name__ == "__main__":
    cli.script(main)
