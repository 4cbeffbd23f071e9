"""verify runs layers that predict further tokens on both sides, and names what is wrong with one."""

from __future__ import annotations

from pathlib import Path

import latent_models as lm
import pytest
import torch
from conftest import run
from safetensors.torch import load_file

from weights_conversion.verification import forward
from weights_conversion.verification.conventions import CONVENTIONS
from weights_conversion.verification.sides import open_model
from weights_conversion.verification.stored import weights_of

STAGES = ("--ckpt-format", "torch", "--pipeline-model-parallel-size", 3, "--tensor-model-parallel-size", 2,
          "--expert-model-parallel-size", 2)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lm.write(tmp_path_factory.mktemp("latent") / "hf", mtp=2)


def stages(folder: Path) -> dict[tuple[str, int | None], torch.Tensor]:
    from weights_conversion.engine.streams import Source

    files = Source()
    model = open_model(folder, "deepseek-v3")
    tokens = forward.default_prompts(model.config, 2, 12)
    with torch.inference_mode():
        traced = forward.trace(model.config, CONVENTIONS[model.kind], weights_of(model, files), tokens)
        found = {(stage, layer): output for stage, layer, output in traced}
    files.close()
    return found


@pytest.mark.parametrize("layout", [(), STAGES, (*STAGES, "--mla-down-proj-fusion")], ids=["dist", "ranks", "fused"])
def test_both_sides_run_them(layout: tuple, source: Path, tmp_path: Path, to_megatron) -> None:
    out = tmp_path / "out"
    to_megatron("deepseek-v3", "--model-path", source, "--out", out, *layout).succeeded()
    ours, theirs = stages(source), stages(out)
    assert ours.keys() == theirs.keys()
    assert {layer for stage, layer in ours if stage == "prediction"} == {3, 4}
    assert all(torch.equal(ours[at], theirs[at]) for at in ours)


def test_what_they_compute(source: Path) -> None:
    """By hand: norms of the next token's embedding and of the last hidden state, in this order, and a projection."""
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    found = stages(source)
    tokens = forward.default_prompts(open_model(source, "deepseek-v3").config, 2, 12)
    following = torch.cat([tokens[:, 1:], torch.zeros(2, 1, dtype=torch.int64)], dim=1)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], tensors[f"model.layers.3.{name}.weight"], 1e-6)

    both = [norm("enorm", tensors["model.embed_tokens.weight"][following]), norm("hnorm", found["final_norm", None])]
    wanted = torch.cat(both, dim=-1) @ tensors["model.layers.3.eh_proj.weight"].T
    torch.testing.assert_close(found["joined", 3], wanted, atol=1e-5, rtol=1e-5)
    last = norm("shared_head.norm", found["layer", 3])
    torch.testing.assert_close(found["prediction", 3], last, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found["joined", 4], found["joined", 3])


def test_halves_that_are_exchanged(source: Path, tmp_path: Path, to_megatron) -> None:
    out = tmp_path / "out"
    to_megatron("deepseek-v3", "--model-path", source, "--out", out).succeeded()

    def exchange(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.3.eh_proj.weight"
        tensors[name] = torch.cat(tensors[name].chunk(2, dim=1)[::-1], dim=1)

    other = lm.write(tmp_path / "hf", mtp=2)
    lm.edit_tensors(other, exchange)
    said = run("weights_conversion.verify", other, out)
    assert said.code == 1
    assert "the sides part at layer 3 joined" in said.out
    assert "the halves of eh_proj are exchanged" in said.out


@pytest.mark.parametrize("ones", [True, False])
def test_the_norm_behind_one_is_another(source: Path, tmp_path: Path, to_megatron, ones: bool) -> None:
    """Its output are no logits, which have another width."""
    out = tmp_path / "out"
    other = lm.write(tmp_path / "hf", mtp=2)
    to_megatron("deepseek-v3", "--model-path", source, "--out", out).succeeded()

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.4.shared_head.norm.weight"
        tensors[name] = torch.ones_like(tensors[name]) if ones else tensors[name] * 3

    lm.edit_tensors(other, change)
    said = run("weights_conversion.verify", out, other)
    assert said.code == 1
    assert "the sides part at layer 4 prediction" in said.out
    assert ("the norm's weights are all ones" in said.out) == ones
    assert not said.err


@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_a_norm_within_a_layer_is_another(source: Path, tmp_path: Path, to_megatron, norm: str, layer: int) -> None:
    """Of a dense layer, one with experts, and one that predicts: no cause that is looked for asks for a tensor that
    such a layer calls otherwise, which would be an error."""
    out = tmp_path / "out"
    other = lm.write(tmp_path / "hf", mtp=2)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"model.layers.{layer}.{norm}.weight"].fill_(1)

    lm.edit_tensors(other, change)
    to_megatron("deepseek-v3", "--model-path", other, "--out", out).succeeded()
    said = run("weights_conversion.verify", source, out)
    assert (said.code, said.err) == (1, "")
    assert f"the sides part at layer {layer} " in said.out
    assert "the norm's weights are all ones" in said.out


def test_rounded_alike(source: Path, tmp_path: Path, to_megatron) -> None:
    whole = lm.write(tmp_path / "hf", mtp=1, dtype=torch.float32)
    for number, layout in enumerate(((), STAGES)):
        out = tmp_path / f"out{number}"
        said = to_megatron("deepseek-v3", "--model-path", whole, "--out", out, "--dtype", "bf16", "--verify", *layout)
        assert "EQUAL AFTER ROUNDING" in said.succeeded().out.upper()
