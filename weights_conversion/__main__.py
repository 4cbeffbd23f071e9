"""`python -m weights_conversion`: the commands that there are."""

from __future__ import annotations

import sys

from weights_conversion.cli import arguments
from weights_conversion.launch import saying

COMMANDS = {
    "hf_to_megatron": "Hugging Face (or Meta) weights to a Megatron checkpoint",
    "megatron_to_hf": "a Megatron checkpoint to a Hugging Face model with its tokenizer",
    "weights-conversion-verify": "prove that two checkpoints hold the same model",
    "weights-conversion-demo": "the whole round on this machine, with a tiny model",
}
_LINES = [f"  {name:26} {what}" for name, what in COMMANDS.items()]
LISTING = "\n".join(
    [
        "commands, each with --help:",
        *_LINES,
        "in a clone without pip install: python hf_to_megatron.py, megatron_to_hf.py, verify.py,",
        "python -m weights_conversion.verify, python -m weights_conversion.demo",
    ]
)


def main(argv: list[str] | None = None) -> int:
    arguments.Parser(prog="python -m weights_conversion", description="Lists the commands.").parse_args(argv)
    saying.report(LISTING)
    return 0


if __name__ == "__main__":
    sys.exit(main())
