"""What a verification found, as text for people and as JSON for job scripts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weights_conversion.errors.text import one_line
from weights_conversion.verification.differences import Difference, Exact
from weights_conversion.verification.numeric import Numeric
from weights_conversion.verification.plot import sparkline
from weights_conversion.verification.sides import Model

SHOWN = 12  # differing tensors that the text lists; the JSON lists all


@dataclass(frozen=True)
class ConfigField:
    """One value of the two configs. `assumed`: the side whose files do not state it."""

    name: str
    source: Any
    checkpoint: Any
    same: bool
    assumed: tuple[str, ...] = ()


@dataclass
class Verification:
    """The whole finding. `exact` is None where the shapes already differ, `numeric` also where it was not asked for."""

    family: str
    source: Model
    checkpoint: Model
    config: Sequence[ConfigField]
    config_problems: list[str] = field(default_factory=list)
    exact: Exact | None = None
    numeric: Numeric | None = None
    checksums: list[str] | None = None  # what is wrong; None: no checksums.sha256
    causes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def same(self) -> bool:
        """The same model: bit for bit, or a recast that rounds every value rightly."""
        return (
            not self.config_problems
            and self.exact is not None
            and self.exact.same
            and (self.numeric is None or self.numeric.same)
            and not self.checksums
        )

    @property
    def verdict(self) -> str:
        if not self.same or self.exact is None:
            return "different"
        return "equal after rounding" if any(d.rounded for d in self.exact.recast) else "identical"

    def text(self) -> str:
        lines = [f"source      {_side(self.source)}", f"checkpoint  {_side(self.checkpoint)}"]
        wrong = [entry for entry in self.config if not entry.same]
        lines.append(f"config      {self._config(wrong)}")
        lines += [f"            {problem}" for problem in self.config_problems]
        if self.exact:
            lines += _exact_text(self.exact)
        else:
            lines.append("weights     not compared: the shapes differ")
        if self.numeric:
            lines.append(f"forward     {self.numeric.sentence()}")
            if self.numeric.cause:
                lines.append(f"            likely cause: {self.numeric.cause}")
            elif not self.numeric.same:
                lines.append(f"            {self._unexplained()}")
            if self.numeric.experts is not None:
                reached, count = self.numeric.experts
                lines.append(f"experts     the prompts' tokens reached {reached} of {count} experts; no other was run")
            if not self.numeric.same:
                lines.append(f"errors      {sparkline(self.numeric.errors)}")
        if self.checksums is not None:
            lines.append(f"checksums   {'; '.join(self.checksums) or 'checksums.sha256 agrees'}")
        lines += [f"cause       {cause}" for cause in self.causes]
        lines += [f"note        {note}" for note in self.notes]
        lines.append(f"{self.verdict.upper()}   ({self.seconds:.1f} s)")
        return "\n".join(one_line(line) for line in lines)

    def _config(self, wrong: Sequence[ConfigField]) -> str:
        if not wrong and not self.config_problems:
            return f"{self.family}: {len(self.config)} values agree"
        return "differs"

    def _unexplained(self) -> str:
        if self.exact is not None and not self.exact.differences:
            return (
                "the tensors are equal through the converter's own mapping, so that mapping is wrong on one side: "
                "please report this"
            )
        return "no common mistake explains it: the weights themselves differ, as listed above"

    def json(self) -> dict[str, Any]:
        exact, numeric = self.exact, self.numeric
        return {
            "same": self.same,
            "verdict": self.verdict,
            "family": self.family,
            "source": _side_json(self.source),
            "checkpoint": _side_json(self.checkpoint),
            "config": {
                "same": not self.config_problems,
                "fields": {
                    entry.name: {
                        "source": _plain(entry.source), "checkpoint": _plain(entry.checkpoint), "same": entry.same,
                        "assumed": list(entry.assumed),
                    }
                    for entry in self.config
                },
                "problems": self.config_problems,
            },
            "exact": None if exact is None else {
                "same": exact.same,
                "tensors": exact.tensors,
                "values": exact.values,
                "different": len(exact.differences),
                "rounded": sum(1 for d in exact.recast if d.rounded),
                "differences": [_difference_json(d) for d in exact.differences],
                "recast": [_difference_json(d) for d in exact.recast],
                "nonfinite": {
                    name: {"source": counts[0], "checkpoint": counts[1]} for name, counts in exact.nonfinite.items()
                },
                "copies": exact.source_copies + exact.copies,
                "padding": exact.padding,
            },
            "numeric": None if numeric is None else _numeric_json(numeric),
            "checksums": None if self.checksums is None else {"same": not self.checksums, "problems": self.checksums},
            "causes": self.causes,
            "notes": self.notes,
            "seconds": round(self.seconds, 3),
        }  # fmt: skip


def _numeric_json(numeric: Numeric) -> Mapping[str, Any]:
    reached, experts = numeric.experts or (None, None)
    return {
        "same": numeric.same,
        "stage": numeric.stage,
        "layer": numeric.layer,
        "error": numeric.error,
        "logits_error": numeric.logits_error,
        "errors": list(numeric.errors),
        "cause": numeric.cause or ("rounding" if numeric.same else None),
        "prompts": numeric.prompts[0],
        "prompt_tokens": numeric.prompts[1],
        "experts_reached": reached,
        "experts": experts,
    }


def _side(model: Model) -> str:
    return f"{model.path} ({model.kind}, {model.layout}, {_name(model.dtype)})"


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _side_json(model: Model) -> Mapping[str, Any]:
    return {"path": str(model.path), "kind": model.kind, "layout": model.layout, "dtype": _name(model.dtype)}


def _exact_text(exact: Exact) -> list[str]:
    lines = []
    counted = f"{exact.tensors} tensors, {exact.values:,} values"
    if exact.differences:
        lines.append(f"weights     {len(exact.differences)} of {counted} differ")
    else:
        rounded = [d for d in exact.recast if d.rounded]
        kinds = sorted({f"{_name(d.dtypes[0])} -> {_name(d.dtypes[1])}" for d in exact.recast})
        how = f"equal after rounding ({', '.join(kinds)})" if rounded else "bit for bit the same"
        how = f"the same values ({', '.join(kinds)}, exact)" if kinds and not rounded else how
        lines.append(f"weights     {counted}: {how}")
        if rounded:
            worst = max(rounded, key=lambda d: d.absolute)
            relative = max(rounded, key=lambda d: d.relative)
            lines.append(
                f"            largest error {worst.absolute:.3g} at {_place(worst)}; relative {relative.relative:.3g} "
                f"in {relative.tensor}"
            )
    lines += [f"            {_sentence(d)}" for d in exact.differences[:SHOWN]]
    if len(exact.differences) > SHOWN:
        lines.append(f"            ... and {len(exact.differences) - SHOWN} more")
    lines += [f"copies      {sentence}" for sentence in exact.source_copies + exact.copies]
    lines += [f"padding     {sentence}" for sentence in exact.padding]
    for name, (of_source, of_checkpoint) in list(exact.nonfinite.items())[:SHOWN]:
        lines.append(f"not finite  {name}: {of_source} values in the source, {of_checkpoint} in the checkpoint")
    return lines


def _place(d: Difference) -> str:
    return f"{d.tensor} row {d.row} column {d.column} ({d.pair[0]:.8g} and {d.pair[1]:.8g})"


def _sentence(d: Difference) -> str:
    total = d.shape[0] * d.shape[1]
    kinds = "" if d.dtypes[0] == d.dtypes[1] else f" ({_name(d.dtypes[0])} and {_name(d.dtypes[1])})"
    first = f", first at row {d.first[0]} column {d.first[1]}" if d.first else ""
    files = sorted(d.files)
    where = f"; in {', '.join(files[:3])}{' ...' if len(files) > 3 else ''}" if files else ""
    cause = f"; {d.cause}" if d.cause else ""
    return (
        f"{d.tensor}{kinds}: {d.values:,} of {total:,} values differ{first}, largest error {d.absolute:.3g} "
        f"(relative {d.relative:.3g}) at row {d.row} column {d.column}: {d.pair[0]:.8g} and {d.pair[1]:.8g}"
        f"{where}{cause}"
    )


def _difference_json(d: Difference) -> Mapping[str, Any]:
    return {
        "tensor": d.tensor,
        "layer": d.layer,
        "shape": list(d.shape),
        "source_dtype": _name(d.dtypes[0]),
        "checkpoint_dtype": _name(d.dtypes[1]),
        "different_values": d.values,
        "rounded_values": d.rounded,
        "not_finite_on_one_side": d.broken,
        "largest_absolute_error": d.absolute,
        "largest_relative_error": d.relative,
        "row": d.row,
        "column": d.column,
        "source_value": _number(d.pair[0]),
        "checkpoint_value": _number(d.pair[1]),
        "first": list(d.first) if d.first else None,
        "files": dict(d.files),
        "cause": d.cause,
    }


def _number(value: float) -> float | str:
    """JSON knows no NaN and no infinity."""
    return value if value == value and abs(value) != float("inf") else str(value)


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
