"""Args of Megatron-Core that change the forward pass and add no tensor: the table, and what is refused by it."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
from conftest import REPOSITORY, Script, run
from make_core_args import CONFIGS, MODEL, fields, parameters

from weights_conversion.configs import core_kinds, core_table
from weights_conversion.formats import dist_index, torch_dist
from weights_conversion.formats.stored_args import plain_args

GOLDEN = REPOSITORY.parent / "shared" / "golden"
LLAMA = tm.Tiny("args", "llama2", layers=2, heads=4, groups=2)
LINEAR = tm.Tiny("args-linear", "llama2", layers=2, heads=4, groups=2, linear_factor=2.0)


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_field_of_the_installed_release_is_in_the_table() -> None:
    """Another release has other fields: run make_core_args.py on its wheel and say in core_kinds.py what each is."""
    found = importlib.util.find_spec("megatron")
    if found is None or not found.submodule_search_locations:
        pytest.skip("megatron-core is not installed")
    (root,) = {Path(place).parent for place in found.submodule_search_locations}
    names: set[str] = set()
    for file, classes in CONFIGS.items():
        if (root / file).is_file():
            names |= {name for name, _ in fields(ast.parse((root / file).read_text()), classes)}
    names |= {name for name, _ in parameters(ast.parse((root / MODEL[0]).read_text()), MODEL[1])}
    assert len(names) > 250
    assert names - set(core_table.fields()["model"]) == set()


def test_no_kind_is_stale() -> None:
    """What is said to be read, idle or gated is there in some release."""
    there = set(core_table.fields()["model"])
    assert (core_kinds.READ | core_kinds.IDLE) - there == set()
    assert set() == core_kinds.READ & core_kinds.IDLE


def stored_args() -> list[tuple[str, dict[str, Any]]]:
    """The args that real Megatron-LM has left in the golden files of the dense families."""
    found = []
    for path in sorted(GOLDEN.glob("core-*/**/.metadata")):
        _, others, _ = dist_index.read_metadata(path)
        if others or (path.parent / "common.pt").is_file():
            args = torch_dist._common(path.parent, others).get("args")
            if args is not None:
                found.append((str(path.parent.relative_to(GOLDEN)), plain_args(args, path)))
    return [(name, args) for name, args in found if name.split("/")[0] in DENSE]


DENSE = {
    "core-llama3": set(),
    "core-llama3-lora": set(),
    "core-llama3-masters": set(),
    "core-qwen2": {"add_qkv_bias"},
    "core-qwen3": {"qk_layernorm"},
    "core-qwen3-swift": {"qk_layernorm"},
    "core-qwen3-yarn": {"qk_layernorm"},
}


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden files are not here")
def test_args_of_real_training() -> None:
    """Nothing but what the family has is foreign, and Megatron-LM's own args are all known."""
    found = stored_args()
    assert {name.split("/")[0] for name, _ in found} == set(DENSE)
    for name, args in found:
        assert set(core_table.foreign(args)) == DENSE[name.split("/")[0]], name
        assert core_table.foreign(args, DENSE[name.split("/")[0]]) == {}
        assert len(args) < 100 or core_table.unknown(args) == {}, name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("no_rope_freq", [0, 0]),
        ("no_rope_freq", 0),
        ("glu_linear_offset", 0),
        ("num_experts", 0),
        ("rotary_percent", 1),
        ("moe_router_topk", 8),
        ("kv_lora_rank", 512),
        ("mup_embedding_mult", 12.0),
        ("spec", ["megatron.core.models.gpt.gpt_layer_specs", "get_gpt_layer_local_spec"]),
        ("recompute_granularity", "full"),
        ("cuda_graph_impl", "local"),
        ("window_attn_skip_freq", 2),
        ("xielu", False),
        ("attn_layernorm", True),
        ("layer_scale", None),
        ("input_embeddings_multiplier", 1.0),
        ("rope_scaling_type", None),
    ],
)
def test_values_of_the_plain_model(name: str, value: Any) -> None:
    assert core_table.foreign({name: value}) == {}


def test_what_stands_behind_a_gate() -> None:
    """It counts where the gate is open and the family's own; behind a gate that is refused it is not named too."""
    args = {"num_experts": 8, "moe_router_topk": 8, "moe_aux_loss_coeff": 0.01}
    assert set(core_table.foreign(args)) == {"num_experts"}
    assert set(core_table.foreign(args, {"num_experts"})) == {"moe_router_topk"}
    assert core_table.foreign(args, {"num_experts", "moe_router_topk"}) == {}
    assert set(core_table.foreign({"window_size": [4, 0], "window_attn_skip_freq": 2})) == {"window_attn_skip_freq"}


# --- checkpoints ------------------------------------------------------------------------------------------------------

Edited = Callable[..., Path]


@pytest.fixture(scope="module")
def imports(tmp_path_factory, to_megatron: Script) -> dict[str, Path]:
    made, root = {}, tmp_path_factory.mktemp("args")
    for model in (LLAMA, LINEAR):
        source = tm.write_huggingface(root / f"{model.name}-hf", model, tokenizer=False, spelling=4)
        for form in ("torch", "torch_dist"):
            made[f"{model.name}/{form}"] = out = root / f"{model.name}-{form}"
            options = ("--target", "megatron-core", "--ckpt-format", form)
            to_megatron("llama2", "--model-path", source, "--out", out, *options).succeeded()
    return made


@pytest.fixture
def edited(imports, tmp_path: Path) -> Edited:
    """An import as training leaves it, with other args."""

    def make(form: str = "torch_dist", model: tm.Tiny = LLAMA, **changes: Any) -> Path:
        root = Path(shutil.copytree(imports[f"{model.name}/{form}"], tmp_path / "mt"))
        (root / "conversion_manifest.json").unlink()
        (root / "release").rename(root / "iter_0000050")
        (root / "latest_checkpointed_iteration.txt").write_text("50")
        (path,) = [*root.glob("*/common.pt"), *root.glob("*/mp_rank_00/model_optim_rng.pt")]
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, weights_only=True)
        vars(content["args"]).update(changes)
        torch.save(content | {"iteration": 50}, path)
        return root

    return make


def arguments(root: Path, out: Path, *options: Any) -> tuple[Any, ...]:
    return "--input_dir", root, "--output_dir", out, "--model", "llama2", "--no_tokenizer", *options


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_mup", True),
        ("qk_l2_norm", True),
        ("no_rope_freq", 1),
        ("no_rope_freq", [0, 1]),
        ("glu_linear_offset", 1.0),
        ("activation_func_clamp_value", 7.0),
        ("softmax_scale", 0.5),
        ("softmax_type", "learnable"),
        ("spec", ["my.layers", "spec"]),
        ("xielu", True),
        ("post_layer_norm", True),
        ("input_embeddings_multiplier", 125.0),
        ("attention_output_gate", True),
        ("rotary_interleaved", True),
        ("heterogeneous_layers_config_path", "layers.json"),
        ("quick_geglu", True),
    ],
)
def test_refused_by_name(form: str, name: str, value: Any, edited, to_hf, to_megatron, tmp_path: Path) -> None:
    """In an export, and from layout to layout, since the copy would lose the only evidence; verify sees it too."""
    root = edited(form, **{name: value})
    to_hf(*arguments(root, tmp_path / "hf")).refused(name)
    to_megatron("llama2", "--model-path", root, "--out", tmp_path / "to").refused(name)
    source = tm.write_huggingface(tmp_path / "src", LLAMA, tokenizer=False)
    assert run("weights_conversion.verify", source, root, "--model", "llama2").code == 2  # not to be compared
    assert not (tmp_path / "hf").exists()
    assert not (tmp_path / "to").exists()


def test_unknown_args_are_named(edited, to_hf, tmp_path: Path) -> None:
    root = edited(my_fork_option="something", my_fork_switch=False, my_fork_list=[], adam_beta1=0.9)
    said = to_hf(*arguments(root, tmp_path / "hf")).succeeded().text
    assert "my_fork_option 'something'" in said
    assert "my_fork_switch" not in said
    assert "my_fork_list" not in said
    assert "adam_beta1" not in said


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("softmax_scale: 0.5", "softmax_scale"),
        ("use_mup: true", "use_mup"),
        ("no_rope_freq: 4", "no_rope_freq"),
        ("glu_linear_offset: 1.0", "glu_linear_offset"),
        ("transformer_layer_spec: {_target_: my.layers.spec, _call_: false}", "transformer_layer_spec"),
        ("softmax_type: {_target_: my.softmax, _args_: [1], _call_: true}", "softmax_type"),
    ],
)
def test_run_config_goes_through_the_table(line: str, word: str, edited, to_hf, tmp_path: Path) -> None:
    root = edited()
    (folder,) = root.glob("iter_*")
    torch.save({"checkpoint_version": 3.0, "iteration": 50}, folder / "common.pt")
    plain = [
        *(f"num_layers: {LLAMA.layers}", f"hidden_size: {LLAMA.hidden}", f"ffn_hidden_size: {LLAMA.ffn}"),
        *(f"num_attention_heads: {LLAMA.heads}", f"num_query_groups: {LLAMA.groups}", "rotary_base: 10000.0"),
        *("layernorm_epsilon: 1.0e-05", "seq_length: 4096", "share_embeddings_and_output_weights: false"),
        *("add_bias_linear: false", "gated_linear_unit: true", "normalization: RMSNorm", "softmax_scale: null"),
        "activation_func: {_target_: torch.nn.functional.silu, _call_: false}",
        "init_method: {_target_: torch.nn.init.normal_, _partial_: true, std: 0.02}",
        "transformer_layer_spec: {_target_: megatron.bridge.models.gpt_provider.default_layer_spec, _call_: false}",
        f"kv_channels: {LLAMA.head_dim}",
    ]

    def write(lines: list[str]) -> None:
        (folder / "run_config.yaml").write_text("model:\n" + "".join(f"  {one}\n" for one in lines))

    write(plain)
    to_hf(*arguments(root, tmp_path / "plain")).succeeded()
    write([one.replace("1.0e-05", "1e-05") for one in plain])  # which OmegaConf takes for a number
    to_hf(*arguments(root, tmp_path / "by hand")).succeeded()
    write([one for one in plain if one.split(":")[0] != line.split(":")[0]] + [line])
    to_hf(*arguments(root, tmp_path / "hf")).refused(word)


# --- linear scaling, which releases before 0.19 never used ------------------------------------------------------------


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_a_factor_that_was_never_used(form: str, edited, to_hf, to_megatron, tmp_path: Path) -> None:
    root = edited(form, rotary_seq_len_interpolation_factor=2)
    words = ("rotary_seq_len_interpolation_factor 2", "0.19", "--rope_scaling_factor")
    to_hf(*arguments(root, tmp_path / "a")).refused(*words)
    to_megatron("llama2", "--model-path", root, "--out", tmp_path / "b").refused(*words)
    to_hf(*arguments(root, tmp_path / "one", "--rope_scaling_factor", 1)).succeeded()
    assert json.loads((tmp_path / "one" / "config.json").read_text())["rope_scaling"] is None
    to_hf(*arguments(root, tmp_path / "two", "--rope_scaling_factor", 2)).succeeded()
    assert json.loads((tmp_path / "two" / "config.json").read_text())["rope_scaling"]["factor"] == 2.0


@pytest.mark.parametrize("factor", [1, 2])
def test_verify_takes_the_exports_factor(factor: int, edited, to_hf, tmp_path: Path) -> None:
    """Nothing but the export says what such a checkpoint was trained with."""
    root = edited(rotary_seq_len_interpolation_factor=2)
    options = ("--rope_scaling_factor", factor, "--verify")
    assert "IDENTICAL" in to_hf(*arguments(root, tmp_path / "hf", *options)).succeeded().text
    assert run("weights_conversion.verify", root, tmp_path / "hf", "--model", "llama2").code == 0


@pytest.mark.parametrize("sign", ["yarn_original_max_position_embeddings", "logits_load_dir"])
def test_a_factor_that_was_used(sign: str, edited, to_hf, tmp_path: Path) -> None:
    """Args that 0.19 was the first to have show its release."""
    root = edited(**{"rotary_seq_len_interpolation_factor": 2, sign: None})
    to_hf(*arguments(root, tmp_path / "a")).succeeded()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["rope_scaling"]["factor"] == 2.0


def test_a_factor_of_a_conversion(imports, to_hf, tmp_path: Path) -> None:
    """Nobody has trained a release: its args say what was imported."""
    root = Path(shutil.copytree(imports[f"{LINEAR.name}/torch_dist"], tmp_path / "mt"))
    (root / "conversion_manifest.json").unlink()
    to_hf(*arguments(root, tmp_path / "a")).succeeded()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["rope_scaling"]["factor"] == 2.0


def test_the_printed_flag_says_since_when_it_works(to_megatron, tmp_path: Path) -> None:
    source = tm.write_huggingface(tmp_path / "hf", LINEAR, tokenizer=False, spelling=4)
    said = to_megatron("llama2", "--model-path", source, "--out", tmp_path / "mt", "--target", "megatron-core")
    assert "--rotary-seq-len-interpolation-factor reaches the model in Megatron-LM 0.19" in said.succeeded().text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logits_soft_cap", 30.0),
        ("residual_multiplier", 0.22),
        ("embedding_multiplier", 12),
        ("my_attention_scale", 0.5),
        ("use_parallel_residual", True),
        ("attn_temperature_tuning", True),
        ("rope_ntk_alpha", 2.0),
        ("use_sandwich_norms", True),
    ],
)
def test_unknown_args_that_name_a_forward_pass_are_refused(name: str, value: object, edited, to_hf, tmp_path) -> None:
    to_hf(*arguments(edited(**{name: value}), tmp_path / "hf")).refused(name, "not known here")


@pytest.mark.parametrize(
    "args",
    [
        {"residual_multiplier": 1.0, "embedding_multiplier": 1, "logits_soft_cap": None, "attn_sinks": False},
        {"use_fused_rotary_pos_emb": True, "attention_mask_type": "causal", "swap_attention": True},
        {"sglang_attention_backend": "fa3", "eps_clip": 0.2, "normalize_advantages": True, "rollout_temperature": 1.0},
        {"mhc_num_residual_streams": 4, "enable_mhc_connections": False, "moe_combine_scale_dtype": "bf16"},
        {"context_parallel_norm": 2, "log_attention_norms": True},
    ],
)
def test_unknown_args_of_no_consequence_pass(args: dict[str, object], edited, to_hf, tmp_path: Path) -> None:
    """Neutral values, other ways to compute the same, serving and reinforcement learning, features that are off."""
    to_hf(*arguments(edited(**args), tmp_path / "hf")).succeeded()


def test_a_factor_that_no_arg_states_is_warned_of(edited, to_hf, tmp_path: Path) -> None:
    """Releases before 0.11 have --use-rope-scaling alone."""
    root = edited(use_rope_scaling=True, rope_scaling_factor=None)
    arguments = ("--input_dir", root, "--output_dir", tmp_path / "hf", "--model", "llama3", "--no_tokenizer")
    assert "nothing says what Llama 3's rope_scaling_factor is: 8 is used" in to_hf(*arguments).succeeded().text


@pytest.mark.parametrize(("function", "word"), [(torch.nn.functional.silu, ""), (torch.nn.functional.gelu, "gelu")])
def test_an_activation_as_the_function_itself(function, word: str, edited, to_hf, tmp_path: Path) -> None:
    result = to_hf(*arguments(edited(activation_func=function), tmp_path / "hf"))
    _ = result.refused("activation_func", word) if word else result.succeeded()
