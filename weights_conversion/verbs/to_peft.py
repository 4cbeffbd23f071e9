"""Megatron's LoRA adapters -> a folder of PEFT's: what is fused in Megatron is apart there, and nothing is rounded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weights_conversion.architectures import FAMILIES
from weights_conversion.config import ModelConfig
from weights_conversion.configs import core_args, core_foreign, megatron_args
from weights_conversion.engine.job import DTYPES, Job, RunOptions
from weights_conversion.engine.report import Report
from weights_conversion.engine.run import run
from weights_conversion.errors import ConversionError
from weights_conversion.formats.huggingface import SafetensorsTarget
from weights_conversion.formats.torch_dist import DistCheckpoint
from weights_conversion.layouts.placement import Placed, TensorRef, whole
from weights_conversion.layouts.plan import Plan, Step
from weights_conversion.mapping.dialects import HF
from weights_conversion.mapping.parameters import Instance, ParamMapping
from weights_conversion.output import place
from weights_conversion.sources import megatron_adapters as source
from weights_conversion.sources.families import chosen_family, read_features
from weights_conversion.sources.peft import CONFIG, PREFIX, WEIGHTS
from weights_conversion.sources.vocabulary import stated_rows


def write_peft(
    files: DistCheckpoint, config: ModelConfig, alpha: float | None, out: Path, base: str | None,
    replaced: list[str], options: RunOptions,
) -> Report:  # fmt: skip
    """Writes the adapters of `files`, whose base is of `config`. `base` is what adapter_config.json is to name."""
    adapters = source.find(files, FAMILIES[config.family], config)
    if any(each.always for instance in adapters.factors for each in instance.row.packed):
        raise ConversionError(
            f"{files.folder} holds adapters of experts, which are no modules of their own in {config.family}: PEFT has "
            "no place for them; merge them (--adapter_as merged)"
        )
    scale = adapters.alpha(alpha)
    tensors: dict[str, Placed] = {}
    ranks: dict[str, int] = {}
    for instance, several in adapters.factors.items():
        for each in several:
            for index, above in each.parts.items():
                module = instance.hf_names[index].removesuffix(".weight")
                ranks[module] = each.rank
                tensors[f"{PREFIX}{module}.lora_A.weight"] = each.below
                tensors[f"{PREFIX}{module}.lora_B.weight"] = above
    plan = _plan(tensors, config, options)
    (targets,) = plan.targets.values()
    report = Report(warnings=list(adapters.warnings(alpha)))
    said_by = adapters.settings.said_by or files.said_by
    report.notes.append(f"adapters   of {len(ranks)} modules, alpha {scale:g}" + (f", by {said_by}" if said_by else ""))
    written = {CONFIG: (json.dumps(_config(ranks, scale, adapters.settings.rank, base), indent=2) + "\n").encode()}
    place.check_apart(out, [*map(Path, plan.source_files()), files.folder])
    report.replaced(replaced)
    return run(Job(plan, report, [SafetensorsTarget(WEIGHTS[0], targets)], out, written), options)


def config_of(files: DistCheckpoint, model: str | None, fields: Mapping[str, Any]) -> ModelConfig:
    """The model that adapters alone belong to, by what stands beside them."""
    if files.said_by is None:
        raise ConversionError(
            f"nothing in {files.folder} says what model its adapters belong to; give the base with --input_dir and "
            "this folder with --adapter"
        )
    args = core_args.normalise(files.args, files.folder)
    rows = stated_rows(args) or 1
    family = model or chosen_family({}, read_features(args, (), rows), files.folder)[0]
    if problems := core_foreign.foreign_to_family(args, family, files.folder):
        raise ConversionError(*problems)
    return megatron_args.resolve(family, args, None, fields, rows).config


def _plan(tensors: Mapping[str, Placed], config: ModelConfig, options: RunOptions) -> Plan:
    refs, steps = [], []
    for name, placed in tensors.items():
        dtype = DTYPES.get(options.dtype) or placed.dtype
        refs.append(TensorRef(WEIGHTS[0], name, dtype, (placed.rows, placed.columns)))
        row = ParamMapping(name, (name,), ())
        steps.append(Step(Instance(row), (placed,), (whole(refs[-1]),), placed.rows))
    return Plan(config, HF, HF, tuple(steps), {WEIGHTS[0]: tuple(refs)})


def _config(ranks: Mapping[str, int], alpha: float, rank: int | None, base: str | None) -> dict[str, Any]:
    """adapter_config.json, as Megatron-Bridge's own export has it."""
    usual = rank if rank in ranks.values() else Counter(ranks.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": base or "",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "r": usual,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != usual},
        "alpha_pattern": {},
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in ranks}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
