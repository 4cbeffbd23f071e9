"""Inputs of `fuzz` that Megatron-Core, Megatron-Bridge and peft have written: the golden cases, and one made of them.

No slow reader of them stands here. Where others read the mutated input as they read the unchanged one, or do not read
it at all, and the output is of the same config, its weights must be those of the unchanged input.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import shutil
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.robustness import oracle
from tests.robustness.mutations import bytes_of, mutate_tree
from tests.robustness.sources import TESTS

import torch  # isort: skip

GOLDEN = TESTS / "golden"
Tensors = Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Borrowed:
    """A folder and the command that converts it: `line(folder, out)`."""

    name: str
    folder: Path
    line: Callable[[Path, Path], list[str]]


def write(root: Path) -> list[Borrowed]:
    """All of them; what has to be made first is made below `root`."""
    fsdp = _fsdp_dtensor(GOLDEN / "core-llama3-torch-dcp" / "megatron-torch_dcp", root / "fsdp_dtensor")
    lora, bridge = GOLDEN / "core-llama3-lora", GOLDEN / "bridge-lora"
    experts = GOLDEN / "core-qwen3-moe-tp2ep2"

    def adapter(folder: Path, out: Path) -> list[str]:
        return import_line("llama3", "--adapter", str(folder))(lora / "base", out)

    return [
        Borrowed("torch_dcp", GOLDEN / "core-llama3-torch-dcp" / "megatron-torch_dcp", export_line("llama3")),
        Borrowed("fsdp_dtensor", fsdp, export_line("llama3")),
        Borrowed("run_config", bridge / "megatron-full", export_line("qwen3", "--adapter_alpha", "6")),
        Borrowed("megatron_adapter", bridge / "megatron-adapters", export_line("qwen3", "--adapter_as", "peft")),
        Borrowed("adapter", lora / "adapter", adapter),
        Borrowed("experts", experts / "megatron-torch-tp2ep2", export_line("qwen3-moe")),
        Borrowed("experts_hf", experts / "hf", import_line("qwen3-moe")),
    ]


def import_line(family: str, *options: str) -> Callable[[Path, Path], list[str]]:
    return lambda folder, out: [
        "hf_to_megatron", family, "--model-path", str(folder), "--target", "megatron-core", "--out", str(out), *options,
    ]  # fmt: skip


def export_line(family: str, *options: str) -> Callable[[Path, Path], list[str]]:
    return lambda folder, out: [
        "megatron_to_hf", "--model", family, "--input_dir", str(folder), "--output_dir", str(out), "--no_tokenizer",
        *options,
    ]  # fmt: skip


def _fsdp_dtensor(source: Path, root: Path) -> Path:
    """The torch_dcp folder, its tensors under the names that Megatron-FSDP gives them."""
    shutil.copytree(source, root)
    (index,) = root.glob("iter_*/.metadata")
    content = pickle.loads(index.read_bytes())  # the tests' own file

    def named(key: str) -> str:
        is_tensor = hasattr(content.state_dict_metadata[key], "properties")
        return f"model.module.{key.removeprefix('model.')}" if is_tensor else key

    stored = {dataclasses.replace(at, fqn=named(at.fqn)): info for at, info in content.storage_data.items()}
    content.state_dict_metadata = {named(key): entry for key, entry in content.state_dict_metadata.items()}
    content.storage_data = stored
    index.write_bytes(pickle.dumps(content))
    return root


def mutate_yaml(rng: random.Random, path: Path) -> None:
    """A changed value of run_config.yaml, or bytes that are none."""
    text = path.read_bytes()
    kind = rng.randrange(6)
    if kind == 0:
        path.write_bytes(bytes_of(rng, text))
    elif kind == 1:
        bombs = (
            b"a: &a [1]\nb: &b [*a,*a]\n", b"- " * 5000, b"? [", b"{" * 5000, b"&a [*a]", b"a: 1e999\n" + text,
            b"a: !!python/object/apply:os.system ['x']\n" + text, b"<<: *x\n" + text,
        )  # fmt: skip
        path.write_bytes(rng.choice(bombs))
    else:
        try:
            path.write_text(yaml.safe_dump(mutate_tree(rng, yaml.safe_load(text))))
        except (yaml.YAMLError, UnicodeError):
            path.write_bytes(bytes_of(rng, text))


def compare(kind: Borrowed, folder: Path, out: Path, reference: Path) -> str | None:
    """What is wrong with `out`, converted from the mutated `folder`; `reference`: from the unchanged one."""
    try:
        before, now = (_read(place) for place in (kind.folder, folder))
        if not _equal(before, now):
            return None
    except Exception:
        pass  # others do not read it
    if _config(out) != _config(reference):
        return None
    found, wanted = (_output(place) for place in (out, reference))
    return (
        None
        if _equal(found, wanted)
        else "converted into other weights than the unchanged input, which others read alike"
    )


def _read(folder: Path) -> Tensors:
    inner = next((index.parent for index in sorted(folder.glob("iter_*/.metadata"))), None)
    ranks = sorted(folder.glob("iter_*/mp_rank_*/model_optim_rng.pt"))
    if ranks:
        return {f"{path.parent.name} {name}": value for path in ranks for name, value in _read_rank(path).items()}
    return oracle.read_weights(folder) if inner is None else oracle.read_torch_dist(inner)


class _Unpickler(pickle.Unpickler):
    """Tensors and containers; every other class is an empty one, so that a mutated pickle runs nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2")):
            return super().find_class(module, name)
        if module == "torch" and (name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        return type(name, (), {"__init__": lambda self, *a, **k: None, "__setstate__": lambda self, state: None})


def _read_rank(path: Path) -> Tensors:
    module: Any = types.ModuleType("bounded_pickle")
    module.Unpickler, module.load = _Unpickler, lambda opened, **_: _Unpickler(opened).load()
    content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=module)
    return {name: value for name, value in content["model"].items() if isinstance(value, torch.Tensor)}


def _output(folder: Path) -> Tensors:
    release = folder / "release"
    return oracle.read_torch_dist(release) if release.is_dir() else oracle.read_weights(folder)


def _config(out: Path) -> object:
    names = ("config.json", "adapter_config.json", "conversion_manifest.json")
    return [json.loads((out / name).read_text()) if (out / name).is_file() else None for name in names]


def _equal(one: Tensors, two: Tensors) -> bool:
    return one.keys() == two.keys() and all(_same(one[name], two[name]) for name in one)


def _same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Bit for bit: of fp8 too, and of what is no number."""
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    first, second = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, two))
    return torch.equal(first, second)
