"""Forms of a torch_dist output: of a release of Megatron-Core, of Megatron-Bridge, of a HybridModel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from weights_conversion.config import ModelConfig
from weights_conversion.errors import ConversionError
from weights_conversion.formats import bridge_files, bridge_model, hybrid

RELEASES = ("auto", "before-0.19", "0.19")


@dataclass(frozen=True)
class Form:
    """How a torch_dist checkpoint is written. `release` "0.19": no common.pt, which older releases need.

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
    wanted = "".join("*E" if "moe" in config.layer_features(layer) else "*-" for layer in range(config.num_layers))
    if hybrid.sub_blocks(form.pattern, "--hybrid-layer-pattern") != wanted:
        raise ConversionError(
            f"--hybrid-layer-pattern {form.pattern} is not this model's: its layers are {wanted} (| may stand between "
            "pipeline stages)"
        )
    if config.window_layers is not None:
        raise ConversionError(
            "--hybrid-layer-pattern is not for models with a window on some layers yet: --window-attn-skip-freq counts "
            "its layers there, of which each of this model's is two"
        )
    if config.mla is not None or config.mtp_num_layers:
        raise ConversionError("--hybrid-layer-pattern is not for latent attention or multi-token prediction yet")
    return form


def training(form: Form, flags: list[str], out: Path, config: ModelConfig) -> tuple[list[str], list[str]]:
    """(what training is to be started with, warnings), in place of `flags` for a GPTModel of Megatron-LM."""
    if form.bridge:
        return [f"checkpoint.pretrained_checkpoint={out} (Megatron-Bridge; or checkpoint.load, to go on there)"], []
    if form.pattern is None:
        return flags, []
    own = [f"--hybrid-layer-pattern '{form.pattern}'", f"--spec {' '.join(hybrid.SPEC)}", "(pretrain_hybrid.py)"]
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return [*flags, *own], []
    return [*flags, *own], [
        "stock Megatron-LM's HybridModel ignores --use-rope-scaling: the model computes something else there unless "
        "its code passes rope_scaling to the rotary embedding"
    ]
