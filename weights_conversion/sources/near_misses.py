"""Folders and files of other programs: a sentence each, which says what it is and what to give instead."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

from weights_conversion.files import fileio
from weights_conversion.formats.huggingface import WEIGHT_FILES
from weights_conversion.formats.iterations import holds_iteration

_WEIGHTS = (*WEIGHT_FILES, "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")

# (names of which one is there, what the folder is then, what to give instead)
_FOLDERS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("zero_to_fp32.py", "*_optim_states.pt", "mp_rank_*_model_states.pt", "zero_pp_rank_*", "layer_*-model_*.pt"),
        "a checkpoint of DeepSpeed",
        "make one file of it with the zero_to_fp32.py that lies there, beside the model's config.json, and give that "
        "folder",
    ),
    (
        ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "ocdbt.process_*", "_sharding"),
        "a checkpoint of Orbax (JAX)",
        "save it for PyTorch first, for instance with the trainer's own export to Hugging Face, and give that folder",
    ),
    (
        ("iter_*_local.pt", "iter_*_local.pt.dirty"),
        "a local checkpoint of nvidia-resiliency-ext (--non-persistent-ckpt-type local), which each rank keeps for a "
        "restart alone",
        "load it in training, save a global checkpoint (torch_dist), and give that",
    ),
    (
        ("rank*.safetensors", "rank*.engine"),
        "a model built for TensorRT-LLM",
        "give the Hugging Face folder that it was made from",
    ),
    (
        ("consolidated*.safetensors", "consolidated.pth"),
        "a model in Mistral's own files (consolidated)",
        "give the Hugging Face files of the same model (config.json, model*.safetensors)",
    ),
    (
        ("pytorch_model_fsdp*", "*-of-*_fsdp.bin"),
        "a sharded checkpoint of PyTorch's FSDP",
        "merge it (accelerate merge-weights), and give the folder with its config.json",
    ),
    (("*.gguf",), "a model in GGUF", "give the Hugging Face folder that it was made from"),
    (
        ("tf_model.h5", "flax_model.msgpack", "*.onnx", "model.ckpt.index"),
        "a model for another framework than PyTorch",
        "give a folder with its safetensors or pytorch_model.bin",
    ),
    (("*.nemo", "model_weights.ckpt", "model_weights"), "a model of NeMo 1", "import it into NeMo 2 or Megatron-Core"),
    (("*.ckpt",), "a checkpoint of Lightning", "export it to a Hugging Face or Megatron folder with its trainer"),
)
_FILES = {
    ".gguf": "a model in GGUF; give the Hugging Face folder that it was made from",
    ".nemo": "a model of NeMo 1; import it into NeMo 2 or Megatron-Core",
    ".ckpt": "a checkpoint of Lightning; export it to a Hugging Face or Megatron folder with its trainer",
    ".tar": "an archive; unpack it and give the folder",
    ".gz": "an archive; unpack it and give the folder",
    ".zip": "an archive; unpack it and give the folder",
}
# Not bitsandbytes: merged models keep it in their config, and only the tensors tell.
_QUANTISED = ("gptq", "awq", "hqq", "aqlm", "eetq", "quip", "vptq", "auto-round", "higgs", "spqr")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def has_weights(folder: Path) -> bool:
    """Whether weights of Hugging Face's names lie in `folder`."""
    return any(fileio.is_file(folder / name) for name in WEIGHT_FILES) or bool(_matching(folder, _WEIGHTS))


def sentence(folder: Path) -> str | None:
    """What `folder` is, if it is none of the checkpoints that are read and a known one of another program."""
    config = _json(folder / "config.json")
    if config is not None and (said := _quantised(folder, config)):
        return said
    if fileio.is_there(folder / "config.json") and has_weights(folder):
        return None  # its reader says what is wrong with a config that is none
    if (said := _adapter(folder)) or (said := _mistral(folder)):
        return said
    for names, what, instead in _FOLDERS:
        inner = "global_step*" if what.endswith("DeepSpeed") else None
        if there := _matching(folder, names) or _inside(folder, inner, names):
            return f"{folder} is {what} (it holds {there}); {instead}"
    if config is not None and (near := _beside(folder)):
        return f"{folder} holds a config and no weights; the checkpoint beside it is {near}: give that"
    if fileio.is_file(folder / "model.yaml") and fileio.is_folder(folder.parent / "weights"):
        return f"{folder} is the context of a NeMo 2 checkpoint; give the folder around it, {folder.parent}"
    if has_weights(folder):
        return f"{folder} holds weights and no config.json, which says what model they are; copy it there"
    others = [path for path in folder.iterdir() if fileio.is_folder(path) or path.suffix in (".pth", ".pt", ".bin")]
    if config is None and not others and (name := _matching(folder, _TOKENIZERS)):
        return f"{folder} holds a tokenizer ({name}) and no weights; give the folder of the model"
    return None


def file_sentence(path: Path) -> str | None:
    """What a single file is, where it is another program's."""
    what = _FILES.get(path.suffix.lower())
    return f"{path} is {what}" if what else None


def _adapter(folder: Path) -> str | None:
    if not fileio.is_file(folder / "adapter_config.json"):
        return None
    base = (_json(folder / "adapter_config.json") or {}).get("base_model_name_or_path")
    named = f" of {str(base)[:200]}" if base else ""
    return (
        f"{folder} is an adapter alone (LoRA, by PEFT){named}, not a model; give its base model, and this folder with "
        "--adapter (hf_to_megatron.py merges the two)"
    )


def _mistral(folder: Path) -> str | None:
    """Meta's and Mistral's files have the same names; only Mistral's params.json states hidden_dim."""
    if not fileio.is_file(folder / "consolidated.00.pth"):
        return None
    params = _json(folder / "params.json") or {}
    if "hidden_dim" not in params or "multiple_of" in params:
        return None
    return (
        f"{folder} is a model in Mistral's own files (consolidated.00.pth, and params.json with hidden_dim); give the "
        "Hugging Face files of the same model (config.json, model*.safetensors)"
    )


def _quantised(folder: Path, config: dict[str, Any]) -> str | None:
    stated = config.get("quantization_config")
    stated = stated if isinstance(stated, dict) else _json(folder / "quantize_config.json")
    if not isinstance(stated, dict):
        return None
    method = str(stated.get("quant_method") or ("gptq" if "bits" in stated else "")).lower()
    if method not in _QUANTISED:
        return None
    bits = next((stated[key] for key in ("bits", "w_bit", "nbits") if isinstance(stated.get(key), int)), None)
    width = f", {bits} bits" if bits else ""
    return (
        f"{folder} is a quantised model ({method}{width}), whose weights training cannot use; give the unquantised "
        "model that it was made from"
    )


def _beside(folder: Path) -> str | None:
    """A Megatron checkpoint beside a folder with a config alone (verl's huggingface/ and dist_ckpt/)."""
    try:
        siblings = sorted(path for path in folder.absolute().parent.iterdir() if fileio.is_folder(path))
    except OSError:
        return None
    return next((str(path) for path in siblings[:200] if path.name == "dist_ckpt" and holds_iteration(path)), None)


def _matching(folder: Path, patterns: tuple[str, ...]) -> str | None:
    """The first name in `folder` that one of `patterns` fits."""
    try:
        with fileio.named("looking into", folder):
            names = sorted(path.name for path in folder.iterdir())
    except fileio.ABSENT:
        return None
    return next((name for pattern in patterns for name in names if fnmatch.fnmatchcase(name, pattern)), None)


def _inside(folder: Path, inner: str | None, patterns: tuple[str, ...]) -> str | None:
    """The same, one level down in a folder named `inner`."""
    name = _matching(folder, (inner,)) if inner else None
    found = _matching(folder / name, patterns) if name else None
    return f"{name}/{found}" if found else None


def _json(path: Path) -> dict[str, Any] | None:
    """A small JSON object; None where it is not there or is none, which its reader will say."""
    try:
        if not fileio.is_file(path) or path.stat().st_size > 1 << 24:
            return None
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
