"""Medians, ratios, a table, and a plot from the benchmark's JSON: `python -m benchmarks.report results.json`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

COPY = "cp -r; sync"
TITLES = {
    "import-tp1": "import, TP 1",
    "import-tp8-pp4": "import, TP 8 x PP 4",
    "import-page-cache": "import, TP 1, no direct writes",
    "import-baseline": "import, whole model in memory",
    "export-1": "export, 1 file",
    "export-5gb": "export, files of 5 GB",
    "export-page-cache": "export, 1 file, no direct writes",
    "export-baseline": "export, whole model in memory",
}


def summarise(session: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """One entry for each contender: medians of its costs, and its ratios to the copy of the same pair."""
    summary = {}
    for name in TITLES:
        pairs = [pair for pair in session["pairs"] if pair["name"] == name]
        if not pairs:
            continue
        ratios = [pair["run"]["seconds"] / (pair["copy"]["seconds"] + pair["sync"]["seconds"]) for pair in pairs]
        plain = [pair["run"]["seconds"] / pair["copy"]["seconds"] for pair in pairs]
        summary[name] = {
            "pairs": len(pairs),
            "copy_seconds": median(pair["copy"]["seconds"] for pair in pairs),
            "copy_and_sync_seconds": median(pair["copy"]["seconds"] + pair["sync"]["seconds"] for pair in pairs),
            "ratio_to_copy_and_sync": median(ratios),
            "ratios_to_copy_and_sync": ratios,
            "ratio_to_copy": median(plain),
            **{key: median(pair["run"][key] for pair in pairs) for key in pairs[0]["run"]},
            "resident": max(pair["run"]["resident"] for pair in pairs),
            "private": max(pair["run"]["private"] for pair in pairs),
        }
    for direction, ours in (("import", "import-tp1"), ("export", "export-1")):
        if ours in summary and f"{direction}-baseline" in summary:
            summary[ours]["times_faster_than_baseline"] = _faster(session["pairs"], ours, f"{direction}-baseline")
    return summary


def _faster(pairs: Sequence[Mapping[str, Any]], ours: str, baseline: str) -> float:
    """Median over the rounds in which both ran."""
    seconds = {(pair["name"], pair["round"]): pair["run"]["seconds"] for pair in pairs}
    rounds = {number for name, number in seconds if name == ours} & {n for name, n in seconds if name == baseline}
    return median(seconds[baseline, n] / seconds[ours, n] for n in rounds)


def table(session: Mapping[str, Any]) -> str:
    """Markdown, one line for each contender."""
    lines = [
        f"| {session['cache']} cache | seconds | `{COPY}` then | ratio (lowest to highest) | ratio to `cp -r` alone "
        "| user + system s | peak resident | peak private | read, written |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in summarise(session).items():
        ratios = row["ratios_to_copy_and_sync"]
        lines.append(
            f"| {TITLES[name]} | {row['seconds']:.1f} | {row['copy_and_sync_seconds']:.1f} "
            f"| **{row['ratio_to_copy_and_sync']:.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {row['ratio_to_copy']:.2f} | {row['user']:.1f} + {row['system']:.1f} "
            f"| {row['resident'] / 1e9:.2f} GB | {row['private'] / 1e9:.2f} GB "
            f"| {row['storage_read'] / 1e9:.1f}, {row['storage_written'] / 1e9:.1f} GB |"
        )
    return "\n".join(lines)


def text(session: Mapping[str, Any]) -> str:
    machine, shape = session["machine"], session["shape"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"{shape['name']}, {shape['layers']} layers, {session['bytes'] / 1e9:.2f} GB in bfloat16; "
        f"{machine['cores']} cores ({machine['cpu']}), {machine['memory_gb']} GB; "
        f"{machine['filesystem']}{'' if machine['direct_writes'] else ' without direct writes'}, "
        f"Linux {machine['kernel']}; {versions}; caches {session['cache']} ({session['cache_method']}); "
        f"idle for {session['settle_seconds']:g} s before every run; "
        "medians of pairs, peaks are the highest of all runs.",
        "",
        table(session),
    ]
    for name, row in summarise(session).items():
        if "times_faster_than_baseline" in row:
            faster = row["times_faster_than_baseline"]
            lines.append(f"\n{TITLES[name]}: {faster:.1f} x faster than the whole-model way.")
    for name, start in session.get("start", {}).items():
        lines.append(
            f"\n{name}: {start['seconds']:.2f} s, {start['reference']} {start['reference_seconds']:.2f} s "
            f"(difference {start['seconds'] - start['reference_seconds']:.2f} s, ratio {start['ratio']:.2f})"
        )
    return "\n".join(lines)


def plot(sessions: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of seconds beside the copy's, and of memory. Needs matplotlib."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    sessions = [session for session in sessions if session["pairs"]]
    figure, axes = pyplot.subplots(
        len(sessions), 2, figsize=(11, 0.8 + 3.4 * len(sessions)), squeeze=False, width_ratios=(3, 2)
    )
    for (left, right), session in zip(axes, sessions, strict=True):
        summary = summarise(session)
        names = list(summary)[::-1]
        places = range(len(names))
        labels = [TITLES[name] for name in names]
        left.barh(places, [summary[n]["seconds"] for n in names], 0.4, label="conversion", color="#1f6f8b")
        beside = [place + 0.4 for place in places]
        left.barh(beside, [summary[n]["copy_and_sync_seconds"] for n in names], 0.4, label=COPY, color="#c9c9c9")
        for place, name in zip(places, names, strict=True):
            ratio = summary[name]["ratio_to_copy_and_sync"]
            left.text(summary[name]["seconds"], place, f" {ratio:.2f} x", va="center", fontsize=8)
        left.set_yticks([place + 0.2 for place in places], labels, fontsize=8)
        shape = session["shape"]
        left.set_title(
            f"{shape['name']}, {session['bytes'] / 1e9:.1f} GB, {session['cache']} cache, "
            f"idle {session['settle_seconds']:g} s before", fontsize=9,
        )  # fmt: skip
        left.set_xlabel("seconds (median), and ratio to the copy", fontsize=8)
        left.margins(x=0.12)
        left.legend(fontsize=7, loc="upper right", bbox_to_anchor=(0.0, 0.0))
        right.barh(places, [summary[n]["private"] / 1e9 for n in names], 0.4, label="private", color="#1f6f8b")
        resident = [summary[n]["resident"] / 1e9 for n in names]
        right.barh(beside, resident, 0.4, label="resident", color="#8bbf9f")
        right.set_yticks([])
        right.set_xlabel("peak memory, GB", fontsize=8)
        right.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args()
    sessions = json.loads(args.json.read_text())["sessions"]
    print("\n\n".join(text(session) for session in sessions))
    if args.plot:
        plot(sessions, args.plot)


if __name__ == "__main__":
    main()
