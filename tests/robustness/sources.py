"""What the robustness runs share: models to convert, the commands that convert them, and the digest of a folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import tiny_models as tm  # noqa: E402

GQA = tm.MODELS["llama2-gqa"]
# Large enough that a run spends most of its time writing: 270 MB in bfloat16.
MEDIUM = replace(GQA, name="medium", layers=8, hidden=1024, ffn=2816, heads=16, groups=4, head_dim=64, vocab=16000)
SMALL = replace(GQA, name="small", hidden=256, ffn=512, heads=8, groups=4, head_dim=32, vocab=2048)


@dataclass(frozen=True)
class Command:
    """One conversion: a script with its arguments, apart from where the output goes."""

    name: str
    script: str
    arguments: tuple[str, ...]
    out: str

    def line(self, out: Path, *further: str) -> list[str]:
        return [str(TESTS.parent / self.script), *self.arguments, self.out, str(out), "--workers", "2", *further]


def commands(root: Path, model: tm.Tiny) -> list[Command]:
    """Imports and exports, sharded and not, of `model`, whose sources are written below `root`."""
    hf = tm.write_huggingface(root / "hf", model, parts=3)
    imports = [
        Command("import", "hf_to_megatron.py", ("llama2", "--model-path", str(hf)), "--out"),
        Command(
            "import TP2 PP2", "hf_to_megatron.py",
            ("llama2", "--model-path", str(hf), "--tensor-model-parallel-size", "2",
             "--pipeline-model-parallel-size", "2"), "--out",
        ),
    ]  # fmt: skip
    for command, name in zip(imports, ("mt1", "mt4"), strict=True):
        convert(command.line(root / name))
    exports = [
        Command("export", "megatron_to_hf.py", ("--input_dir", str(root / "mt1")), "--output_dir"),
        Command("export 3 shards", "megatron_to_hf.py",
                ("--input_dir", str(root / "mt4"), "--num_output_shards", "3"), "--output_dir"),
    ]  # fmt: skip
    return imports + exports


def convert(line: list[str]) -> None:
    import importlib

    script = importlib.import_module(Path(line[0]).stem)
    code = script.main(line[1:])
    if code:
        raise RuntimeError(f"exit {code}: {' '.join(line)}")


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def clear(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def write_older(out: Path) -> None:
    """An output of a few bytes, as an earlier conversion left it."""
    (out / "release" / "mp_rank_00").mkdir(parents=True)
    (out / "release" / "mp_rank_00" / "model_optim_rng.pt").write_text("an older output")
    (out / "latest_checkpointed_iteration.txt").write_text("release")
    (out / "conversion_manifest.json").write_text('{"format": 1, "converter_version": "0"}')
