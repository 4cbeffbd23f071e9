"""Megatron-Core checkpoints: the real megatron-core loads what we write, and we export what it writes, bit for bit.

The tests that need megatron-core run it in processes of its own (`megatron_core.py`), all jobs of a session at once.
Install it next to the tests with `pip install --no-deps megatron-core==0.16.1` and `pip install
packaging numpy einops psutil`, or name an interpreter that has it in MEGATRON_CORE_PYTHON; without it they are skipped.
MEGATRON_CORE_ALL=1 runs models with experts in every layout and spelling, some 200 jobs.
The others need nothing but the converter.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import moe_models
import pytest
import tiny_models as tm
import torch
from conftest import GOLDEN, REPOSITORY, Result, Script
from megatron_files import assert_same_ranks, assert_same_tensors, read_checkpoint
from safetensors.torch import load_file

HARNESS = Path(__file__).parents[1] / "megatron_core.py"
PYTHON = os.environ.get("MEGATRON_CORE_PYTHON", sys.executable)
TOLERANCE = 1e-5
NO_EXTRA_STATE = "_extra_state"


# --- running megatron-core -------------------------------------------------------------------------------------------


@functools.cache
def without_megatron_core() -> str:
    """Why megatron-core cannot run, or nothing."""
    probe = subprocess.run(
        [PYTHON, "-c", "import megatron.core, psutil, einops"], check=False, capture_output=True, text=True
    )
    return "" if probe.returncode == 0 else f"{PYTHON}: {probe.stderr.strip().splitlines()[-1]}"


@dataclass(frozen=True)
class Job:
    """One load or save by megatron-core: of what, in which layout, and (load) by which conversion it came about."""

    action: str
    model: str
    layout: tuple[Any, ...] = ()
    conversion: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return "-".join(str(part).removeprefix("--") for part in (self.model, *self.layout)) or "plain"


def loads(
    model: str, tp: int = 1, pp: int = 1, vpp: int = 1, conversion: Sequence[Any] = (), norms: str = "", ep: int = 1
) -> Job:
    layout = [*(["--norms", norms, "--format", "torch"] if norms else []), "--tp", tp, "--pp", pp, "--vpp", vpp]
    return Job("load", model, (*layout, *(["--ep", ep] if ep > 1 else [])), tuple(conversion))


def saves(model: str, *layout: Any) -> Job:
    return Job("save", model, layout)


@pytest.fixture(scope="session")
def ran(request: pytest.FixtureRequest, tmp_path_factory, core, huggingface) -> Callable[[Job], Path]:
    """What a job left behind. All jobs of the session's tests run in one go, once for all its worker processes."""
    if reason := without_megatron_core():
        pytest.skip(f"megatron-core cannot be imported ({reason})")
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    jobs = list(dict.fromkeys(value for each in parameters for value in each.values() if isinstance(value, Job)))
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "megatron-core-jobs"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "jobs.json").exists():
            run_jobs(folder, jobs, core, huggingface)

    def result(job: Job) -> Path:
        number = jobs.index(job)
        error = folder / f"ERROR-{number}.txt"
        assert not error.exists(), error.read_text()
        assert (folder / str(number)).exists(), (folder / "stderr").read_text()[-4000:]
        return folder / str(number)

    return result


def run_harness(harness: Path, jobs: Sequence[dict[str, Any]], folder: Path) -> None:
    """Does all `jobs` by one start of a harness beside this folder, which says what they are."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCHDYNAMO_DISABLE": "1"}
    command = [PYTHON, harness, folder / "jobs.json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]


def run_jobs(folder: Path, jobs: Sequence[Job], core: Callable[..., Path], huggingface: Callable[[str], Path]) -> None:
    """Starts megatron-core once; job N leaves FOLDER/N or FOLDER/ERROR-N.txt."""
    lines = []
    for number, job in enumerate(jobs):
        line = [job.action, "--hf-config", huggingface(job.model) / "config.json", "--out", folder / str(number)]
        checkpoint = ["--checkpoint", core(job.model, *job.conversion)] if job.action == "load" else []
        lines.append([str(word) for word in (*line, *checkpoint, *job.layout)])
    (folder / "jobs.json").write_text(json.dumps(lines))
    with open(folder / "stderr", "wb") as output:
        subprocess.run(
            [PYTHON, HARNESS, "run", folder / "jobs.json"],
            check=False,
            stdout=output,
            stderr=output,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCHDYNAMO_DISABLE": "1"},
            timeout=900,
        )


# --- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Llama(tm.Tiny):
    """A llama whose head may be the embedding."""

    tied_head: bool = False

    @property
    def tied(self) -> bool:
        return self.tied_head


F32 = torch.float32
MODELS: dict[str, tm.Tiny] = (
    tm.MODELS
    | tm.DENSE
    | moe_models.MODELS
    | {
        model.name: model
        for model in (
            Llama("mha", "llama2", layers=2, heads=4, groups=4, dtype=F32),
            Llama("gqa", "llama2", layers=4, heads=8, groups=2, head_dim=8, vocab=250),
            Llama("six", "llama2", layers=6, heads=4, groups=2, vocab=250, dtype=F32),
            Llama("mqa", "llama2", layers=2, heads=4, groups=1, vocab=331, dtype=F32),
            Llama("tied", "llama2", layers=4, heads=8, groups=4, head_dim=8, vocab=250, dtype=F32, tied_head=True),
            Llama("tied-bf16", "llama2", layers=2, heads=4, groups=2, tied_head=True),
            tm.Tiny("window", "mistral", layers=2, heads=4, groups=2, max_positions=64, dtype=F32, window=5),
        )
    }
)


@pytest.fixture(scope="session")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model's Hugging Face folder without a tokenizer, written once."""
    root = tmp_path_factory.mktemp("huggingface")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else tm.write_huggingface(path, MODELS[name], tokenizer=False, spelling=4)

    return folder


@pytest.fixture(scope="session")
def core(tmp_path_factory, to_megatron: Script, huggingface) -> Callable[..., Path]:
    """Our Megatron-Core checkpoints, converted once for each set of options. Not to be changed by a test."""
    done: dict[tuple[str, ...], Path] = {}

    def convert(name: str, *options: Any) -> Path:
        key = (name, *map(str, options))
        if key not in done:
            out = tmp_path_factory.mktemp("core") / name
            to_core(to_megatron, MODELS[name].family, huggingface(name), out, *options).succeeded()
            done[key] = out
        return done[key]

    return convert


def to_core(to_megatron: Script, family: str, source: Path, out: Path, *options: Any) -> Result:
    return to_megatron(family, "--model-path", source, "--out", out, "--target", "megatron-core", *options)


def cut(tp: int = 1, pp: int = 1, per_virtual: int | None = None) -> list[Any]:
    """Options of a legacy checkpoint whose table is padded as the run pads it."""
    options = ["--ckpt-format", "torch", "--make-vocab-size-divisible-by", 128]
    options += ["--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp]
    return options + (["--num-layers-per-virtual-pipeline-stage", per_virtual] if per_virtual else [])


def export(to_hf: Script, checkpoint: Path, out: Path, *options: Any, model: str = "llama2") -> Path:
    arguments = ["--input_dir", checkpoint, "--output_dir", out, "--model", model, "--no_tokenizer", *options]
    to_hf(*arguments).succeeded()
    return out


def iteration_folder(root: Path) -> Path:
    """The folder that the tracker names."""
    name = (root / "latest_checkpointed_iteration.txt").read_text().strip()
    return root / (name if name == "release" else f"iter_{int(name):07d}")


@functools.cache
def reference_logits(folder: Path, tokens: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Transformers' logits [batch, sequence, V] in float32."""
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    with torch.no_grad():
        return network(torch.tensor(tokens)).logits


def assert_same_model(result_file: Path, huggingface: Path, dtype: torch.dtype) -> dict[str, Any]:
    """No parameter kept its NaN, all have the source's dtype, and the logits are transformers'."""
    result = torch.load(result_file, weights_only=True)
    assert result["nan"] == [], "these parameters were not filled"
    assert result["dtypes"] == [str(dtype)]
    assert result["checkpoint_version"] == 3.0
    expected = reference_logits(huggingface, tuple(map(tuple, result["tokens"].tolist())))
    assert result["logits"].shape == expected.shape
    assert (result["logits"] - expected).abs().max().item() < TOLERANCE
    return result


# --- what we write, loaded by megatron-core --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "job",
    [
        loads("mha", 1, 1),
        loads("mha", 2, 1),
        loads("gqa", 1, 1),
        loads("gqa", 2, 2),
        loads("gqa", 1, 2, 2),
        loads("mqa", 1, 1),
        loads("mqa", 2, 1),  # fewer groups than ranks
        loads("tied", 1, 1),
        loads("tied", 2, 2),
        loads("tied-bf16", 2, 1),
        loads("llama2-wide-heads", 2, 1),
        loads("llama2-linear", 1, 1),
        loads("codellama", 1, 1),
        loads("mistral-v0.3", 2, 1),
        loads("window", 1, 1),
        loads("llama3", 1, 1),
        loads("llama3-tied", 2, 2),
        loads("qwen2", 2, 1),
        loads("qwen2-tied", 1, 2),
        loads("qwen3", 2, 1),
        loads("qwen3-tied", 2, 2),
    ],
    ids=str,
)
def test_torch_dist_loads(job: Job, ran, huggingface) -> None:
    """The same files for every layout, under megatron-core's default strictness."""
    found = assert_same_model(ran(job), huggingface(job.model), MODELS[job.model].dtype)
    assert_training_args(found["args"], MODELS[job.model])


@pytest.mark.parametrize(
    "job",
    [
        loads(name, tp, pp, conversion=cut(tp, pp), norms=norms)
        for name, tp, pp in (
            ("gqa", 2, 2),
            ("mha", 1, 1),
            ("tied", 2, 2),
            ("mqa", 2, 1),
            ("qwen2", 2, 2),
            ("qwen3", 2, 1),
        )
        for norms in ("local", "te")
    ],
    ids=str,
)
def test_torch_loads_strictly(job: Job, ran, huggingface) -> None:
    """Rank files, one norm spelling chosen, strict=True."""
    found = assert_same_model(ran(job), huggingface(job.model), MODELS[job.model].dtype)
    assert_training_args(found["args"], MODELS[job.model])


@pytest.mark.parametrize(
    "job",
    [
        loads("gqa", 1, 1, conversion=cut(), norms="both"),
        loads("gqa", 2, 2, conversion=cut(2, 2), norms="both"),
        loads("gqa", 1, 2, 2, conversion=cut(1, 2, 1), norms="both"),
    ],
    ids=str,
)
def test_torch_loads_with_both_spellings(job: Job, ran, huggingface) -> None:
    """As Megatron-LM retries a failed strict load: nothing may stay unfilled, only the other spelling is left."""
    found = assert_same_model(ran(job), huggingface("gqa"), MODELS["gqa"].dtype)
    assert found["missing"] == []
    assert found["unexpected"]
    for name in found["unexpected"]:
        assert name.endswith(("linear_qkv.layer_norm_weight", "linear_fc1.layer_norm_weight", NO_EXTRA_STATE)), name


def assert_training_args(args: dict[str, Any], model: tm.Tiny) -> None:
    """What --use-checkpoint-args takes from the file."""
    expected = {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn,
        "num_attention_heads": model.heads,
        "num_query_groups": model.groups,
        "kv_channels": model.head_dim,
        "max_position_embeddings": model.max_positions,
        "rotary_base": model.theta,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": getattr(model, "model_type", "") == "qwen2",
        "untie_embeddings_and_output_weights": not model.tied,
        "group_query_attention": model.groups != model.heads,
    }
    assert {key: args.get(key) for key in expected} == expected


# --- experts ---------------------------------------------------------------------------------------------------------

ALL_LAYOUTS = bool(os.environ.get("MEGATRON_CORE_ALL"))  # of every model with experts; else one of each family


def in_ranks(tp: int, ep: int, *options: Any, pp: int = 1) -> list[Any]:
    return [*cut(tp, pp), "--expert-model-parallel-size", ep, *options]


def moe_loads() -> list[Job]:
    daily = [("mixtral", 1, 1, 2), ("qwen2-moe", 2, 1, 1), ("qwen3-moe", 2, 1, 2), ("glm4-moe", 1, 1, 2)]
    daily += [("qwen3-moe-mixed", 1, 2, 2)]
    sizes = [(tp, pp, ep) for pp in (1, 2) for tp in (1, 2) for ep in (1, 2) if tp * pp * ep < 8]
    everything = [
        (name, *each) for name, model in moe_models.MODELS.items() for each in sizes if not model.layers % each[1]
    ]
    return [loads(name, tp, pp, ep=ep) for name, tp, pp, ep in (everything if ALL_LAYOUTS else daily)]


def moe_loads_of_ranks() -> list[Job]:
    each, grouped = (), ("--moe-grouped-gemm",)
    daily = [
        ("mixtral", 2, 2, grouped),
        ("qwen2-moe", 2, 2, each),
        ("qwen3-moe", 1, 2, each),
        ("glm4-moe", 2, 2, grouped),
    ]
    sizes = [(tp, ep, spelled) for tp in (1, 2) for ep in (1, 2) for spelled in (each, grouped)]
    everything = [(name, *size) for name in moe_models.MODELS for size in sizes]
    return [
        loads(name, tp, conversion=in_ranks(tp, ep, *spelled), norms="local", ep=ep)
        for name, tp, ep, spelled in (everything if ALL_LAYOUTS else daily)
    ]


@pytest.mark.parametrize("job", moe_loads(), ids=str)
def test_experts_of_torch_dist_load(job: Job, ran, huggingface) -> None:
    """In the local layer spec, under megatron-core's default strictness."""
    found = assert_same_model(ran(job), huggingface(job.model), MODELS[job.model].dtype)
    assert found["buffers"] == (["torch.float32"] if MODELS[job.model].family == "glm4-moe" else [])


@pytest.mark.parametrize("job", moe_loads_of_ranks(), ids=str)
def test_experts_of_rank_files_load_strictly(job: Job, ran, huggingface) -> None:
    """Under SequentialMLP's names, and under TEGroupedMLP's, which the harness reads through those."""
    assert_same_model(ran(job), huggingface(job.model), MODELS[job.model].dtype)


# --- what we write, looked at without megatron-core ------------------------------------------------------------------


def read_metadata(root: Path) -> Any:
    with open(iteration_folder(root) / ".metadata", "rb") as file:
        return pickle.load(file)


def expected_shapes(model: tm.Tiny) -> dict[str, tuple[int, ...]]:
    layers, hidden, qkv = model.layers, model.hidden, (model.heads + 2 * model.groups) * model.head_dim
    shapes = {
        "embedding.word_embeddings.weight": (model.vocab, hidden),
        "output_layer.weight": (model.vocab, hidden),
        "decoder.final_layernorm.weight": (hidden,),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (layers, hidden),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (layers, hidden),
        "decoder.layers.self_attention.linear_qkv.weight": (layers, qkv, hidden),
        "decoder.layers.self_attention.linear_proj.weight": (layers, hidden, model.heads * model.head_dim),
        "decoder.layers.mlp.linear_fc1.weight": (layers, 2 * model.ffn, hidden),
        "decoder.layers.mlp.linear_fc2.weight": (layers, hidden, model.ffn),
    }
    if model.tied:
        del shapes["output_layer.weight"]
    return shapes


@pytest.mark.parametrize("name", ["gqa", "tied", "mqa"])
def test_torch_dist_files(name: str, core) -> None:
    root, model = core(name), MODELS[name]
    folder = iteration_folder(root)
    assert json.loads((folder / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    metadata = read_metadata(root)
    tensors = {k: tuple(v.size) for k, v in metadata.state_dict_metadata.items() if hasattr(v, "size")}
    assert tensors == expected_shapes(model)
    modules = "self_attention.linear_qkv self_attention.linear_proj self_attention.core_attention mlp.linear_fc1"
    extra = {
        f"decoder.layers.{module}._extra_state/shard_{layer}_{model.layers}"
        for module in [*modules.split(), "mlp.linear_fc2"]
        for layer in range(model.layers)
    }
    objects = {k for k, v in metadata.state_dict_metadata.items() if not hasattr(v, "size")}
    assert objects >= extra | {"decoder.final_layernorm._extra_state/shard_0_1"}
    for key, value in metadata.state_dict_metadata.items():
        if hasattr(value, "size"):
            assert value.properties.dtype == model.dtype, key
    used = {info.relative_path for info in metadata.storage_data.values()}
    assert used == {path.name for path in folder.glob("*.distcp")}
    for index, info in metadata.storage_data.items():
        assert info.offset + info.length <= (folder / info.relative_path).stat().st_size, index


@pytest.mark.parametrize("options", [[], cut(2, 2)], ids=["torch_dist", "torch"])
def test_no_path_is_kept(options: list[Any], core, huggingface) -> None:
    root = core("gqa", *options)
    for path in root.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for place in (root, huggingface("gqa")):
                assert str(place).encode() not in content, path


def test_common_is_plain(core) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        common = torch.load(iteration_folder(core("gqa")) / "common.pt", weights_only=True)
    assert common["checkpoint_version"] == 3.0
    assert common["content_metadata"]["singleton_local_shards"] is False
    assert "padded_vocab_size" not in vars(common["args"])


def test_torch_files_hold_both_spellings(core) -> None:
    """Stage 1 of 2: layer numbers start again, each norm is there under both names, no embedding."""
    path = iteration_folder(core("gqa", *cut(2, 2))) / "mp_rank_01_001" / "model_optim_rng.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        model = torch.load(path, weights_only=True)["model"]
    expected = MODELS["gqa"].tensors()
    for local, layer in ((0, 2), (1, 3)):
        names = {
            "input_layernorm": ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
            "post_attention_layernorm": ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        }
        for source, targets in names.items():
            for target in targets:
                wanted = expected[f"model.layers.{layer}.{source}.weight"]
                assert torch.equal(model[f"decoder.layers.{local}.{target}"], wanted), target
        gate, up = (expected[f"model.layers.{layer}.mlp.{half}_proj.weight"].chunk(2)[1] for half in ("gate", "up"))
        assert torch.equal(model[f"decoder.layers.{local}.mlp.linear_fc1.weight"], torch.cat([gate, up]))
    assert "embedding.word_embeddings.weight" not in model
    assert model["output_layer.weight"].shape == (128, MODELS["gqa"].hidden)  # 250 rows become 256


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("llama2-linear", "--norm-epsilon 1e-05 --rotary-base 10000 --rotary-seq-len-interpolation-factor 4 --bf16"),
        ("mistral-v0.1", "--norm-epsilon 1e-05 --rotary-base 10000 --window-size 4095,0 --bf16"),
        ("codellama", "--norm-epsilon 1e-05 --rotary-base 1000000 --bf16"),
        ("llama", "--norm-epsilon 1e-06 --rotary-base 10000 --fp16"),
        ("mha", "--norm-epsilon 1e-05 --rotary-base 10000"),
    ],
)
@pytest.mark.parametrize("form", ["torch_dist", "torch"])
def test_report_names_the_training_flags(form, name, flags, to_megatron, huggingface, tmp_path: Path) -> None:
    """What --use-checkpoint-args does not restore, and a line to load with."""
    result = to_core(
        to_megatron, MODELS[name].family, huggingface(name), tmp_path / "out", "--ckpt-format", form
    ).succeeded()
    (line,) = [line for line in result.text.splitlines() if line.startswith("train with")]
    load = f"--load {tmp_path / 'out'} --ckpt-format {form} --use-checkpoint-args --no-load-optim --no-load-rng"
    assert line == f"train with  {load} {flags}"


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mha", []),
        ("gqa", []),
        ("mqa", []),
        ("tied", []),
        ("llama2-wide-heads", []),
        ("gqa", cut(2, 2)),
        ("gqa", cut(1, 2, 1)),
        ("tied", cut(2, 2)),
        ("mqa", cut(2)),
    ],
)
def test_back_is_bit_equal(name: str, options: list[Any], core, huggingface, to_hf, tmp_path: Path) -> None:
    out = export(to_hf, core(name, *options), tmp_path / "back")
    assert_same_tensors(tm.read_huggingface(out), MODELS[name].tensors())
    assert_same_config(out, huggingface(name))


def assert_same_config(found: Path, expected: Path) -> None:
    """config.json means the same to transformers."""
    import transformers

    one, two = (transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in (found, expected))
    sizes = "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads vocab_size"
    rest = (
        "model_type sliding_window max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings hidden_act"
    )
    keys = f"{sizes} {rest}".split()
    assert {key: one.get(key) for key in keys} == {key: two.get(key) for key in keys}


@pytest.mark.parametrize("options", [[], cut(2)], ids=["torch_dist", "torch"])
def test_through_megatron_llm(options: list[Any], to_megatron, to_hf, huggingface, tmp_path: Path) -> None:
    """HF -> Megatron-LLM (TP2 x PP2) -> Megatron-Core -> HF."""
    layout = ["--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2]
    to_megatron("llama2", "--model-path", huggingface("gqa"), "--out", tmp_path / "llm", *layout).succeeded()
    to_core(to_megatron, "llama2", tmp_path / "llm", tmp_path / "core", *options).succeeded()
    out = export(to_hf, tmp_path / "core", tmp_path / "back")
    assert_same_tensors(tm.read_huggingface(out), MODELS["gqa"].tensors())


@pytest.mark.parametrize(("case", "tp", "pp"), [("llama2-gqa", 1, 3), ("codellama-gqa", 2, 2), ("llama2-gqa", 1, 1)])
def test_core_to_megatron_llm_is_golden(case: str, tp: int, pp: int, to_megatron, tmp_path: Path) -> None:
    """HF -> Megatron-Core -> Megatron-LLM gives what the original's own code wrote."""
    golden = GOLDEN / case / f"megatron-tp{tp}pp{pp}"
    family = tm.read_json(GOLDEN / case / "case.json")["family"]
    to_core(to_megatron, family, GOLDEN / case / "hf", tmp_path / "core").succeeded()
    layout = ["--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp]
    to_megatron(family, "--model-path", tmp_path / "core", "--out", tmp_path / "llm", *layout).succeeded()
    assert_same_ranks(read_checkpoint(tmp_path / "llm").tensors, read_checkpoint(golden).tensors)


# --- what megatron-core writes, exported by us -----------------------------------------------------------------------


def assert_exports(root: Path, name: str, huggingface: Path, to_hf: Script, out: Path, *options: Any) -> None:
    """Bit for bit with the true rows, and with all rows where no one says how many are true."""
    expected = load_file(root / "expected.safetensors")
    rows = ["--true_vocab_size", MODELS[name].vocab]
    family = MODELS[name].family
    trimmed = export(to_hf, root, out / "trimmed", *rows, *options, model=family)
    assert_same_tensors(tm.read_huggingface(trimmed), expected)
    assert_same_config(trimmed, huggingface)
    whole = export(to_hf, root, out / "whole", *options, model=family)
    assert_same_tensors(tm.read_huggingface(whole), expected | load_file(root / "padded.safetensors"))


# Pipeline stages of unequal length, by each arg that makes them.
_PP2, _PP3, _VPP = (("--format", "torch", *cut) for cut in (("--pp", 2), ("--pp", 3), ("--pp", 2, "--vpp", 2)))
UNEVEN: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("gqa", _PP2, {"decoder_first_pipeline_num_layers": 1}),
    ("tied", (*_PP2, "--tp", 2), {"decoder_last_pipeline_num_layers": 1}),
    ("gqa", _PP3, {"decoder_first_pipeline_num_layers": 2, "decoder_last_pipeline_num_layers": 1}),
    ("six", _VPP, {"decoder_first_pipeline_num_layers": 2}),
    ("six", _VPP, {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}),
    ("six", _PP2, {"pipeline_model_parallel_layout": "Ettttt|tL"}),
    ("six", _VPP, {"pipeline_model_parallel_layout": "E(t|)*1,t|(tt)*2|L"}),
    ("six", (*_PP3, "--tp", 2), {"pipeline_model_parallel_layout": "E|t*6|L"}),
]

TRAINED = saves("gqa", "--tp", 2, "--training-state")
with_trained = pytest.mark.parametrize("job", [TRAINED], ids=str)


@pytest.mark.parametrize(
    "job",
    [
        saves("mha"),
        TRAINED,
        saves("mqa", "--tp", 2),
        saves("tied", "--tp", 2, "--pp", 2),
        saves("window", "--tp", 2),
        saves("gqa", "--pp", 2, "--vpp", 2),
        saves("gqa", "--tp", 2, "--layers", "apart"),
        saves("gqa", "--tp", 2, "--layers", "singleton"),
        saves("gqa", "--common", "inside"),
        saves("gqa", "--format", "torch", "--tp", 2, "--pp", 2, "--training-state"),
        saves("tied", "--format", "torch", "--tp", 2, "--pp", 2),
        saves("gqa", "--format", "torch", "--pp", 2, "--vpp", 2),
        saves("mqa", "--format", "torch", "--tp", 2),
        *(saves(name, *cut, "--stages", json.dumps(stages)) for name, cut, stages in UNEVEN),
    ],
    ids=str,
)
def test_export_of_megatron_core(job: Job, ran, huggingface, to_hf, tmp_path: Path) -> None:
    assert_exports(ran(job), job.model, huggingface(job.model), to_hf, tmp_path)


def moe_saves() -> list[Job]:
    """Rank files: three spellings. torch_dist: one, for which GroupedMLP transposes (-k "not legacy" from 0.17 on)."""
    ranks, each, grouped, legacy = ("--format", "torch"), ("each",), ("grouped",), ("legacy",)
    daily = [
        saves("mixtral", *ranks, "--tp", 2, "--ep", 2, "--experts", *legacy),
        saves("qwen2-moe", *ranks, "--tp", 2, "--ep", 2, "--etp", 1, "--experts", *grouped),
        saves("qwen3-moe-mixed", *ranks, "--pp", 2, "--ep", 2, "--experts", *each),
        saves("qwen3-moe", "--tp", 2, "--experts", *legacy),
        saves("glm4-moe", "--tp", 2, "--ep", 2),
        saves("glm4-moe-groups", *ranks, "--pp", 2, "--vpp", 2, "--ep", 2, "--experts", *legacy),
    ]
    everything = [
        saves(name, *form, "--tp", tp, "--ep", ep, *(("--etp", 1) if etp else ()), "--experts", how)
        for name in moe_models.MODELS
        for form, kinds in ((ranks, (*each, *grouped, *legacy)), ((), (*each, *legacy)))
        for tp in (1, 2)
        for ep in (1, 2)
        for etp in (False, *((True,) if tp * ep == 4 else ()))
        for how in kinds
    ]
    return everything if ALL_LAYOUTS else daily


@pytest.mark.parametrize("job", moe_saves(), ids=str)
def test_export_of_experts(job: Job, ran, huggingface, to_hf, tmp_path: Path) -> None:
    """Of megatron-core's own modules; only TEGroupedMLP's names are put on by the harness."""
    assert_exports(ran(job), job.model, huggingface(job.model), to_hf, tmp_path)


@with_trained
def test_secrets_stay_behind(job: Job, ran, to_hf, tmp_path: Path) -> None:
    out = export(to_hf, ran(job), tmp_path / "out")
    for path in out.rglob("*"):
        assert not path.is_file() or b"do-not-copy-me" not in path.read_bytes(), path


@with_trained
def test_optimizer_is_not_read(job: Job, ran, huggingface, to_hf, tmp_path: Path) -> None:
    """The bytes of optimizer and random state are destroyed: nobody may notice."""
    shutil.copytree(ran(job), tmp_path / "in")
    folder = iteration_folder(tmp_path / "in")
    destroyed = 0
    for index, info in read_metadata(tmp_path / "in").storage_data.items():
        if index.fqn.startswith(("optimizer.", "rng_state")):
            with open(folder / info.relative_path, "r+b") as file:
                file.seek(info.offset)
                file.write(b"\xff" * info.length)
            destroyed += 1
    assert destroyed > 50
    assert_exports(tmp_path / "in", "gqa", huggingface("gqa"), to_hf, tmp_path)


RUN_CONFIG = """\
model:
  _target_: megatron.bridge.models.llama.llama_provider.Llama2ModelProvider7B
  activation_func:
    _call_: false
    _target_: torch.nn.functional.silu
  add_bias_linear: false
  add_qkv_bias: false
  ffn_hidden_size: {ffn}
  gated_linear_unit: true
  hidden_size: {hidden}
  kv_channels: {head_dim}
  layernorm_epsilon: 1.0e-05
  make_vocab_size_divisible_by: 128
  multi_latent_attention: false
  normalization: RMSNorm
  num_attention_heads: {heads}
  num_layers: {layers}
  num_moe_experts: null
  num_query_groups: {groups}
  params_dtype:
    _call_: false
    _target_: torch.bfloat16
  pipeline_model_parallel_size: 1
  position_embedding_type: rope
  qk_layernorm: false
  rotary_base: 10000
  rotary_interleaved: false
  rotary_percent: 1.0
  seq_len_interpolation_factor: null
  seq_length: {max_positions}
  share_embeddings_and_output_weights: false
  tensor_model_parallel_size: 2
  vocab_size: null
  window_size: null
train:
  _target_: megatron.bridge.training.config.TrainingConfig
  exit_signal:
    _args_:
    - 15
    _call_: true
    _target_: signal.Signals
"""


def edit_common(root: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Changes common.pt of a checkpoint whose args are plain."""
    path = iteration_folder(root) / "common.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        common = torch.load(path, weights_only=True)
    edit(common)
    torch.save(common, path)


def as_bridge(root: Path) -> None:
    """Takes the args out, as Megatron-Bridge has none."""
    folder = iteration_folder(root)
    common = {"checkpoint_version": 3.0, "iteration": 0 if folder.name == "release" else int(folder.name[5:])}
    torch.save(common | {"content_metadata": {"singleton_local_shards": False}}, folder / "common.pt")


@with_trained
def test_export_of_megatron_bridge(job: Job, ran, huggingface, to_hf, tmp_path: Path) -> None:
    """No args: the config is in run_config.yaml, whose targets are names and never called."""
    shutil.copytree(ran(job), tmp_path / "in")
    as_bridge(tmp_path / "in")
    model = MODELS["gqa"]
    text = RUN_CONFIG.format_map({key: getattr(model, key) for key in model.__dataclass_fields__})
    (iteration_folder(tmp_path / "in") / "run_config.yaml").write_text(text)
    assert_exports(tmp_path / "in", "gqa", huggingface("gqa"), to_hf, tmp_path)


@with_trained
def test_no_config_anywhere(job: Job, ran, to_hf, tmp_path: Path) -> None:
    shutil.copytree(ran(job), tmp_path / "in")
    as_bridge(tmp_path / "in")
    refuse(to_hf, tmp_path / "in", "run_config.yaml")


# --- bad input -------------------------------------------------------------------------------------------------------


def refuse(to_hf: Script, root: Path, *words: str) -> None:
    """Exit 1, the words on stderr, nothing left behind."""
    out = root.parent / "refused"
    to_hf("--input_dir", root, "--output_dir", out, "--model", "llama2", "--no_tokenizer").refused(*words)
    assert not (out / "config.json").exists()


@pytest.fixture
def copied(core, tmp_path: Path) -> Path:
    """A torch_dist checkpoint of ours, to be damaged."""
    return Path(shutil.copytree(core("gqa"), tmp_path / "damaged"))


@pytest.mark.parametrize("keep", [0.0, 0.5, -1])
def test_truncated_distcp(keep: float, copied: Path, to_hf) -> None:
    path = max(iteration_folder(copied).glob("*.distcp"), key=lambda file: file.stat().st_size)
    size = path.stat().st_size
    os.truncate(path, size - 1 if keep < 0 else int(size * keep))
    refuse(to_hf, copied, path.name)


def test_missing_distcp(copied: Path, to_hf) -> None:
    path = max(iteration_folder(copied).glob("*.distcp"), key=lambda file: file.stat().st_size)
    path.unlink()
    refuse(to_hf, copied, path.name)


def test_missing_metadata(copied: Path, to_hf) -> None:
    (iteration_folder(copied) / ".metadata").unlink()
    refuse(to_hf, copied, ".metadata")


@pytest.mark.parametrize("keep", [0, 100])
def test_truncated_metadata(keep: int, copied: Path, to_hf) -> None:
    os.truncate(iteration_folder(copied) / ".metadata", keep)
    refuse(to_hf, copied, ".metadata")


class Hostile:
    """Unpickled by an unrestricted loader, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", [".metadata", "common.pt"])
def test_foreign_global(place: str, copied: Path, to_hf, tmp_path: Path) -> None:
    """Named, never executed."""
    trap = tmp_path / "executed"
    if place == ".metadata":
        metadata = read_metadata(copied)
        metadata.planner_data = Hostile(trap)
        (iteration_folder(copied) / place).write_bytes(pickle.dumps(metadata))
    else:
        edit_common(copied, lambda common: common.update(extra=Hostile(trap)))
    refuse(to_hf, copied, "mkdir", place)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("changes", "word"), [({"num_experts": 8}, "expert"), ({"multi_latent_attention": True}, "latent")]
)
def test_architectures_that_are_refused(changes: dict[str, Any], word: str, copied: Path, to_hf) -> None:
    edit_common(copied, lambda common: vars(common["args"]).update(changes))
    refuse(to_hf, copied, word)


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("mlp.linear_fc1.weight", "mlp.experts.experts.linear_fc1.weight", "expert"),
        ("self_attention.linear_qkv.weight", "self_attention.linear_kv_down_proj.weight", "latent"),
    ],
)
def test_tensors_of_refused_architectures(old: str, new: str, word: str, copied: Path, to_hf) -> None:
    """The args say nothing, the tensors' names do."""
    metadata = read_metadata(copied)
    old, new = f"decoder.layers.{old}", f"decoder.layers.{new}"
    metadata.state_dict_metadata[new] = metadata.state_dict_metadata.pop(old)
    metadata.storage_data = {
        (replace(index, fqn=new) if index.fqn == old else index): info for index, info in metadata.storage_data.items()
    }
    (iteration_folder(copied) / ".metadata").write_bytes(pickle.dumps(metadata))
    refuse(to_hf, copied, word)


def test_tensors_of_refused_architectures_in_rank_files(core, to_hf, tmp_path: Path) -> None:
    shutil.copytree(core("gqa", *cut()), tmp_path / "in")
    path = iteration_folder(tmp_path / "in") / "mp_rank_00" / "model_optim_rng.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    content["model"]["decoder.layers.0.mlp.router.weight"] = torch.zeros(4, 64)
    torch.save(content, path)
    refuse(to_hf, tmp_path / "in", "expert", "router")


def edit_metadata(root: Path, edit: Callable[[Any], None]) -> None:
    metadata = read_metadata(root)
    edit(metadata)
    (iteration_folder(root) / ".metadata").write_bytes(pickle.dumps(metadata))


FC2 = "decoder.layers.mlp.linear_fc2.weight"


def without_tensor(metadata: Any) -> None:
    del metadata.state_dict_metadata[FC2]
    metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if k.fqn != FC2}


def with_more_rows(metadata: Any) -> None:
    item = metadata.state_dict_metadata[FC2]
    item.size = torch.Size((item.size[0], item.size[1] + 8, item.size[2]))


def without_chunk(metadata: Any) -> None:
    """Nothing may be filled with what happens to lie in memory."""
    metadata.state_dict_metadata[FC2].chunks.pop()


def without_item(metadata: Any) -> None:
    lost = metadata.state_dict_metadata[FC2].chunks[0]
    metadata.storage_data = {
        k: v for k, v in metadata.storage_data.items() if k.fqn != FC2 or tuple(k.offset) != tuple(lost.offsets)
    }


def with_overlap_and_hole(metadata: Any) -> None:
    """Layer 0's chunk is there twice, the second time where layer 1's would be: the number of elements is right."""
    chunks = metadata.state_dict_metadata[FC2].chunks
    chunks[1] = chunks[0]


def beyond_the_shape(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata[FC2].chunks
    chunks[0] = replace(chunks[0], sizes=torch.Size((2, *chunks[0].sizes[1:])))
    chunks[-1] = replace(chunks[-1], sizes=torch.Size((2, *chunks[-1].sizes[1:])))


def with_other_type(metadata: Any) -> None:
    metadata.state_dict_metadata[FC2].properties.dtype = torch.float16


def swapped_with_proj(metadata: Any) -> None:
    """The index places a part of linear_fc2 where a part of linear_proj stands."""
    data, proj = metadata.storage_data, "decoder.layers.self_attention.linear_proj.weight"
    one, two = (next(k for k in data if k.fqn == name) for name in (FC2, proj))
    data[one], data[two] = data[two], data[one]


def compressed(metadata: Any) -> None:
    for index, info in metadata.storage_data.items():
        if index.fqn == FC2:
            info.transform_descriptors = ["zstd"]


def outside_the_folder(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = f"../release/{info.relative_path}"


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (without_tensor, FC2),
        (with_more_rows, FC2),
        (without_chunk, FC2),
        (without_item, FC2),
        (with_overlap_and_hole, "overlap"),
        (beyond_the_shape, FC2),
        (with_other_type, FC2),
        (swapped_with_proj, "linear_proj"),
        (compressed, "zstd"),
        (outside_the_folder, "own folder"),
    ],
)
def test_index_that_does_not_fit(edit: Callable[[Any], None], word: str, copied: Path, to_hf) -> None:
    edit_metadata(copied, edit)
    refuse(to_hf, copied, word)


def test_items_in_another_format(copied: Path, to_hf) -> None:
    """torch.distributed.checkpoint can write safetensors; then no archive begins where the index says."""
    info = next(v for k, v in read_metadata(copied).storage_data.items() if k.fqn == FC2)
    with open(iteration_folder(copied) / info.relative_path, "r+b") as file:
        file.seek(info.offset)
        file.write(b"\x80\x00\x00\x00\x00\x00\x00\x00{")
    refuse(to_hf, copied, FC2, "safetensors")


@pytest.mark.parametrize("where", ["head", "tail"])
def test_damaged_item_among_many(where: str, copied: Path, to_hf) -> None:
    """All items of a shape look alike around their data. One that does not is taken apart on its own."""
    info = [v for k, v in read_metadata(copied).storage_data.items() if k.fqn == FC2][2]
    path = iteration_folder(copied) / info.relative_path
    with open(path, "r+b") as file:
        file.seek(info.offset)
        item = file.read(info.length)
        file.seek(info.offset + (item.index(b"BFloat16Storage") if where == "head" else info.length - 22))
        file.write(b"\xff" * 8)
    refuse(to_hf, copied, path.name)


def test_metadata_of_older_releases(copied: Path, core, to_hf, tmp_path: Path) -> None:
    """Up to Megatron-Core 0.15 the index of a training run is of a class of its own, with plans and paths inside."""
    name = "megatron.core.dist_checkpointing.strategies.torch"
    metadata = read_metadata(copied)
    module = types.ModuleType(name)
    for kind in ("MCoreMetadata", "MCoreSavePlan"):
        setattr(module, kind, type(kind, (), {"__module__": name}))
    older = module.MCoreMetadata()
    vars(older).update(vars(metadata), mcore_data={"optimizer": {"nested": [1, 2]}})
    older.all_local_plans = [module.MCoreSavePlan()]
    older.storage_meta = Path("/where/it/was")
    packages = [".".join(name.split(".")[:depth]) for depth in range(1, 5)]
    with pytest.MonkeyPatch.context() as patch:
        for package in packages:
            patch.setitem(sys.modules, package, types.ModuleType(package))
        patch.setitem(sys.modules, name, module)
        (iteration_folder(copied) / ".metadata").write_bytes(pickle.dumps(older))
    out = export(to_hf, copied, tmp_path / "back")
    assert_same_tensors(tm.read_huggingface(out), MODELS["gqa"].tensors())


def test_missing_common(copied: Path, to_hf) -> None:
    (iteration_folder(copied) / "common.pt").unlink()
    refuse(to_hf, copied, "common.pt")


def test_without_args_the_manifest_says(copied: Path, to_hf, tmp_path: Path) -> None:
    as_bridge(copied)
    out = export(to_hf, copied, tmp_path / "back")
    assert_same_tensors(tm.read_huggingface(out), MODELS["gqa"].tensors())
    (copied / "conversion_manifest.json").unlink()
    refuse(to_hf, copied, "run_config.yaml", "conversion_manifest.json")


def test_run_config_without_a_reader(copied: Path, to_hf, monkeypatch) -> None:
    as_bridge(copied)
    (iteration_folder(copied) / "run_config.yaml").write_text("model: {}")
    monkeypatch.setitem(sys.modules, "yaml", None)
    refuse(to_hf, copied, "run_config.yaml", "PyYAML")


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("num_moe_experts: 8", "expert"),
        ("rope_scaling: true", "rope scaling"),
        ("activation_func: {_target_: torch.nn.functional.gelu}", "SwiGLU"),
        ("window_size: {_target_: builtins.print}", "window"),
        ("window_size: [4095, 0]", "window"),
        ("seq_len_interpolation_factor: many", "seq_len_interpolation_factor"),
        ("hidden_size: many", "hidden_size"),
        ("!!python/object/apply:os.mkdir [executed]", "run_config.yaml"),
    ],
)
def test_run_config_that_is_refused(line: str, word: str, copied: Path, to_hf) -> None:
    as_bridge(copied)
    model = MODELS["gqa"]
    text = RUN_CONFIG.format_map({key: getattr(model, key) for key in model.__dataclass_fields__})
    key = line.partition(":")[0]
    kept = [other for other in text.splitlines() if not other.startswith(f"  {key}:")]
    if key == "activation_func":
        kept = [other for other in kept if other not in ("    _call_: false", "    _target_: torch.nn.functional.silu")]
        kept = [other for other in kept if other != "    _target_: torch.bfloat16"]
    (iteration_folder(copied) / "run_config.yaml").write_text("\n".join(kept).replace("model:", f"model:\n  {line}", 1))
    refuse(to_hf, copied, word)
    assert not Path("executed").exists()


def test_window_of_another_family(copied: Path, to_hf) -> None:
    """No shape would betray it."""
    edit_common(copied, lambda common: setattr(common["args"], "window_size", (4095, 0)))
    refuse(to_hf, copied, "window", "4096", "mistral")


def test_falcon_is_refused(to_megatron, tmp_path: Path) -> None:
    source = tm.write_huggingface(tmp_path / "hf", tm.MODELS["falcon-7b"], tokenizer=False)
    to_core(to_megatron, "falcon", source, tmp_path / "out").refused("falcon", "attention in parallel")
    assert not (tmp_path / "out").exists()


def test_torch_dist_is_not_for_megatron_llm(to_megatron, huggingface, tmp_path: Path) -> None:
    result = to_megatron(
        "llama2", "--model-path", huggingface("gqa"), "--out", tmp_path / "out", "--ckpt-format", "torch_dist"
    )
    assert result.code in (1, 2)
    assert "torch_dist" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("heads", "groups", "tp"), [(8, 2, 3), (6, 3, 2)])
def test_groups_that_megatron_core_cannot_cut(heads, groups, tp, to_megatron, tmp_path: Path) -> None:
    """k % TP or TP % k must be 0."""
    model = Llama(f"odd-{tp}", "llama2", hidden=96, ffn=96, heads=heads, groups=groups, head_dim=96 // heads)
    source = tm.write_huggingface(tmp_path / "hf", model, tokenizer=False)
    to_core(to_megatron, "llama2", source, tmp_path / "out", *cut(tp)).refused(str(groups), str(tp))
    assert not (tmp_path / "out").exists()


# --- memory ----------------------------------------------------------------------------------------------------------


def sparse_7b(folder: Path, layers: int) -> None:
    """Llama-2-7B with fewer layers: right shapes, and data that are holes in the file."""
    hidden, ffn, vocab = 4096, 11008, 32000
    model = Llama("7b", "llama2", layers, hidden, ffn, heads=32, groups=32, head_dim=128, vocab=vocab)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config(4)))
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [vocab, hidden], "lm_head.weight": [vocab, hidden]}
    shapes["model.norm.weight"] = [hidden]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": [hidden, hidden] for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": [ffn, hidden] for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = [hidden, ffn]
        shapes |= {f"{prefix}{name}_layernorm.weight": [hidden] for name in ("input", "post_attention")}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


@pytest.mark.parametrize("direction", ["import", "export"])
def test_peak_memory(direction: str, tmp_path: Path) -> None:
    """A 7B's layers; the number of layers is no part of the peak (MEGATRON_CORE_LAYERS=32 for all of it)."""
    layers = int(os.environ.get("MEGATRON_CORE_LAYERS", "6"))
    needed = 2 * (2 * 32000 * 4096 + layers * (4 * 4096**2 + 3 * 4096 * 11008)) * (1 if direction == "import" else 2)
    if shutil.disk_usage(tmp_path).free < 1.5 * needed:
        pytest.skip(f"needs {1.5 * needed / 1e9:.0f} GB of disk")
    sparse_7b(tmp_path / "hf", layers)
    command = ["hf_to_megatron.py", "llama2", "--model-path", tmp_path / "hf", "--out", tmp_path / "core"]
    peak = peak_bytes(*command, "--target", "megatron-core")
    if direction == "export":
        back = ["--input_dir", tmp_path / "core", "--output_dir", tmp_path / "back", "--no_tokenizer"]
        peak = peak_bytes("megatron_to_hf.py", *back)
    for folder in ("core", "back"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    assert peak <= 1.5e9, f"{peak / 1e9:.2f} GB resident"


def peak_bytes(script: str, *arguments: Any) -> int:
    """Largest resident memory of one run."""
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / script, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    output = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    assert process.returncode == 0, output
    return usage.ru_maxrss * 1024
