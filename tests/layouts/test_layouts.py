"""Every layout, out and in: ranks equal the naive rule, literal rows stand where they must, and back is bit-equal."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
from conftest import Script
from megatron_files import Chunks, assert_same_ranks, assert_same_tensors, read_checkpoint, write_checkpoint
from naive_layout import megatron_ranks, padded_rows

CUTS = [("llama2-gqa", 2, 2, 1), ("llama2-gqa", 4, 2, 2), ("falcon-180b", 4, 4, 1), ("falcon-180b", 2, 2, 2)]


@contextlib.contextmanager
def chunks_of(limit: int | None) -> Iterator[None]:
    """Makes the converter work in pieces of `limit` bytes, so that a tiny tensor takes as many steps as a large one."""
    from weights_conversion.engine import copies
    from weights_conversion.layouts import plan

    with pytest.MonkeyPatch.context() as patch:
        if limit is not None:
            patch.setattr(plan.Plan.chunks, "__defaults__", (limit,))
            patch.setattr(plan, "CHUNK_BYTES", limit)
            patch.setattr(copies, "CHUNK_BYTES", limit)
        yield


def layout_options(tp: int, pp: int, vpp: int, layers: int) -> list[Any]:
    options: list[Any] = []
    if tp > 1:
        options += ["--tensor-model-parallel-size", tp]
    if pp > 1:
        options += ["--pipeline-model-parallel-size", pp]
    if vpp > 1:
        options += ["--num-layers-per-virtual-pipeline-stage", layers // (pp * vpp)]
    return options


def default_rows(model: tm.Tiny, tp: int) -> int:
    """A table is padded as soon as a tensor parallel size is given."""
    return padded_rows(model.vocab, tp) if tp > 1 else model.vocab


def there_and_back(
    model: tm.Tiny, tp: int, pp: int, vpp: int, folder: Path, to_megatron: Script, to_hf: Script
) -> None:
    source = tm.write_huggingface(folder / "hf", model, tokenizer=False, parts=1 + model.layers % 2)
    options = layout_options(tp, pp, vpp, model.layers)
    to_megatron(model.family, "--model-path", source, "--out", folder / "mt", *options).succeeded()
    checkpoint = read_checkpoint(folder / "mt")
    expected = megatron_ranks(model.config(), model.tensors(), tp, pp, vpp, default_rows(model, tp))
    assert_same_ranks(checkpoint.tensors, expected)
    for file in checkpoint.files.values():
        args = file["args"]
        assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (tp, pp)
        assert args.transformer_pipeline_model_parallel_size == pp
        assert args.virtual_pipeline_model_parallel_size == (vpp if vpp > 1 else None)
        assert args.padded_vocab_size == default_rows(model, tp)
        assert ("model0" in file) == (vpp > 1)
    back = ["--input_dir", folder / "mt", "--output_dir", folder / "back", "--model", model.family]
    to_hf(*back, "--no_tokenizer").succeeded()
    assert_same_tensors(tm.read_huggingface(folder / "back"), model.tensors())


@pytest.mark.parametrize("limit", [None, 1, 700, 4096])
@pytest.mark.parametrize(("name", "tp", "pp", "vpp"), [*CUTS, ("llama2", 1, 1, 1), ("falcon-7b", 1, 2, 1)])
def test_layouts(name: str, tp: int, pp: int, vpp: int, limit: int | None, to_megatron, to_hf, tmp_path: Path) -> None:
    with chunks_of(limit):
        there_and_back(tm.MODELS[name], tp, pp, vpp, tmp_path, to_megatron, to_hf)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_layouts_in_another_dtype(dtype: str, to_megatron, to_hf, sources, tmp_path: Path) -> None:
    """Cast on the way, in small pieces, on every rank; and cast on the way back."""
    model = tm.MODELS["llama2-gqa"]
    cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in model.tensors().items()}
    with chunks_of(700):
        options = [*layout_options(2, 2, 1, 4), "--dtype", dtype]
        to_megatron("llama2", "--model-path", sources(model.name), "--out", tmp_path / "mt", *options).succeeded()
        found = read_checkpoint(tmp_path / "mt").tensors
        assert_same_ranks(found, megatron_ranks(model.config(), cast, 2, 2, rows=512))
        back = ["--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "hf", "--no_tokenizer"]
        to_hf(*back, "--dtype", "bfloat16", "--num_output_shards", 3).succeeded()
    back_again = {name: tensor.to(torch.bfloat16) for name, tensor in cast.items()}
    assert_same_tensors(tm.read_huggingface(tmp_path / "hf"), back_again)


@pytest.mark.parametrize("name", ["llama2-gqa", "falcon-40b"])
def test_every_bit_pattern_survives(name: str, to_megatron, to_hf, tmp_path: Path) -> None:
    """NaN payloads, infinities, subnormals and minus zero pass as bits, not as numbers."""
    model = tm.MODELS[name]
    generator = torch.Generator().manual_seed(7)
    tensors = {
        name: torch.randint(-(2**15), 2**15, tensor.shape, generator=generator).to(torch.int16).view(torch.bfloat16)
        for name, tensor in model.tensors().items()
    }
    source = tm.write_huggingface(tmp_path / "hf", model, tensors=tensors, tokenizer=False)
    cut = layout_options(2, 2, 1, model.layers)
    to_megatron(model.family, "--model-path", source, "--out", tmp_path / "mt", *cut).succeeded()
    found = read_checkpoint(tmp_path / "mt").tensors
    assert_same_ranks(found, megatron_ranks(model.config(), tensors, 2, 2, rows=512))
    back = ["--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "back", "--model", model.family]
    to_hf(*back, "--no_tokenizer").succeeded()
    assert_same_tensors(tm.read_huggingface(tmp_path / "back"), tensors)


def test_norms_of_another_dtype(to_megatron, to_hf, tmp_path: Path) -> None:
    """Each tensor keeps its own dtype."""
    model = tm.MODELS["llama2-gqa"]
    tensors = {name: tensor.float() if tensor.dim() == 1 else tensor for name, tensor in model.tensors().items()}
    source = tm.write_huggingface(tmp_path / "hf", model, tensors=tensors, tokenizer=False)
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "mt").succeeded()
    assert_same_ranks(read_checkpoint(tmp_path / "mt").tensors, megatron_ranks(model.config(), tensors))
    back = ["--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "back", "--no_tokenizer"]
    to_hf(*back).succeeded()
    assert_same_tensors(tm.read_huggingface(tmp_path / "back"), tensors)


def test_fused_tensors_of_two_dtypes(to_megatron, tmp_path: Path) -> None:
    """q in float32 beside k and v in bfloat16: refused, or widened; never read as if they were of one type."""
    model = tm.MODELS["llama2-gqa"]
    tensors = {name: tensor.float() if "q_proj" in name else tensor for name, tensor in model.tensors().items()}
    source = tm.write_huggingface(tmp_path / "hf", model, tensors=tensors, tokenizer=False)
    result = to_megatron("llama2", "--model-path", source, "--out", tmp_path / "mt")
    if result.code:
        result.refused("q_proj")
        return
    name = "encoder.layers.0.self_attention.query_key_value.weight"
    found = read_checkpoint(tmp_path / "mt").single[name]
    assert torch.equal(found.float(), megatron_ranks(model.config(), tensors)[0, 0, 0][name].float())


# --- properties -------------------------------------------------------------------------------------------------------

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError:  # the suite also runs where only pytest is installed
    HYPOTHESIS = False
else:
    HYPOTHESIS = True

if HYPOTHESIS:
    few = settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )

    @st.composite
    def models(draw: st.DrawFn) -> tuple[tm.Tiny, int, int, int]:
        """A model and a layout that it can have."""
        tp, pp, vpp = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.integers(1, 4)), draw(st.integers(1, 3))
        vpp = vpp if pp > 1 else 1
        style = draw(st.sampled_from(["mha", "gqa", "mqa", "falcon-7b", "falcon-40b", "falcon-11b"]))
        if style in ("mqa", "falcon-7b"):
            tp = 1
        groups = 1 if style in ("mqa", "falcon-7b") else tp * draw(st.integers(1, 2))
        heads = groups * (1 if style == "mha" else draw(st.integers(1, 3)))
        falcon = style.removeprefix("falcon-") if style.startswith("falcon") else None
        head_dim = 2 * draw(st.integers(1, 4))
        wide = not falcon and draw(st.booleans())
        model = tm.Tiny(
            name=f"random-{style}-{heads}-{head_dim}",
            family="falcon" if falcon else draw(st.sampled_from(["llama", "llama2", "codellama", "mistral"])),
            falcon=falcon,
            layers=pp * vpp * draw(st.integers(1, 2)),
            hidden=2 * draw(st.integers(5, 12)) * heads if wide else heads * head_dim,
            ffn=4 * heads * head_dim if falcon else tp * draw(st.integers(1, 9)),
            heads=heads,
            groups=groups,
            head_dim=head_dim,
            vocab=draw(st.integers(3, 400)),
            dtype=draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
        )
        return model, tp, pp, vpp

    LIMITS = st.sampled_from([None, 1, 200, 3000])

    @few
    @given(models(), LIMITS)
    def test_any_model_in_any_layout(to_megatron, to_hf, case: tuple[tm.Tiny, int, int, int], limit) -> None:
        model, tp, pp, vpp = case
        with tempfile.TemporaryDirectory() as folder, chunks_of(limit):
            there_and_back(model, tp, pp, vpp, Path(folder), to_megatron, to_hf)

    @few
    @given(models(), LIMITS, st.booleans(), st.booleans(), st.booleans())
    def test_any_training_checkpoint(to_hf, case, limit, original: bool, distributed: bool, padded: bool) -> None:
        """Written by the naive rule alone, read by the converter: both spellings, with and without the optimizer."""
        model, tp, pp, vpp = case
        rows = padded_rows(model.vocab, tp) if padded or tp > 1 else model.vocab
        ranks = megatron_ranks(model.config(), model.tensors(), tp, pp, vpp, rows)
        args = tm.training_args(model, tp, pp, vpp, rows) | {"use_distributed_optimizer": distributed}
        with tempfile.TemporaryDirectory() as name, chunks_of(limit):
            folder = Path(name)
            write_checkpoint(folder / "mt", ranks, args, 5, distributed and not original, original)
            back = ["--input_dir", folder / "mt", "--output_dir", folder / "hf", "--model", model.family]
            to_hf(*back, "--no_tokenizer", "--true_vocab_size", model.vocab).succeeded()
            assert_same_tensors(tm.read_huggingface(folder / "hf"), model.tensors())

else:

    @pytest.mark.skip(reason="hypothesis is not installed")
    def test_properties() -> None: ...


# --- literal rows -----------------------------------------------------------------------------------------------------


def numbered(model: tm.Tiny, starts: dict[str, int]) -> tm.Tensors:
    """Row r of a tensor whose name ends in one of `starts` holds `starts[name] + r` everywhere; the rest is zero."""
    tensors = {name: torch.zeros_like(tensor) for name, tensor in model.tensors().items()}
    for name, tensor in tensors.items():
        for part, start in starts.items():
            if part in name:
                rows = torch.arange(tensor.shape[0]) + start
                tensor.copy_(rows[:, None].expand(tensor.shape))
    return tensors


def first_column(tensors: dict[str, torch.Tensor], name: str) -> list[int]:
    column = tensors[name][:, 0]
    assert bool((tensors[name] == column[:, None]).all()), "a row was mixed with another"
    return [int(value) for value in column]


def test_literal_rows_of_one_rank(to_megatron, tmp_path: Path) -> None:
    """Four heads in two groups, head_dim 4, six rows of gate and of up; cut in two."""
    model = tm.Tiny(
        "literal", "llama2", layers=1, hidden=16, ffn=6, groups=2, head_dim=4, vocab=256, dtype=torch.float32
    )
    starts = {"q_proj": 0, "k_proj": 100, "v_proj": 200, "up_proj": 300, "gate_proj": 400, "embed": 500, "lm_head": 800}
    source = tm.write_huggingface(tmp_path / "hf", model, tensors=numbered(model, starts), tokenizer=False)
    cut = ["--tensor-model-parallel-size", 2]
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "mt", *cut).succeeded()
    ranks = read_checkpoint(tmp_path / "mt").tensors
    qkv, glu = "encoder.layers.0.self_attention.query_key_value.weight", "encoder.layers.0.mlp.dense_h_to_4h.weight"
    # each head: rows 0, 2, 1, 3 (pairs of halves interleaved); v as it is
    first = [0, 2, 1, 3, 4, 6, 5, 7, 100, 102, 101, 103, 200, 201, 202, 203]
    second = [8, 10, 9, 11, 12, 14, 13, 15, 104, 106, 105, 107, 204, 205, 206, 207]
    assert first_column(ranks[0, 0, 0], qkv) == first
    assert first_column(ranks[1, 0, 0], qkv) == second
    assert first_column(ranks[0, 0, 0], glu) == [300, 301, 302, 400, 401, 402]
    assert first_column(ranks[1, 0, 0], glu) == [303, 304, 305, 403, 404, 405]
    assert first_column(ranks[1, 0, 0], "embedding.word_embeddings.weight") == list(range(628, 756))
    assert first_column(ranks[1, 0, 0], "lm_head") == list(range(928, 1056))


def test_literal_rows_of_falcon(to_megatron, tmp_path: Path) -> None:
    """Two groups of [q, q, k, v], head_dim 4, in the source's own fused tensor."""
    model = tm.Tiny(
        "literal",
        "falcon",
        falcon="40b",
        layers=1,
        hidden=16,
        ffn=64,
        groups=2,
        head_dim=4,
        vocab=256,
        dtype=torch.float32,
    )
    source = tm.write_huggingface(
        tmp_path / "hf", model, tensors=numbered(model, {"query_key_value": 0}), tokenizer=False
    )
    cut = ["--tensor-model-parallel-size", 2]
    to_megatron("falcon", "--model-path", source, "--out", tmp_path / "mt", *cut).succeeded()
    ranks = read_checkpoint(tmp_path / "mt").tensors
    qkv = "encoder.layers.0.self_attention.query_key_value.weight"
    assert first_column(ranks[0, 0, 0], qkv) == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 13, 14, 15]
    assert first_column(ranks[1, 0, 0], qkv) == [16, 18, 17, 19, 20, 22, 21, 23, 24, 26, 25, 27, 28, 29, 30, 31]


def test_literal_columns(to_megatron, tmp_path: Path) -> None:
    """The row-parallel weights are cut by columns: rank r has columns r*half .. (r+1)*half."""
    model = tm.Tiny(
        "literal", "llama2", layers=1, hidden=16, ffn=6, groups=2, head_dim=4, vocab=256, dtype=torch.float32
    )
    tensors = {name: torch.zeros_like(tensor) for name, tensor in model.tensors().items()}
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        tensors[name] += torch.arange(tensors[name].shape[1])
    source = tm.write_huggingface(tmp_path / "hf", model, tensors=tensors, tokenizer=False)
    cut = ["--tensor-model-parallel-size", 2]
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "mt", *cut).succeeded()
    ranks = read_checkpoint(tmp_path / "mt").tensors
    dense = ranks[1, 0, 0]["encoder.layers.0.self_attention.dense.weight"]
    down = ranks[1, 0, 0]["encoder.layers.0.mlp.dense_4h_to_h.weight"]
    assert dense.tolist() == [[8, 9, 10, 11, 12, 13, 14, 15]] * 16
    assert down.tolist() == [[3, 4, 5]] * 16


def test_literal_virtual_stages(to_megatron, tmp_path: Path) -> None:
    """Twelve layers on three stages of two chunks: stage 1 holds layers 2, 3 and 8, 9."""
    model = tm.Tiny("literal", "llama2", layers=12, hidden=8, ffn=2, heads=1, groups=1, head_dim=8, vocab=8)
    tensors = dict(model.tensors())
    for i in range(12):
        tensors[f"model.layers.{i}.input_layernorm.weight"] = torch.full((8,), i, dtype=model.dtype)
    source = tm.write_huggingface(tmp_path / "hf", model, tensors=tensors, tokenizer=False)
    cut = ["--pipeline-model-parallel-size", 3, "--num-layers-per-virtual-pipeline-stage", 2]
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "mt", *cut).succeeded()
    found = {
        key: [int(tensors[f"encoder.layers.{i}.input_layernorm.weight"][0]) for i in range(2)]
        for key, tensors in read_checkpoint(tmp_path / "mt").tensors.items()
    }
    assert found == {
        (0, 0, 0): [0, 1],
        (0, 1, 0): [2, 3],
        (0, 2, 0): [4, 5],
        (0, 0, 1): [6, 7],
        (0, 1, 1): [8, 9],
        (0, 2, 1): [10, 11],
    }


# --- vocabulary -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ([], 331),
        (["--pipeline-model-parallel-size", 2], 331),
        (["--tensor-model-parallel-size", 2], 512),
        (["--make-vocab-size-divisible-by", 128], 384),
        (["--make-vocab-size-divisible-by", 7, "--tensor-model-parallel-size", 2], 336),
        (["--true-vocab-size", 331], 384),
        (["--true-vocab-size", 336, "--make-vocab-size-divisible-by", 1], 336),
        (["--true-vocab-size", 500, "--tensor-model-parallel-size", 2], 512),
    ],
)
def test_vocabulary_rows(options: list[Any], rows: int, imported, to_hf, tmp_path: Path) -> None:
    """Added rows repeat the last; the way back keeps the true rows, as recorded at import."""
    model = tm.MODELS["llama2-wide-heads"]
    root = imported(model.name, *options)
    checkpoint = read_checkpoint(root)
    tp = checkpoint.args.tensor_model_parallel_size
    pp = checkpoint.args.pipeline_model_parallel_size
    assert_same_ranks(checkpoint.tensors, megatron_ranks(model.config(), model.tensors(), tp, pp, rows=rows))
    assert checkpoint.args.padded_vocab_size == rows
    true = options[options.index("--true-vocab-size") + 1] if "--true-vocab-size" in options else 331
    to_hf("--input_dir", root, "--output_dir", tmp_path / "hf", "--no_tokenizer").succeeded()
    found = tm.read_huggingface(tmp_path / "hf")
    assert tm.read_json(tmp_path / "hf" / "config.json")["vocab_size"] == true
    for name, tensor in model.tensors().items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = torch.cat([tensor] + [tensor[-1:]] * (true - 331))
        assert torch.equal(found[name], tensor), name


def test_mean_rows(to_megatron, tmp_path: Path) -> None:
    model = replace(tm.MODELS["llama2"], vocab=331, name="mean")
    source = tm.write_huggingface(tmp_path / "hf", model, tokenizer=False)
    options = ["--true-vocab-size", 340, "--new-rows", "mean"]
    to_megatron("llama2", "--model-path", source, "--out", tmp_path / "mt", *options).succeeded()
    found = read_checkpoint(tmp_path / "mt").single
    for ours, theirs in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("lm_head", "lm_head.weight"),
    ):
        table, source_table = found[ours], model.tensors()[theirs]
        assert table.shape[0] == 384
        assert torch.equal(table[:331], source_table)
        torch.testing.assert_close(table[331:340], source_table.mean(0).expand(9, -1), atol=1e-6, rtol=1e-5)


def test_unknown_true_vocabulary(to_hf, tmp_path: Path) -> None:
    """No manifest, no flag: every row is kept, and the report says so. The flag trims."""
    model = tm.MODELS["llama2"]
    ranks = megatron_ranks(model.config(), model.tensors(), 2, rows=512)
    write_checkpoint(tmp_path / "mt", ranks, tm.training_args(model, 2, rows=512), 3)
    result = to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "all", "--no_tokenizer").succeeded()
    assert "512" in result.text
    assert "true_vocab_size" in result.text.replace("-", "_")
    assert tm.read_huggingface(tmp_path / "all")["lm_head.weight"].shape[0] == 512
    assert tm.read_json(tmp_path / "all" / "config.json")["vocab_size"] == 512
    trim = ["--no_tokenizer", "--true_vocab_size", 320]
    to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "some", *trim).succeeded()
    assert_same_tensors(tm.read_huggingface(tmp_path / "some"), model.tensors())


# --- reading what training writes -------------------------------------------------------------------------------------


def changed(ranks: Chunks, factor: float) -> Chunks:
    return {key: {name: tensor * factor for name, tensor in tensors.items()} for key, tensors in ranks.items()}


def test_iterations(to_hf, tmp_path: Path) -> None:
    """The tracker's iteration, or the one that is asked for."""
    model = tm.MODELS["llama2-gqa"]
    ranks = megatron_ranks(model.config(), model.tensors(), 2, 2, rows=512)
    args = tm.training_args(model, 2, 2, rows=512)
    write_checkpoint(tmp_path / "mt", changed(ranks, 2), args, 100)
    write_checkpoint(tmp_path / "mt", changed(ranks, 4), args, "release")
    write_checkpoint(tmp_path / "mt", ranks, args, 800)
    (tmp_path / "mt" / "latest_checkpointed_iteration.txt").write_text("800\n")
    common = ["--input_dir", tmp_path / "mt", "--no_tokenizer", "--true_vocab_size", 320]
    to_hf(*common, "--output_dir", tmp_path / "latest").succeeded()
    to_hf(*common, "--output_dir", tmp_path / "older", "--load_iters", 100).succeeded()
    assert_same_tensors(tm.read_huggingface(tmp_path / "latest"), model.tensors())
    doubled = {name: tensor * 2 for name, tensor in model.tensors().items()}
    assert_same_tensors(tm.read_huggingface(tmp_path / "older"), doubled)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_distributed_optimizer_files(tp: int, pp: int, to_hf, tmp_path: Path) -> None:
    """`model_rng.pt` beside folders that hold only `optim.pt`: with one stage these look like ranks of a pipeline."""
    model = tm.MODELS["llama2-gqa"]
    ranks = megatron_ranks(model.config(), model.tensors(), tp, pp, rows=512)
    args = tm.training_args(model, tp, pp, rows=512) | {"use_distributed_optimizer": True}
    write_checkpoint(tmp_path / "mt", ranks, args, 5, distributed_optimizer=True)
    options = ["--no_tokenizer", "--true_vocab_size", 320]
    to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "hf", *options).succeeded()
    assert_same_tensors(tm.read_huggingface(tmp_path / "hf"), model.tensors())


def test_training_state_is_left_alone(to_hf, tmp_path: Path) -> None:
    """Optimizer, scheduler and random state in the file: read past."""
    import numpy as np

    model = tm.MODELS["llama2"]
    ranks = megatron_ranks(model.config(), model.tensors())
    extra = {
        "optimizer": {"optimizer": {"state": {0: {"exp_avg": torch.ones(9)}}, "param_groups": [{"lr": 0.1}]}},
        "opt_param_scheduler": {"max_lr": 0.1, "num_steps": 10},
        "rng_state": [{"np_rng_state": np.random.get_state(), "torch_rng_state": torch.get_rng_state()}],
    }
    write_checkpoint(tmp_path / "mt", ranks, tm.training_args(model), 5, extra=extra)
    to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "hf", "--no_tokenizer").succeeded()
    assert_same_tensors(tm.read_huggingface(tmp_path / "hf"), model.tensors())


@pytest.mark.parametrize(("name", "tp", "pp", "vpp"), CUTS)
def test_export_of_naive_checkpoints(name: str, tp: int, pp: int, vpp: int, to_hf, tmp_path: Path) -> None:
    model = tm.MODELS[name]
    ranks = megatron_ranks(model.config(), model.tensors(), tp, pp, vpp, padded_rows(model.vocab, tp))
    write_checkpoint(tmp_path / "mt", ranks, tm.training_args(model, tp, pp, vpp, padded_rows(model.vocab, tp)), 7)
    back = ["--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "hf", "--model", model.family]
    to_hf(*back, "--no_tokenizer", "--true_vocab_size", model.vocab, "--num_output_shards", 3).succeeded()
    assert_same_tensors(tm.read_huggingface(tmp_path / "hf"), model.tensors())


def test_standalone_embedding_stage(to_hf, tmp_path: Path) -> None:
    """Stage 0 holds the embedding alone: supported, or refused by its name; never read as something else."""
    model = tm.MODELS["llama2-gqa"]
    inner = megatron_ranks(model.config(), model.tensors(), 1, 2)
    name = "embedding.word_embeddings.weight"
    ranks = {(0, 0, 0): {name: inner[0, 0, 0].pop(name)}, (0, 1, 0): inner[0, 0, 0], (0, 2, 0): inner[0, 1, 0]}
    args = tm.training_args(model, 1, 3) | {
        "standalone_embedding_stage": True,
        "transformer_pipeline_model_parallel_size": 2,
    }
    write_checkpoint(tmp_path / "mt", ranks, args, 7)
    result = to_hf("--input_dir", tmp_path / "mt", "--output_dir", tmp_path / "hf", "--no_tokenizer")
    if result.code == 0:
        assert_same_tensors(tm.read_huggingface(tmp_path / "hf"), model.tensors())
    else:
        result.refused("standalone_embedding_stage")


# --- layout to layout -------------------------------------------------------------------------------------------------


def test_layout_to_layout(imported, tmp_path: Path) -> None:
    """Merge and cut in one pass gives what a direct import gives; the way there and back gives the same again."""
    from weights_conversion import hf_to_megatron

    direct = imported("llama2-gqa", *layout_options(2, 2, 1, 4))
    other = imported("llama2-gqa", *layout_options(4, 1, 1, 4))
    shutil.copytree(other, tmp_path / "in")
    hf_to_megatron("llama2", tmp_path / "in", out=tmp_path / "out", tensor_parallel=2, pipeline_parallel=2)
    assert_same_ranks(read_checkpoint(tmp_path / "out").tensors, read_checkpoint(direct).tensors)
