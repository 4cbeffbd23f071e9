"""Both scripts on one rank: every family, every kind of source, the dtype, the files, and the numbers they give."""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import reference_forward
import tiny_models as tm
import torch
from conftest import REPOSITORY
from megatron_files import assert_same_tensors, read_checkpoint, write_checkpoint
from naive_layout import megatron_ranks, meta_to_huggingface
from safetensors import safe_open

NAMES = sorted(tm.MODELS)
MODEL_FILE = "release/mp_rank_00/model_optim_rng.pt"


def exported(to_hf, checkpoint: Path, out: Path, family: str, *options: object) -> Path:
    to_hf("--input_dir", checkpoint, "--output_dir", out, "--model", family, *options).succeeded()
    return out


# --- values and logits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_import_values_and_logits(name: str, imported, tokens: torch.Tensor) -> None:
    """Bit for bit what the naive rule says; and the file, run on Megatron-LLM's conventions, is the same model."""
    model = tm.MODELS[name]
    checkpoint = read_checkpoint(imported(name))
    assert_same_tensors(checkpoint.single, megatron_ranks(model.config(), model.tensors())[0, 0, 0], name)
    found = reference_forward.logits(checkpoint.single, checkpoint.args, tokens)
    expected = tm.transformers_logits(model, model.tensors(), tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_sensitive(name: str, tokens: torch.Tensor) -> None:
    """Another theta moves the logits of every tiny model: agreement to 1e-5 means something."""
    model = tm.MODELS[name]
    here = tm.transformers_logits(model, model.tensors(), tokens)
    there = tm.transformers_logits(replace(model, theta=model.theta * 2), model.tensors(), tokens)
    assert (here - there).abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_export_values_and_logits(name: str, imported, to_hf, tmp_path: Path, tokens: torch.Tensor) -> None:
    """The way back gives the source's tensors, and a folder that transformers loads as the source's model."""
    model = tm.MODELS[name]
    out = exported(to_hf, imported(name), tmp_path / "out", model.family)
    assert_same_tensors(tm.read_huggingface(out), model.tensors(), name)
    expected = tm.transformers_logits(model, model.tensors(), tokens)
    torch.testing.assert_close(tm.folder_logits(out, tokens), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_export_without_manifest(name: str, to_hf, tmp_path: Path, tokens: torch.Tensor) -> None:
    """A checkpoint that training wrote, and nothing of ours beside it: args alone must do."""
    model = tm.MODELS[name]
    ranks = megatron_ranks(model.config(), model.tensors())
    write_checkpoint(tmp_path / "in", ranks, tm.training_args(model), iteration=12)
    out = exported(to_hf, tmp_path / "in", tmp_path / "out", model.family, "--no_tokenizer")
    assert_same_tensors(tm.read_huggingface(out), model.tensors(), name)
    expected = tm.transformers_logits(model, model.tensors(), tokens)
    torch.testing.assert_close(tm.folder_logits(out, tokens), expected, atol=1e-5, rtol=0)
    assert "not-to-be-copied" not in "".join(path.read_text() for path in out.glob("*.json"))


# --- kinds of source --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama2-gqa", "falcon-40b"])
@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize(
    ("kind", "parts", "index"),
    [
        ("safetensors", 1, False),
        ("safetensors", 1, True),
        ("safetensors", 3, True),
        ("bin", 1, False),
        ("bin", 3, True),
    ],
)
def test_huggingface_sources(name, spelling, kind, parts, index, to_megatron, tmp_path: Path) -> None:
    model = tm.MODELS[name]
    tm.write_huggingface(tmp_path / "hf", model, spelling=spelling, kind=kind, parts=parts, index=index)
    to_megatron(model.family, "--model-path", tmp_path / "hf", "--out", tmp_path / "out").succeeded()
    checkpoint = read_checkpoint(tmp_path / "out")
    assert_same_tensors(checkpoint.single, megatron_ranks(model.config(), model.tensors())[0, 0, 0])
    assert checkpoint.args.rope_theta == model.theta


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_parts_without_an_index(kind: str, to_megatron, tmp_path: Path) -> None:
    """transformers does not read these; they are read whole or refused, never in part."""
    model = tm.MODELS["llama2"]
    tm.write_huggingface(tmp_path / "hf", model, kind=kind, parts=3, index=False)
    result = to_megatron("llama2", "--model-path", tmp_path / "hf", "--out", tmp_path / "out")
    if result.code:
        result.refused("index.json")
        return
    found = read_checkpoint(tmp_path / "out").single
    assert_same_tensors(found, megatron_ranks(model.config(), model.tensors())[0, 0, 0])


@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize("name", ["codellama", "llama2-linear", "mistral-v0.1", "mistral-v0.2"])
def test_args_from_both_spellings(name: str, spelling: int, to_megatron, tmp_path: Path) -> None:
    model = tm.MODELS[name]
    tm.write_huggingface(tmp_path / "hf", model, spelling=spelling)
    to_megatron(model.family, "--model-path", tmp_path / "hf", "--out", tmp_path / "out").succeeded()
    found = vars(read_checkpoint(tmp_path / "out").args)
    ignored = {"position_embedding_type", "model_type", "wandb_api_key", "use_flash_attn", "new_tokens", "vocab_file"}
    for key, value in tm.training_args(model).items():
        if key not in ignored and key in found:
            assert found[key] == value, key
    assert found["position_embedding_type"] in ("rotary", "PositionEmbeddingType.rotary")
    assert (found["padded_vocab_size"], found["iteration"]) == (model.vocab, "release")


@pytest.mark.parametrize(
    ("family", "parts", "groups"),
    [("llama", 1, 8), ("llama", 2, 8), ("llama", 4, 8), ("llama2", 8, 8), ("llama2", 4, 4)],
)
def test_meta_sources(family, parts, groups, to_megatron, to_hf, tmp_path: Path, tokens: torch.Tensor) -> None:
    eps, positions = (1e-6, 2048) if family == "llama" else (1e-5, 4096)
    model = tm.Tiny("meta", family, heads=8, groups=groups, head_dim=8, ffn=96, eps=eps, max_positions=positions)
    contents = tm.write_meta(tmp_path / "meta", model, parts)
    to_megatron(family, "--cache-dir", tmp_path / "meta", "--out", tmp_path / "out").succeeded()
    checkpoint = read_checkpoint(tmp_path / "out")
    huggingface = meta_to_huggingface(contents, model.heads, model.groups)
    assert_same_tensors(checkpoint.single, megatron_ranks(model.config(), huggingface)[0, 0, 0])
    args = checkpoint.args
    assert (args.layernorm_epsilon, args.max_position_embeddings, args.ffn_hidden_size) == (eps, positions, model.ffn)
    assert (args.num_attention_heads_kv, args.kv_channels, args.rope_theta) == (groups, 8, 10000.0)
    found = reference_forward.logits(checkpoint.single, args, tokens)
    expected = tm.transformers_logits(model, huggingface, tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    out = exported(to_hf, tmp_path / "out", tmp_path / "hf", family)
    assert_same_tensors(tm.read_huggingface(out), huggingface)
    torch.testing.assert_close(tm.folder_logits(out, tokens), expected, atol=1e-5, rtol=0)
    assert (out / "tokenizer.model").read_bytes() == (tmp_path / "meta" / "tokenizer.model").read_bytes()


@pytest.mark.parametrize(("family", "folder"), [("llama", "7B"), ("llama2", "llama-2-7b")])
def test_meta_parent_folder(family: str, folder: str, to_megatron, tmp_path: Path) -> None:
    """`--cache-dir` may be the folder above; Meta keeps the tokenizer there."""
    model = tm.Tiny("meta", family, heads=8, groups=8, head_dim=8, eps=1e-6)
    contents = tm.write_meta(tmp_path / "meta" / folder, model, 2)
    (tmp_path / "meta" / folder / "tokenizer.model").rename(tmp_path / "meta" / "tokenizer.model")
    to_megatron(family, "--cache-dir", tmp_path / "meta", "--out", tmp_path / "out").succeeded()
    expected = megatron_ranks(model.config(), meta_to_huggingface(contents, 8, 8))[0, 0, 0]
    assert_same_tensors(read_checkpoint(tmp_path / "out").single, expected)
    assert list((tmp_path / "out").rglob("tokenizer.model"))


def test_meta_layouts(to_megatron, tmp_path: Path) -> None:
    """Straight from Meta's parts to a cut checkpoint."""
    model = tm.Tiny("meta", "llama2", layers=4, heads=8, groups=4, head_dim=8)
    contents = tm.write_meta(tmp_path / "meta", model, 4)
    cut = ["--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2]
    to_megatron("llama2", "--cache-dir", tmp_path / "meta", "--out", tmp_path / "out", *cut).succeeded()
    expected = megatron_ranks(model.config(), meta_to_huggingface(contents, 8, 4), 2, 2, rows=512)
    found = read_checkpoint(tmp_path / "out")
    for key, tensors in expected.items():
        assert_same_tensors(found.tensors[key], tensors, str(key))


def test_tied_head_written_out(to_megatron, tmp_path: Path) -> None:
    """Some falcon folders repeat the embedding as lm_head; that is one tensor."""
    model = tm.MODELS["falcon-7b"]
    tensors = model.tensors()
    both = {**tensors, "lm_head.weight": tensors["transformer.word_embeddings.weight"].clone()}
    tm.write_huggingface(tmp_path / "hf", model, tensors=both)
    to_megatron("falcon", "--model-path", tmp_path / "hf", "--out", tmp_path / "out").succeeded()
    expected = megatron_ranks(model.config(), tensors)[0, 0, 0]
    assert_same_tensors(read_checkpoint(tmp_path / "out").single, expected)


def test_tied_head_in_one_storage(to_megatron, tmp_path: Path) -> None:
    """The same in a .bin file, where both names share their storage."""
    model = tm.MODELS["falcon-7b"]
    tensors = dict(model.tensors())
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"]
    tm.write_huggingface(tmp_path / "hf", model, tensors=tensors, kind="bin")
    to_megatron("falcon", "--model-path", tmp_path / "hf", "--out", tmp_path / "out").succeeded()
    expected = megatron_ranks(model.config(), model.tensors())[0, 0, 0]
    assert_same_tensors(read_checkpoint(tmp_path / "out").single, expected)


def test_bin_tensors_that_are_slices(to_megatron, tmp_path: Path) -> None:
    """A .bin may hold tensors that start within a larger storage."""
    model = tm.MODELS["llama2"]
    tensors = dict(model.tensors())
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        rows = tensors[name].shape[0]
        tensors[name] = torch.cat([tensors[name] * 2, tensors[name], tensors[name] * 3])[rows : 2 * rows]
    folder = tm.write_huggingface(tmp_path / "hf", model)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    to_megatron("llama2", "--model-path", folder, "--out", tmp_path / "out").succeeded()
    expected = megatron_ranks(model.config(), model.tensors())[0, 0, 0]
    assert_same_tensors(read_checkpoint(tmp_path / "out").single, expected)


def test_bin_tensors_that_are_transposed(to_megatron, tmp_path: Path) -> None:
    """Columns before rows in the file: refused by name or turned, never read as rows."""
    model = tm.MODELS["llama2"]
    tensors = dict(model.tensors())
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = tensors[name].t().contiguous().t()
    folder = tm.write_huggingface(tmp_path / "hf", model)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    result = to_megatron("llama2", "--model-path", folder, "--out", tmp_path / "out")
    if result.code:
        result.refused(name)
        return
    expected = megatron_ranks(model.config(), model.tensors())[0, 0, 0]
    assert_same_tensors(read_checkpoint(tmp_path / "out").single, expected)


def test_legacy_torch_file(to_megatron, tmp_path: Path) -> None:
    """Files from before torch 1.6 are no zip archives: read right, or refused by name."""
    model = tm.MODELS["llama2"]
    folder = tm.write_huggingface(tmp_path / "hf", model)
    (folder / "model.safetensors").unlink()
    torch.save(model.tensors(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    result = to_megatron("llama2", "--model-path", folder, "--out", tmp_path / "out")
    if result.code:
        result.refused("pytorch_model.bin")
        return
    expected = megatron_ranks(model.config(), model.tensors())[0, 0, 0]
    assert_same_tensors(read_checkpoint(tmp_path / "out").single, expected)


def test_hub_snapshot_of_links(sources, to_megatron, tmp_path: Path) -> None:
    """A hub cache's snapshot holds links to blobs."""
    model = tm.MODELS["llama2"]
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(sources("llama2").iterdir())):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    to_megatron("llama2", "--model-path", snapshot, "--out", tmp_path / "new" / "place" / "out").succeeded()
    expected = megatron_ranks(model.config(), model.tensors())[0, 0, 0]
    assert_same_tensors(read_checkpoint(tmp_path / "new" / "place" / "out").single, expected)
    kept = next((tmp_path / "new" / "place" / "out").rglob("tokenizer.model"))
    assert not kept.is_symlink()


OLD_LLAMA = ["num_key_value_heads", "rope_theta", "rope_scaling", "attention_bias", "mlp_bias", "tie_word_embeddings"]
OLD_FALCON = [
    "ffn_hidden_size",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
    "activation",
]


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("llama", [*OLD_LLAMA, "torch_dtype"]),
        ("falcon-7b", [*OLD_FALCON, "num_kv_heads", "torch_dtype"]),
        ("falcon-40b", OLD_FALCON),
    ],
)
def test_configs_of_old_repositories(name, absent, to_megatron, to_hf, tmp_path: Path, tokens: torch.Tensor) -> None:
    """The first releases' config.json has few keys; the defaults are transformers' own."""
    model = tm.MODELS[name]
    changes = dict.fromkeys(absent, ...) | {"auto_map": {"AutoConfig": "configuration_x.XConfig"}}
    tm.write_huggingface(tmp_path / "hf", model, spelling=4, changes=changes)
    to_megatron(model.family, "--model-path", tmp_path / "hf", "--out", tmp_path / "mt").succeeded()
    checkpoint = read_checkpoint(tmp_path / "mt")
    assert_same_tensors(checkpoint.single, megatron_ranks(model.config(), model.tensors())[0, 0, 0])
    expected = tm.transformers_logits(model, model.tensors(), tokens)
    found = reference_forward.logits(checkpoint.single, checkpoint.args, tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    out = exported(to_hf, tmp_path / "mt", tmp_path / "back", model.family)
    torch.testing.assert_close(tm.folder_logits(out, tokens), expected, atol=1e-5, rtol=0)
    assert_same_tensors(tm.read_huggingface(out), model.tensors())


@pytest.mark.parametrize(("name", "kind"), [("falcon-7b", "RefinedWebModel"), ("falcon-40b", "RefinedWeb")])
def test_first_falcon_config(name, kind, to_megatron, to_hf, tmp_path: Path, tokens: torch.Tensor) -> None:
    """As falcon was called before transformers knew it: converted into what transformers loads, or refused by name."""
    model = tm.MODELS[name]
    changes = {
        "model_type": kind,
        "architectures": ["RWForCausalLM"],
        "n_layer": model.layers,
        "n_head": model.heads,
        **dict.fromkeys([*OLD_FALCON, "num_hidden_layers", "num_attention_heads", "num_kv_heads"], ...),
        **dict.fromkeys(["new_decoder_architecture"], ...),
    }
    changes |= {"n_head_kv": model.groups, "multi_query": ...} if name == "falcon-40b" else {}
    tm.write_huggingface(tmp_path / "hf", model, spelling=4, changes=changes)
    result = to_megatron("falcon", "--model-path", tmp_path / "hf", "--out", tmp_path / "mt")
    if result.code:
        result.refused(kind)
        return
    checkpoint = read_checkpoint(tmp_path / "mt")
    assert_same_tensors(checkpoint.single, megatron_ranks(model.config(), model.tensors())[0, 0, 0])
    out = exported(to_hf, tmp_path / "mt", tmp_path / "back", "falcon")
    expected = tm.transformers_logits(model, model.tensors(), tokens)
    torch.testing.assert_close(tm.folder_logits(out, tokens), expected, atol=1e-5, rtol=0)


TABLES = {
    "model.layers.{}.self_attn.rotary_emb.inv_freq": (8,),
    "model.layers.{}.self_attn.rotary_emb.cos_cached": (1, 1, 32, 16),
    "model.layers.{}.self_attn.rotary_emb.sin_cached": (1, 1, 32, 16),
    "model.layers.{}.self_attn.rotary_emb._cos_cached": (32, 16),  # transformers 4.38
    "model.layers.{}.self_attn.masked_bias": (),
    "model.layers.{}.self_attn.bias": (1, 1, 32, 32),
    "model.rotary_emb.original_inv_freq": (8,),
}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("family", ["llama2", "falcon-7b"])
def test_computed_buffers_are_ignored(family: str, kind: str, to_megatron, to_hf, tmp_path: Path) -> None:
    """Rotary tables and causal masks, of whatever rank; the proof reads the source without them as well."""
    model = tm.MODELS[family]
    extra = {name.format(0): torch.ones(shape) for name, shape in TABLES.items()}
    if model.falcon:
        extra = {name.replace("model.layers", "transformer.h"): table for name, table in extra.items()}
    tm.write_huggingface(tmp_path / "hf", model, tensors={**model.tensors(), **extra}, kind=kind)
    result = to_megatron(model.family, "--model-path", tmp_path / "hf", "--out", tmp_path / "out", "--verify")
    assert f"and {len(TABLES) - 1} more tensors, which hold no parameters" in result.succeeded().text
    expected = megatron_ranks(model.config(), model.tensors())[0, 0, 0]
    assert_same_tensors(read_checkpoint(tmp_path / "out").single, expected)


def test_other_tensors_of_four_dimensions_are_refused(to_megatron, tmp_path: Path) -> None:
    model = tm.MODELS["llama2"]
    extra = {"model.layers.0.self_attn.conv.weight": torch.ones(1, 1, 2, 2)}
    tm.write_huggingface(tmp_path / "hf", model, tensors={**model.tensors(), **extra})
    result = to_megatron("llama2", "--model-path", tmp_path / "hf", "--out", tmp_path / "out")
    result.refused("model.layers.0.self_attn.conv.weight", "a llama2 model does not have")


def test_adapter_beside_the_weights_is_refused(to_megatron, tmp_path: Path) -> None:
    """transformers with peft would load base plus adapter."""
    tm.write_huggingface(tmp_path / "hf", tm.MODELS["llama2"])
    tm.write_json(tmp_path / "hf" / "adapter_config.json", {"peft_type": "LORA"})
    result = to_megatron("llama2", "--model-path", tmp_path / "hf", "--out", tmp_path / "out")
    result.refused("adapter_config.json", "merge_and_unload")


@pytest.mark.parametrize("name", ["llama2", "falcon-7b"])
def test_names_that_the_export_does_not_hold(name: str, to_megatron, to_hf, tmp_path: Path, tokens) -> None:
    """Code of the source's own is neither copied nor named: the export loads with trust_remote_code and without."""
    import transformers

    model = tm.MODELS[name]
    changes = {
        "auto_map": {"AutoConfig": "configuration_own.C", "AutoModelForCausalLM": "modeling_own.M"},
        "architectures": ["RWForCausalLM"],
        "custom_pipelines": {"text-generation": {"impl": "own.Pipeline"}},
        "tokenizer_class": "OwnTokenizer",
    }
    source = tm.write_huggingface(tmp_path / "hf", model, changes=changes)
    settings = tm.read_json(source / "tokenizer_config.json")
    own = {"tokenizer_class": "LLaMATokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.T", None]}}
    own |= {"vocab_file": "/elsewhere/tokenizer.model", "special_tokens_map_file": "/elsewhere/map.json"}
    tm.write_json(source / "tokenizer_config.json", settings | own)
    for file in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
        (source / file).write_text("raise SystemExit('run')\n")
    to_megatron(model.family, "--model-path", source, "--out", tmp_path / "mt").succeeded()
    assert "auto_map" not in tm.read_json(tmp_path / "mt" / "tokenizer_config.json")
    result = to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "out", "--model", model.family)
    assert "auto_map is left out" in result.succeeded().text
    assert not list((tmp_path / "out").glob("*.py"))
    config = tm.read_json(tmp_path / "out" / "config.json")
    assert not {"auto_map", "custom_pipelines", "tokenizer_class"} & set(config)
    assert config["architectures"] == ["FalconForCausalLM" if model.falcon else "LlamaForCausalLM"]
    settings = tm.read_json(tmp_path / "out" / "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"auto_map", "vocab_file", "special_tokens_map_file"} & set(settings)
    for trust in (True, False):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=trust)
        assert tokenizer.decode(tokenizer("the model")["input_ids"], skip_special_tokens=True) == "the model"
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=trust)
        assert type(loaded).__module__.startswith("transformers.models.")


# --- dtype ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype(source: torch.dtype, dtype: torch.dtype, to_megatron, to_hf, tmp_path: Path) -> None:
    """Kept by default (bit for bit, shown above for each); `--dtype` rounds as torch does, and the records say so."""
    model = tm.with_dtype(tm.MODELS["llama2-gqa"], source)
    word = str(dtype).removeprefix("torch.")
    tm.write_huggingface(tmp_path / "hf", model)
    to_megatron("llama2", "--model-path", tmp_path / "hf", "--out", tmp_path / "mt", "--dtype", word).succeeded()
    checkpoint = read_checkpoint(tmp_path / "mt")
    cast = {name: tensor.to(dtype) for name, tensor in model.tensors().items()}
    assert_same_tensors(checkpoint.single, megatron_ranks(model.config(), cast)[0, 0, 0])
    assert checkpoint.args.params_dtype in (dtype, str(dtype), word)

    to_megatron("llama2", "--model-path", tmp_path / "hf", "--out", tmp_path / "kept").succeeded()
    out = exported(to_hf, tmp_path / "kept", tmp_path / "back", "llama2", "--dtype", word)
    assert_same_tensors(tm.read_huggingface(out), cast)
    config = tm.read_json(out / "config.json")
    assert (config.get("dtype") or config["torch_dtype"]) == word
    assert config.get("torch_dtype", word) == word

    out = exported(to_hf, tmp_path / "kept", tmp_path / "same", "llama2")
    assert_same_tensors(tm.read_huggingface(out), model.tensors())
    config = tm.read_json(out / "config.json")
    assert (config.get("dtype") or config["torch_dtype"]) == str(source).removeprefix("torch.")


# --- files ------------------------------------------------------------------------------------------------------------


def test_rank_file_is_sound(imported) -> None:
    root = imported("llama2-gqa")
    path = root / MODEL_FILE
    done = subprocess.run([sys.executable, "-m", "zipfile", "-t", path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Done testing"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    with torch.serialization.safe_globals([argparse.Namespace]):
        narrow = torch.load(path, weights_only=True)
        mapped = torch.load(path, weights_only=True, mmap=True)
    plain = torch.load(path, weights_only=False)
    assert "megatron" not in sys.modules
    for content in (narrow, mapped, plain):
        assert content["checkpoint_version"] == 3.0
        assert content["iteration"] == "release"
        language_model = content["model"]["language_model"]
        assert set(language_model) == {"embedding", "encoder", "lm_head"}, "the training spelling"
        assert set(language_model["embedding"]["word_embeddings"]) == {"weight"}
        assert all(".attention." not in name for name in language_model["encoder"])
        assert isinstance(language_model["lm_head"], torch.Tensor)
        for name, tensor in language_model["encoder"].items():
            assert torch.equal(tensor, plain["model"]["language_model"]["encoder"][name]), name
            assert tensor.is_contiguous()
            assert not tensor.requires_grad
    assert (root / "latest_checkpointed_iteration.txt").read_text().strip() == "release"
    assert not root.with_name(root.name + ".partial").exists()


def test_tokenizer_files_travel(imported, sources, to_hf, tmp_path: Path) -> None:
    for name, file in (("llama2", "tokenizer.model"), ("falcon-7b", "tokenizer.json")):
        kept = list(imported(name).rglob(file))
        assert kept
        assert kept[0].read_bytes() == (sources(name) / file).read_bytes()
    out = exported(to_hf, imported("llama2"), tmp_path / "out", "llama2")
    assert (out / "tokenizer.model").read_bytes() == (sources("llama2") / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("shards", [1, 2, 5, 21])
def test_output_shards(shards: int, imported, to_hf, tmp_path: Path) -> None:
    model = tm.MODELS["llama2"]  # 2 layers of 9 tensors, and 3 more
    out = exported(to_hf, imported("llama2"), tmp_path / "out", "llama2", "--num_output_shards", shards)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    if shards == 1:
        assert files == ["model.safetensors"]
        assert_same_tensors(tm.read_huggingface(out), model.tensors())
        return
    assert files == [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    assert_same_tensors(tm.read_huggingface(out), model.tensors())
    index = tm.read_json(out / "model.safetensors.index.json")
    total = sum(tensor.nbytes for tensor in model.tensors().values())
    assert index["metadata"]["total_size"] == total
    sizes = []
    for file in files:
        with safe_open(out / file, "pt") as content:
            names = list(content.keys())
            assert content.metadata() == {"format": "pt"}
        assert names
        assert all(index["weight_map"][name] == file for name in names)
        sizes.append(sum(model.tensors()[name].nbytes for name in names))
    assert sorted(index["weight_map"]) == sorted(model.tensors())
    largest = max(tensor.nbytes for tensor in model.tensors().values())
    assert max(sizes) <= total / shards + largest, "balanced by bytes"


def test_huggingface_files(imported, to_hf, tmp_path: Path) -> None:
    import transformers

    out = exported(to_hf, imported("codellama"), tmp_path / "out", "codellama")
    config = transformers.AutoConfig.from_pretrained(out)
    theta = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
    assert (config.architectures, theta, config.max_position_embeddings) == (["LlamaForCausalLM"], 1e6, 16384)
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("The quick fox")["input_ids"][0] == 1


# --- command line -----------------------------------------------------------------------------------------------------


def test_dashes_and_underscores(to_megatron, to_hf, sources, tmp_path: Path) -> None:
    source = sources("llama2-gqa")
    to_megatron(
        "llama2", "--model_path", source, "--out", tmp_path / "a", "--tensor_model_parallel_size", 2
    ).succeeded()
    assert sorted(read_checkpoint(tmp_path / "a").tensors) == [(0, 0, 0), (1, 0, 0)]
    to_hf("--input-dir", tmp_path / "a", "--output-dir", tmp_path / "b", "--num-output-shards", 2, "--no-tokenizer")
    assert_same_tensors(tm.read_huggingface(tmp_path / "b"), tm.MODELS["llama2-gqa"].tensors())


@pytest.mark.parametrize("script", ["hf_to_megatron", "megatron_to_hf"])
def test_help_without_torch(script: str) -> None:
    code = f"""
import sys
import {script}
try:
    {script}.main(["--help"])
except SystemExit as stop:
    assert not stop.code
heavy = {{"torch", "transformers", "safetensors", "numpy"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("hf_to_megatron", []),
        ("hf_to_megatron", ["gpt2"]),
        ("hf_to_megatron", ["llama2", "--size", "8"]),
        ("hf_to_megatron", ["llama2", "--dtype", "int8"]),
        ("hf_to_megatron", ["llama2", "--tensor-model-parallel-size", "two"]),
        ("hf_to_megatron", ["llama2", "--nonsense"]),
        ("megatron_to_hf", []),
        ("megatron_to_hf", ["--input_dir", "x"]),
        ("megatron_to_hf", ["--input_dir", "x", "--output_dir", "y", "--model", "gpt2"]),
        ("megatron_to_hf", ["--input_dir", "x", "--output_dir", "y", "--num_output_shards", "many"]),
    ],
)
def test_wrong_arguments(script: str, arguments: list[str], to_megatron, to_hf) -> None:
    result = (to_megatron if script == "hf_to_megatron" else to_hf)(*arguments)
    assert result.code == 2, result.text
    assert "Traceback" not in result.text
    assert result.err


def test_dry_run_writes_nothing(to_megatron, to_hf, sources, imported, tmp_path: Path) -> None:
    plan = to_megatron("llama2", "--model-path", sources("llama2"), "--out", tmp_path / "a", "--dry-run").succeeded()
    assert "model_optim_rng.pt" in plan.text or "mp_rank_00" in plan.text
    plan = to_hf("--input_dir", imported("llama2"), "--output_dir", tmp_path / "b", "--dry_run").succeeded()
    assert "model.safetensors" in plan.text
    assert not list(tmp_path.iterdir())


def test_overwrite(to_megatron, to_hf, sources, tmp_path: Path) -> None:
    first = ["llama2", "--model-path", sources("llama2"), "--out", tmp_path / "out"]
    to_megatron(*first).succeeded()
    second = ["llama2", "--model-path", sources("llama2-gqa"), "--out", tmp_path / "out"]
    to_megatron(*second).refused("out", "--overwrite")
    to_megatron(*second, "--overwrite").succeeded()
    model = tm.MODELS["llama2-gqa"]
    found = read_checkpoint(tmp_path / "out").single
    assert_same_tensors(found, megatron_ranks(model.config(), model.tensors())[0, 0, 0])
    exported(to_hf, tmp_path / "out", tmp_path / "hf", "llama2", "--num_output_shards", 3)
    back = ["--input_dir", tmp_path / "out", "--output_dir", tmp_path / "hf"]
    to_hf(*back).refused("hf", "--overwrite")
    to_hf(*back, "--overwrite").succeeded()
    assert [path.name for path in (tmp_path / "hf").glob("model*")] == ["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_files(workers: int, to_megatron, sources, imported, tmp_path: Path) -> None:
    options = ["--out", tmp_path / "out", "--workers", workers]
    to_megatron("llama2", "--model-path", sources("llama2-gqa"), *options).succeeded()
    here, there = tmp_path / "out" / MODEL_FILE, imported("llama2-gqa") / MODEL_FILE
    assert here.read_bytes() == there.read_bytes()


def test_scripts_as_processes(sources, tmp_path: Path) -> None:
    """As users run them, from another directory."""
    python = [sys.executable]
    there = [*python, REPOSITORY / "hf_to_megatron.py", "llama2", "--model-path", sources("llama2"), "--out", "mt"]
    back = [*python, REPOSITORY / "megatron_to_hf.py", "--input_dir", "mt", "--output_dir", "hf"]
    for command in (there, back):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert_same_tensors(tm.read_huggingface(tmp_path / "hf"), tm.MODELS["llama2"].tensors())
