"""Forms of an output for Megatron-Core: of one of its releases, of Megatron-Bridge, of a HybridModel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weights_conversion.config import ModelConfig, Parallelism
from weights_conversion.errors import ConversionError
from weights_conversion.formats import bridge_files, bridge_gemma, bridge_model, hybrid
from weights_conversion.layouts.parallel import with_virtual
from weights_conversion.mapping.hybrid import stages, symbols

RELEASES = ("auto", "before-0.19", "0.19")


@dataclass(frozen=True)
class Form:
    """How a checkpoint is written: torch_dist, and rank files, of which `pattern` alone is true.

    `release` "0.19": no common.pt, which older releases need.

    `bridge`: Megatron-Bridge's folders, run_config.yaml in place of args. `pattern`: a HybridModel's, None: a GPTModel.
    """

    release: str = "auto"
    bridge: bool = False
    pattern: str | None = None

    @property
    def folder(self) -> str:
        return bridge_files.FOLDER if self.bridge else "release"

    @property
    def tracker(self) -> bytes:
        return bridge_files.TRACKER_TEXT if self.bridge else b"release"


def checked(form: Form, config: ModelConfig) -> Form:
    """`form`, if a model of `config` can have it. Raises ConversionError."""
    if form.bridge:
        bridge_model.check(config)
    if form.pattern is None:
        return form
    if form.bridge:
        raise ConversionError("--hybrid-layer-pattern is for --target megatron-core, not for megatron-bridge")
    wanted = symbols(config)
    if hybrid.symbols(form.pattern, "--hybrid-layer-pattern") != wanted:
        raise ConversionError(
            f"--hybrid-layer-pattern {form.pattern} is not this model's: its layers are {wanted} (| may stand between "
            "pipeline stages)"
        )
    if config.window_layers is not None:
        raise ConversionError(
            "--hybrid-layer-pattern is not for models with a window on some layers yet: --window-attn-skip-freq counts "
            "its layers there, of which each of this model's is two"
        )
    if config.mla is not None:
        raise ConversionError("--hybrid-layer-pattern is not for latent attention yet")
    if config.mtp_num_layers:
        raise ConversionError(
            "--hybrid-layer-pattern is not for layers that predict further tokens yet; --mtp drop leaves them out"
        )
    return form


def staged(
    form: Form, config: ModelConfig, parallel: Parallelism, layers_per_stage: int | None, ckpt_format: str
) -> Parallelism:
    """`parallel` with virtual stages; in rank files of a HybridModel, with the layers that its pattern gives each."""
    if form.pattern is None or ckpt_format != "torch":
        return with_virtual(parallel, layers_per_stage, config.num_layers)
    checked(form, config)
    layers, cut = len(symbols(config)), stages(form.pattern)
    parallel = replace(parallel, hybrid=config.hybrid_layer_pattern is None)
    if not cut:
        return with_virtual(parallel, layers_per_stage, layers)
    if len(cut) % parallel.pipeline or 0 in cut or layers_per_stage is not None:
        wrong = "a stage without a layer" if 0 in cut else f"{len(cut)} stages"
        raise ConversionError(
            f"--hybrid-layer-pattern {form.pattern} has {wrong}, where --pipeline-model-parallel-size "
            f"{parallel.pipeline} or a multiple was expected, and no --num-layers-per-virtual-pipeline-stage"
        )
    uneven = cut if len(set(cut)) > 1 else ()
    return replace(parallel, virtual=len(cut) // parallel.pipeline, layers=uneven)


def stated(form: Form, config: ModelConfig, parallel: Parallelism) -> dict[str, Any]:
    """What of the args a HybridModel says in its own way; of a GPTModel, nothing."""
    own = config.hybrid_layer_pattern
    pattern = form.pattern or own
    if pattern is None:
        return {}
    if parallel.virtual > 1 and not stages(pattern):  # virtual stages must be written out
        size = len(pattern) // (parallel.pipeline * parallel.virtual)
        pattern = "|".join(pattern[at : at + size] for at in range(0, len(pattern), size))
    said = {hybrid.PATTERN: pattern} if own is not None else hybrid.hybrid_args(pattern)
    return said | {"num_layers_per_virtual_pipeline_stage": None}


# Flags of a GPTModel that a HybridModel's pattern stands for.
_SAID_BY_PATTERN = ("--experimental-attention-variant", "--linear-attention-freq")


def training(form: Form, flags: list[str], out: Path, config: ModelConfig) -> tuple[list[str], list[str]]:
    """(what training is to be started with, warnings), in place of `flags` for a GPTModel of Megatron-LM."""
    if form.bridge:
        loads = f"checkpoint.pretrained_checkpoint={out} (Megatron-Bridge; or checkpoint.load, to go on there)"
        return [loads], bridge_gemma.warnings(config) if config.local_rope_theta is not None else []
    if form.pattern is None:
        return flags, []
    if config.hybrid_layer_pattern is not None:
        return [*flags, f"--hybrid-layer-pattern '{form.pattern}'"], []
    flags = [flag for flag in flags if not flag.startswith(_SAID_BY_PATTERN)]
    own = [f"--hybrid-layer-pattern '{form.pattern}'", f"--spec {' '.join(hybrid.SPEC)}", "(pretrain_hybrid.py)"]
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return [*flags, *own], []
    return [*flags, *own], [
        "stock Megatron-LM's HybridModel ignores --use-rope-scaling: the model computes something else there unless "
        "its code passes rope_scaling to the rotary embedding"
    ]
