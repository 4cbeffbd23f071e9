"""Medians, ratios, a table, and a plot from the benchmark's JSON: `python -m benchmarks.report results.json`.

--update writes them into README and docs/speed.md, between the marks that stand there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contenders import contenders, settings
from benchmarks.measure import REPOSITORY
from benchmarks.shapes import SHAPES

Result = Mapping[str, Any]


def summarise(result: Result) -> dict[str, dict[str, dict[str, Any]]]:
    """For each setting and contender: medians of its costs, the highest peaks, and its ratios to its limit.

    `ratio` is the median over rounds of the run's time by its limit's in the same round; `ratio_started` the same
    without the start-up, that is the time of a dry run; `added` the seconds that the setting costs beside "warm"
    ("memory": beside "cold").
    """
    known = {one.name: one for one in contenders(SHAPES["7b"])}
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for setting in settings(result["cap"]):
        runs = [run for run in result["runs"] if run["setting"] == setting.name]
        seconds = {(run["name"], run["round"]): run["seconds"] for run in runs}
        rows: dict[str, dict[str, Any]] = {}
        for name in (name for name in known if any(run["name"] == name for run in runs)):
            limit = known[name].limit or setting.limit
            mine = [run for run in runs if run["name"] == name]
            rounds = [run["round"] for run in mine if (limit, run["round"]) in seconds]
            ratios = [seconds[name, number] / seconds[limit, number] for number in rounds]
            rows[name] = {
                **{key: median(run[key] for run in mine) for key in mine[0] if key not in ("round", "setting", "name")},
                "runs": len(mine),
                "resident": max(run["resident"] for run in mine),
                "private": max(run["private"] for run in mine),
                "limit": limit,
                "ratio": median(ratios) if ratios else None,
                "ratios": ratios,
            }
        start = rows.get("start-up") or summary.get("warm", {}).get("start-up")
        for name, row in rows.items():
            ours = not known[name].is_raw and name not in ("cp", "start-up")
            if ours and start is not None and row["limit"] in rows:
                row["ratio_started"] = (row["seconds"] - start["seconds"]) / rows[row["limit"]]["seconds"]
            beside = summary.get("cold" if setting.memory else "warm", {})
            if name in beside:
                row["added"] = row["seconds"] - beside[name]["seconds"]
        if rows:
            summary[setting.name] = rows
    return summary


def _ratio(row: Mapping[str, Any]) -> str:
    if row["ratio"] is None:
        return ""
    started = f", {row['ratio_started']:.2f} without start-up" if "ratio_started" in row else ""
    return f"**{row['ratio']:.2f}** ({min(row['ratios']):.2f} to {max(row['ratios']):.2f}{started})"


def table(result: Result) -> str:
    """Markdown, one line for each setting and contender."""
    titles = {one.name: one.title for one in contenders(SHAPES["7b"])}
    lines = [
        "| | | ratio to the disk's own rate | seconds | user + system s | peak resident | read, written |",
        "|---|---|---|---|---|---|---|",
    ]
    summary = summarise(result)
    for setting in settings(result["cap"]):
        for name, row in summary.get(setting.name, {}).items():
            ratio = "" if name in (row["limit"], "start-up") else _ratio(row)
            if row["limit"] != setting.limit and ratio:
                ratio += f" to: {titles[row['limit']]}"
            added = f" ({row['added']:+.1f})" if setting.name in ("sync", "memory") and "added" in row else ""
            lines.append(
                f"| {setting.title} | {titles[name]} | {ratio} | {row['seconds']:.1f}{added} "
                f"| {row['user']:.1f} + {row['system']:.1f} | {row['resident'] / 1e9:.2f} GB "
                f"| {row['storage_read'] / 1e9:.1f}, {row['storage_written'] / 1e9:.1f} GB |"
            )
    return "\n".join(lines)


def text(result: Result) -> str:
    machine, shape = result["machine"], result["shape"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    rounds = 1 + max(run["round"] for run in result["runs"])
    return "\n".join([
        f"{shape['name']}, {shape['layers']} layers, {result['bytes'] / 1e9:.2f} GB in bfloat16; "
        f"{machine['cores']} cores ({machine['cpu']}), {machine['memory_gb']} GB; "
        f"{machine['filesystem']}{'' if machine['direct_writes'] else ' without direct writes'}, "
        f"Linux {machine['kernel']}; {versions}; caches: {result['cache_method']}; "
        f"idle for {result['settle_seconds']:g} s before every run; "
        f"medians of {rounds} rounds (lowest to highest), peaks are the highest of all runs; in parentheses behind "
        "seconds, what the slow fsync and the small memory add.",
        "",
        table(result),
    ])  # fmt: skip


MARKS = ("<!-- measured -->", "<!-- /measured -->")


def sentence(result: Result) -> str:
    """The one of README."""
    warm = summarise(result)["warm"]
    ours, copied, alone = warm["import-tp1"], warm["cp"], warm["raw-write"]["seconds"]
    return (
        f"{result['bytes'] / 1e9:.1f} GB are imported in {ours['ratio_started']:.2f} times what the disk alone takes "
        f"to write as many ({alone:.1f} s), plus {warm['start-up']['seconds']:.1f} s of start-up; `cp -r; sync` takes "
        f"{copied['ratio']:.2f} times"
    )


def update(page: Path, text: str) -> None:
    """Puts `text` between the marks of a page."""
    before, mark, rest = page.read_text().partition(MARKS[0])
    old, end, after = rest.partition(MARKS[1])
    if not (mark and end):
        raise SystemExit(f"{page} has no {' ... '.join(MARKS)}")
    line = "\n" if old.startswith("\n") else ""
    page.write_text(f"{before}{mark}{line}{text}{line}{end}{after}")


def plot(result: Result, path: Path) -> None:
    """Bars of ratios to the disk's own rate, a panel for each setting. Needs matplotlib."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    titles = {one.name: one.title for one in contenders(SHAPES["7b"])}
    summary = summarise(result)
    shown = [setting for setting in settings(result["cap"]) if setting.name in summary]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(3.4 * len(shown) + 1.6, 4.2), squeeze=False, sharey=True)
    names = [
        name for name in titles
        if not name.startswith("raw-") and name != "start-up" and any(name in summary[each.name] for each in shown)
    ][::-1]  # fmt: skip
    for axis, setting in zip(axes[0], shown, strict=True):
        rows = summary[setting.name]
        for place, name in enumerate(names):
            if name in rows and rows[name]["ratio"] is not None:
                row, colour = rows[name], "#c9c9c9" if name == "cp" else "#1f6f8b"
                axis.barh(place, row["ratio"], 0.7, color=colour)
                axis.text(row["ratio"], place, f" {row['ratio']:.2f}", va="center", fontsize=7)
        axis.axvline(1, color="#b03a2e", linewidth=1)
        axis.set_title(setting.title, fontsize=8)
        axis.set_xlabel("time / the disk's own", fontsize=8)
        axis.margins(x=0.18)
    axes[0][0].set_yticks(range(len(names)), [titles[name] for name in names], fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument(
        "--update", action="store_true", help="write the table into docs/speed.md, a sentence into README"
    )
    args = parser.parse_args()
    result = json.loads(args.json.read_text())
    print(text(result))
    if args.update:
        update(REPOSITORY / "docs" / "speed.md", text(result))
        update(REPOSITORY / "README.md", sentence(result))
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
