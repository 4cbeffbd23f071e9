"""The whole round on this machine, without a network: a tiny Llama-2, through both scripts, and back bit for bit.

Writes a random model with a tokenizer trained on the spot into a temporary folder, imports it for four ranks (TP 2 x
PP 2), writes that in Megatron-Core's format, exports both to Hugging Face folders, and proves every one of them against
the first. The commands are shown, and are what a user would type. Nothing is left behind, except with --keep.

Exit codes: 0 everything is the same, 1 something differs or failed, 2 wrong arguments.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weights_conversion import cli
from weights_conversion.cli import arguments
from weights_conversion.errors import ConversionError
from weights_conversion.launch import saying

REPOSITORY = Path(__file__).resolve().parents[1]
FAMILY = "llama2"
LAYERS, HIDDEN, FFN, HEADS, GROUPS, VOCABULARY = 4, 256, 688, 8, 4, 1000
WEIGHTS = (".safetensors", ".pt", ".distcp")


@dataclass(frozen=True)
class Stage:
    """One line of the table. `seconds` are those of the whole command, start-up included."""

    name: str
    tensors: int
    nbytes: int
    seconds: float
    equal: bool


def write_model(folder: Path) -> None:
    """A Hugging Face folder: bfloat16 weights with grouped queries, configs, and a sentencepiece tokenizer."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).mul_(0.05).bfloat16() for name, shape in shapes().items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    train_tokenizer(folder / "tokenizer.model")


def shapes() -> dict[str, tuple[int, ...]]:
    """The model's tensors."""
    kv = HIDDEN // HEADS * GROUPS
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        found |= {
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (kv, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (kv, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}.mlp.gate_proj.weight": (FFN, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": (FFN, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": (HIDDEN, FFN),
        }
    return {**found, "lm_head.weight": (VOCABULARY, HIDDEN)}


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
}


def train_tokenizer(path: Path) -> None:
    """Llama's kind of tokenizer.model (BPE, byte fallback), trained on this package's own source text."""
    import sentencepiece

    sources = sorted(Path(__file__).parent.rglob("*.py"))
    lines = [line for source in sources for line in source.read_text("utf-8").splitlines() if line.strip()]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=VOCABULARY, model_type="bpe",
            byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, minloglevel=2,
        )  # fmt: skip


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def run_script(script: str, *arguments: object) -> float:
    """Says and runs one of the scripts as a user would; returns its seconds. What it prints is shown if it fails."""
    words = [script, *map(str, arguments)]
    saying.report(f"$ python {shlex.join(words)}")
    started = time.monotonic()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / script), *words[1:]], env=environment, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        saying.report(done.stdout)
        raise ConversionError(f"{script} ended with exit code {done.returncode}")
    return time.monotonic() - started


def prove(source: Path, checkpoint: Path) -> tuple[int, bool]:
    """The number of tensors compared, and whether every bit and every config value is the same."""
    from weights_conversion.verify import verify

    found = verify(source, checkpoint, FAMILY)
    if not found.same:
        saying.report(found.text())
    return found.exact.tensors if found.exact else 0, found.same


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in WEIGHTS)


def same_weights(one: Path, other: Path) -> bool:
    """Whether two Hugging Face folders hold the same names, types and bits, as safetensors itself reads them."""
    import torch
    from safetensors.torch import load_file

    first, second = ({k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
                     for folder in (one, other))  # fmt: skip
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8))
        for name, tensor in first.items()
    )


def play() -> list[Stage]:
    """The whole round in the working folder, one stage after the other."""
    source, ranks, core = Path("llama2-tiny"), Path("megatron-tp2-pp2"), Path("megatron-core")
    started = time.monotonic()
    write_model(source)
    saying.report(f"a random Llama-2 of {LAYERS} layers, with a tokenizer, in {source.absolute()}")
    seconds = time.monotonic() - started
    stages = [Stage("random model, Hugging Face", 9 * LAYERS + 3, weight_bytes(source), seconds, True)]

    def converted(name: str, out: Path, script: str, *arguments: object) -> None:
        seconds = run_script(script, *arguments)
        tensors, equal = prove(source, out)
        if script == "megatron_to_hf.py":
            tokenizer = (out / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
            equal = equal and tokenizer and same_weights(source, out)
        stages.append(Stage(name, tensors, weight_bytes(out), seconds, equal))

    layout = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
    converted(
        "-> Megatron-LLM, TP 2 x PP 2", ranks,
        "hf_to_megatron.py", FAMILY, "--model-path", source, "--out", ranks, *layout,
    )  # fmt: skip
    converted(
        "-> Megatron-Core, torch_dist", core,
        "hf_to_megatron.py", FAMILY, "--model-path", ranks, "--out", core, "--target", "megatron-core",
    )  # fmt: skip
    exports = (("Megatron-LLM -> HF, 3 files", ranks, 3), ("Megatron-Core -> HF, 1 file", core, 1))
    for name, checkpoint, shards in exports:
        out = Path(f"hf-from-{checkpoint}")
        converted(
            name, out,
            "megatron_to_hf.py", "--model", FAMILY, "--input_dir", checkpoint, "--output_dir", out,
            "--num_output_shards", shards,
        )  # fmt: skip
    return stages


def table(stages: Sequence[Stage]) -> str:
    width = max(len(stage.name) for stage in stages)
    lines = [f"{'':{width}}  {'tensors':>7}  {'bytes':>12}  {'seconds':>7}  equal"]
    lines += [
        f"{stage.name:{width}}  {stage.tensors:7}  {stage.nbytes:12,}  {stage.seconds:7.1f}  "
        + ("yes" if stage.equal else "NO")
        for stage in stages
    ]
    return "\n".join(lines)


def build_parser() -> arguments.Parser:
    parser = arguments.Parser(prog="python -m weights_conversion.demo", description=__doc__)
    parser.add_argument(
        "--keep", type=arguments.path, metavar="DIR", help="a new or empty folder in which everything is left"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    keep = build_parser().parse_args(argv).keep
    stages: list[Stage] = []

    def work() -> str:
        before = Path.cwd()
        with folder_for(keep) as folder:
            os.chdir(folder)
            try:
                stages.extend(play())
            finally:
                os.chdir(before)
        same = all(stage.equal for stage in stages)
        verdict = "Every tensor came through bit for bit, and so did the tokenizer." if same else "SOMETHING DIFFERS."
        kept = f"\nEverything is in {keep}." if keep else ""
        return f"\n{table(stages)}\n{verdict}{kept}"

    return cli.run(work) or (0 if all(stage.equal for stage in stages) else 1)


def folder_for(keep: Path | None) -> contextlib.AbstractContextManager[str]:
    """Where the demo works: a temporary folder, or `keep`. Raises ConversionError where that holds something."""
    if keep is None:
        return tempfile.TemporaryDirectory(prefix="weights-conversion-demo-")
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise ConversionError(f"--keep {keep} is there and holds something; name a new folder")
    keep.mkdir(parents=True, exist_ok=True)
    return contextlib.nullcontext(str(keep))


if __name__ == "__main__":
    cli.script(main)
