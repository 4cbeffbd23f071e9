"""LoRA adapters as Megatron-Bridge (and NeMo 2) stores them: beside their base in one checkpoint, or alone.

A module's factors are `<module>.adapter.linear_in.weight` (r, in) and `.linear_out.weight` (out, r), stacked over
layers and experts as the module's weight is; out has the rows of the fused weight. CanonicalLoRA keeps the parts of a
fused weight apart (adapter_q, adapter_k, adapter_v, adapter_gate, adapter_up), each with factors of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weights_conversion.config import ModelConfig
from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.formats.dist_index import METADATA
from weights_conversion.formats.dist_items import Items
from weights_conversion.formats.iterations import find_iteration
from weights_conversion.formats.megatron import RankFiles
from weights_conversion.formats.run_config import RUN_CONFIG, model_yaml, read_peft
from weights_conversion.formats.torch_dist import DistCheckpoint, open_dist
from weights_conversion.layouts.adapted import hf_rows, moved, runs
from weights_conversion.layouts.dist import dist_key
from weights_conversion.layouts.placement import Delta, Located, Placed
from weights_conversion.mapping.dialects import MEGATRON_CORE
from weights_conversion.mapping.ops import FuseGLU, FuseQKV
from weights_conversion.mapping.parameters import Architecture, Instance
from weights_conversion.sources import naming
from weights_conversion.sources.checkpoint import megatron_root
from weights_conversion.sources.locate import locate
from weights_conversion.sources.locate_dist import Parts, uncovered
from weights_conversion.sources.peft import CONFIG as PEFT_CONFIG
from weights_conversion.sources.peft import MOST

_APART = {FuseQKV: ("adapter_q", "adapter_k", "adapter_v"), FuseGLU: ("adapter_gate", "adapter_up")}
_KINDS = ("LoRA", "CanonicalLoRA")  # of Bridge's peft package, and NeMo 2's; others compute something else


@dataclass(frozen=True)
class Settings:
    """What the files state about the adapters. `said_by` is the file; `silent` says of it that it states no alpha.

    `fewer`: experts may have a smaller rank than `rank` (Bridge's normalize_moe_lora divides it by top-k).
    """

    rank: int | None
    alpha: float | None
    said_by: Path | None
    silent: str
    fewer: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Factors:
    """One adapter of one parameter: `below` (r, columns), and for each HF tensor that it changes the rows of `above`.

    `above` is in rows of the Megatron tensor, `parts` (index of the HF tensor -> factor) in rows of each HF tensor.
    """

    below: Placed
    above: Placed
    parts: Mapping[int, Placed]

    @property
    def rank(self) -> int:
        return self.below.rows


@dataclass(frozen=True)
class Adapters:
    """Every adapter of a checkpoint, by the parameter that it belongs to."""

    folder: Path
    settings: Settings
    factors: Mapping[Instance, tuple[Factors, ...]] = field(repr=False)

    def alpha(self, flag: float | None) -> float:
        """As the user says it, else as the files do. Raises ConversionError where neither does."""
        alpha = flag if flag is not None else self.settings.alpha
        if alpha is None:
            raise ConversionError(
                f"{self.folder} does not say the alpha of its adapters ({self.settings.silent}); --adapter_alpha "
                "says it"
            )
        return alpha

    def warnings(self, flag: float | None) -> tuple[str, ...]:
        """Those of the files, and that `flag` says otherwise than they do."""
        said = self.settings.alpha
        if flag is None or said is None or flag == said:
            return self.settings.warnings
        other = f"--adapter_alpha {flag:g} is used, but {self.settings.said_by or self.folder} says alpha {said:g}"
        return (*self.settings.warnings, other)

    def merged(self, located: Located, alpha: float) -> Located:
        """`located` with what the adapters add to the Megatron tensors."""
        found = dict(located)
        for instance, several in self.factors.items():
            (placed,) = located[instance.key]
            deltas = tuple(Delta(each.below, each.above, alpha / each.rank) for each in several)
            found[instance.key] = (replace(placed, deltas=deltas),)
        return found


def settings_of(files: DistCheckpoint) -> Settings:
    """Rank and alpha, by the YAML beside the adapters, else by the args. Raises ConversionError for another method."""
    path = next((p for p in (files.folder / RUN_CONFIG, model_yaml(files.folder)) if p and fileio.is_file(p)), None)
    said: dict[str, Any] = {} if path is None else read_peft(path)
    rank, alpha = said.get("dim"), said.get("alpha")
    if not said:
        path = None
        rank, alpha = files.args.get("lora_rank", files.args.get("lora_dim")), files.args.get("lora_alpha")
    kind = str(said.get("_target_", "LoRA")).rpartition(".")[2]
    if kind not in _KINDS:
        raise ConversionError(f"{path} says that the adapters are {kind[:60]}; {' or '.join(_KINDS)} was expected")
    for name, value in (("dim", rank), ("alpha", alpha)):
        if value is not None and (type(value) not in (int, float) or not 0 < value <= MOST):
            raise ConversionError(f"{path or files.folder} says {name} {str(value)[:40]!r} of the adapters")
    warnings = []
    cut = files.args.get("tensor_model_parallel_size")
    if kind == "CanonicalLoRA" and any(".adapter_q." in key for key in files.adapters) and (cut or 1) > 1:
        warnings.append(
            f"the adapters are Megatron-Bridge's CanonicalLoRA, trained at TP {cut}: its release 0.6.2 mixes up the "
            "heads of q, k and v there, so that training computed something else than the weights say"
        )
    whole = int(rank) if rank is not None else None
    fewer = bool(said.get("normalize_moe_lora"))
    return Settings(whole, None if alpha is None else float(alpha), path, _silent(files, said), fewer, tuple(warnings))


def _silent(files: DistCheckpoint, said: Mapping[str, Any]) -> str:
    """Why the files state no alpha."""
    path = next((p for p in (files.folder / RUN_CONFIG, model_yaml(files.folder)) if p and fileio.is_file(p)), None)
    if path is None:
        return f"it holds no {RUN_CONFIG} and its args no lora_alpha"
    if said:
        return f"what {path.name} says of them lacks alpha"
    section = "peft" if path.name == RUN_CONFIG else "model_transform"
    return f"its {path.name} has no section {section}, as where base and adapters were saved as one model"


def open_adapters(path: Path) -> DistCheckpoint:
    """The checkpoint at `path`, which must hold adapters. Raises ConversionError where it does not."""
    if fileio.is_file(path / PEFT_CONFIG):
        raise ConversionError(
            f"--adapter {path} is an adapter of PEFT's, which belongs to a Hugging Face model; hf_to_megatron.py "
            "--adapter merges it on the way to Megatron"
        )
    here = megatron_root(path, None)
    folder, iteration = find_iteration(here.root, here.iteration)
    if not fileio.is_file(folder / METADATA):
        raise ConversionError(f"--adapter {folder} is no torch_dist checkpoint, as Megatron's adapters are")
    files = open_dist(folder, iteration)
    if not files.adapters:
        raise ConversionError(
            f"--adapter {folder} holds no adapters: no tensor is named <module>.adapter.linear_in.weight"
        )
    return files


def chosen(files: RankFiles | DistCheckpoint, adapter: Path | None) -> DistCheckpoint | None:
    """The checkpoint whose adapters are meant: the one at `adapter`, else `files` itself where it holds some."""
    own = files if isinstance(files, DistCheckpoint) and files.adapters else None
    if adapter is None:
        return own
    if own is not None and own.stored:
        raise ConversionError(f"{own.folder} holds adapters itself, --adapter {adapter} is too many; leave it out")
    return open_adapters(adapter)


def locate_merged(
    files: RankFiles | DistCheckpoint, architecture: Architecture, config: ModelConfig, adapter: Path | None,
    alpha: float | None,
) -> tuple[Located, list[str], tuple[str, ...]]:  # fmt: skip
    """(the parameters of a checkpoint with its adapters merged, notes, warnings): those at `adapter`, or its own."""
    holder = chosen(files, adapter)
    if alpha is not None and holder is None:
        raise ConversionError(f"--adapter_alpha {alpha:g} is for adapters, and {files.folder} holds none")
    if isinstance(files, DistCheckpoint):
        files = replace(files, adapters={})
    located = locate(files, architecture, config)
    if holder is None:
        return located, [], ()
    adapters = find(holder, architecture, config)
    scale = adapters.alpha(alpha)
    note = f"adapters   {len(adapters.factors)} weights of {holder.folder}, alpha {scale:g}, merged in float32"
    return adapters.merged(located, scale), [note], adapters.warnings(alpha)


def find(files: DistCheckpoint, architecture: Architecture, config: ModelConfig) -> Adapters:
    """All adapters of `files`. What fits no parameter of the model is an error by name."""
    problems: list[tuple[str, str]] = []
    used: set[str] = set()
    found: dict[Instance, tuple[Factors, ...]] = {}
    with Items(files.folder) as items:
        search = _Search(files, config, Parts(files.adapters, items), problems, used)
        for instance in architecture.instances(config):
            matrix = instance.row.megatron.removesuffix("{expert}").endswith(".weight") and len(instance.row.shape) == 2
            if matrix and (factors := tuple(search.of(instance))):
                found[instance] = factors
    problems += [
        (key, f"{files.folder} has an adapter {key} that fits no weight of this {config.family} model")
        for key in sorted(files.adapters.keys() - used)
    ]
    if problems:
        raise ConversionError(*naming.grouped(problems))
    if not found:
        raise ConversionError(f"{files.folder} holds no adapters (no tensor named <module>.adapter.linear_in.weight)")
    settings = settings_of(files)
    _check_ranks(files, settings, found)
    return Adapters(files.folder, settings, found)


def _check_ranks(files: DistCheckpoint, settings: Settings, found: Mapping[Instance, tuple[Factors, ...]]) -> None:
    """Another run's YAML beside the adapters has another alpha too, which no shape would betray."""
    rank, each = settings.rank, [factors for several in found.values() for factors in several]
    strange = [one for one in each if rank and one.rank != rank and not (settings.fewer and one.rank < rank)]
    if strange:
        raise ConversionError(
            f"{settings.said_by or files.folder} says rank {rank} of the adapters, but {strange[0].below.name} has "
            f"rank {strange[0].rank}; copy the file of this run there"
        )


@dataclass(frozen=True)
class _Search:
    files: DistCheckpoint
    config: ModelConfig
    parts: Parts
    problems: list[tuple[str, str]]
    used: set[str]

    def of(self, instance: Instance) -> Iterator[Factors]:
        """The adapters of one parameter: of the fused weight, or of its parts."""
        rows, columns = instance.row.megatron_shape(self.config)
        if (pair := self._pair(instance, "", rows, columns)) is not None:
            below, above = pair
            order = hf_rows(instance.row, self.config, MEGATRON_CORE)
            parts = {
                index: moved(above, list(runs(numbers, range(len(numbers)))), len(numbers), above.name)
                for index, numbers in enumerate(order)
            }
            yield Factors(below, above, parts)
        for index, part in enumerate(_APART.get(type(instance.row.op), ())):
            numbers = hf_rows(instance.row, self.config, MEGATRON_CORE)[index] if self._has(instance, part) else []
            if numbers and (pair := self._pair(instance, f"{part}.", len(numbers), columns)) is not None:
                below, above = pair
                inside = moved(above, list(runs(range(len(numbers)), numbers)), rows, above.name)
                yield Factors(below, inside, {index: above})

    def _keys(self, instance: Instance, part: str, side: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        for stacked in (True, False):
            key, lead = dist_key(instance, MEGATRON_CORE.spell(instance.row.megatron), stacked=stacked)
            yield f"{key.removesuffix('weight')}adapter.{part}linear_{side}.weight", lead

    def _has(self, instance: Instance, part: str) -> bool:
        return any(key in self.files.adapters for key, _ in self._keys(instance, f"{part}.", "in"))

    def _pair(self, instance: Instance, part: str, rows: int, columns: int) -> tuple[Placed, Placed] | None:
        below, above = (self._factor(instance, part, side) for side in ("in", "out"))
        if below is None or above is None:
            if below is not above:
                there = below or above
                name = there.name if there else ""
                self.problems.append((name, f"{self.files.folder} has {name} without the other of the two factors"))
            return None
        if (above.rows, below.columns) != (rows, columns) or above.columns != below.rows:
            said = (
                f"{below.name} and {above.name} of {self.files.folder} are {[below.rows, below.columns]} and "
                f"{[above.rows, above.columns]}, which make no {[rows, columns]}"
            )
            self.problems.append((below.name, said))
            return None
        return below, above

    def _factor(self, instance: Instance, part: str, side: str) -> Placed | None:
        for key, lead in self._keys(instance, part, side):
            stored = self.files.adapters.get(key)
            if stored is None:
                continue
            self.used.add(key)
            shape = stored.size[len(lead) :]
            blocks = tuple(self.parts.blocks(key, lead, 0)) if len(shape) == 2 else ()
            if len(shape) != 2 or uncovered(blocks, *shape):
                said = f"{key} of {self.files.folder} has shape {list(stored.size)}, where a factor per layer was due"
                self.problems.append((key, said))
                return None
            return Placed(key, stored.dtype, shape[0], shape[1], (blocks,))
        return None
