"""The comparison of scorers as a Markdown table, as JSON and as a picture.

difference[seed] = CE(arm, seed) - CE(uniform, seed)        nats, of one head, on held-out text
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

# Mean accepted length of drafts: as an engine counts it, and what the agreement of the heads on held-out text predicts.
LENGTH, ESTIMATE = "val/accepted_length", "val/tokens_per_forward"


def write_comparison(comparison: dict[str, Any], output: Path) -> list[Path]:
    """Write comparison.json, comparison.md and comparison.png, and return the three paths."""
    results, table, picture = (output / f"comparison.{suffix}" for suffix in ("json", "md", "png"))
    results.write_text(json.dumps(comparison, indent=2) + "\n", encoding="utf-8")
    table.write_text(comparison_table(comparison) + "\n", encoding="utf-8")
    _draw(comparison, picture)
    return [results, table, picture]


def differences(comparison: dict[str, Any], arm: str, metric: str) -> list[float]:
    """Return an arm's metric minus that of the first arm, which has uniform weights, seed by seed.

    Empty for a head without held-out rows.
    """
    ours, theirs = _levels(comparison, arm, metric), _levels(comparison, next(iter(comparison["results"])), metric)
    return [one - other for one, other in zip(ours, theirs, strict=True)]


def _levels(comparison: dict[str, Any], arm: str, metric: str) -> list[float]:
    return [result[metric] for result in comparison["results"][arm] if result[metric] is not None]


def comparison_table(comparison: dict[str, Any]) -> str:
    """Format a comparison as a Markdown table: levels of uniform weights, differences of the other arms.

    Heads that draft have a second table, of their mean accepted length.

    Args:
        comparison: the content of comparison.json.
    """
    baseline, *arms = comparison["results"]
    first = comparison["results"][baseline][0]
    sides = [side for side in ("val", "documented") if f"{side}/ce_head_0" in first]
    heads = sum(metric.startswith("val/ce_head_") for metric in first)
    lines = [
        f"| held-out files | head | {baseline}, CE in nats | "
        + " | ".join(f"{arm} - {baseline}" for arm in arms)
        + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(arms),
    ]
    for side in sides:
        for h in range(heads):
            metric = f"{side}/ce_head_{h}"
            cells = [
                spread(_levels(comparison, baseline, metric)),
                *(spread(differences(comparison, arm, metric), "+") for arm in arms),
            ]
            where = "all" if side == "val" else side
            lines.append(f"| {where} | {h} | " + " | ".join(cells) + " |")
    if LENGTH in first:
        lines += ["", length_table(comparison)]
    lines += [
        "",
        f"Mean ± standard deviation over {len(comparison['seeds'])} seeds; {comparison['steps']:,} steps each.",
    ]
    return "\n".join(lines)


def length_table(comparison: dict[str, Any]) -> str:
    """Format the mean accepted lengths of heads that draft: levels of uniform weights, differences of the others.

    Args:
        comparison: the content of comparison.json.
    """
    baseline, *arms = comparison["results"]
    lines = [
        f"| mean accepted length, tokens | {baseline} | " + " | ".join(f"{arm} - {baseline}" for arm in arms) + " |",
        "| --- | ---: |" + " ---: |" * len(arms),
    ]
    for metric, where in ((LENGTH, "greedy text of the model"), (ESTIMATE, "held-out text, 1 + agree")):
        changes = (spread(differences(comparison, arm, metric), "+") for arm in arms)
        lines.append(f"| {where} | {spread(_levels(comparison, baseline, metric))} | " + " | ".join(changes) + " |")
    return "\n".join(lines)


def _draw(comparison: dict[str, Any], picture: Path) -> None:
    """Draw the differences to uniform weights, one point per seed."""
    # matplotlib writes a font cache on first import; a command that fails its checks writes nothing.
    from mtp_ce.training.report.plot import COLOURS, head_ticks, open_figure

    baseline, *arms = comparison["results"]
    first = comparison["results"][baseline][0]
    sides = [side for side in ("val", "documented") if f"{side}/ce_head_0" in first]
    heads = sum(metric.startswith("val/ce_head_") for metric in first)
    figure = open_figure((4.6 * len(sides), 4.2))
    panels = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    for side, axes in zip(sides, panels, strict=True):
        for index, arm in enumerate(arms):
            x = [h + (index - (len(arms) - 1) / 2) * 0.22 for h in range(heads)]
            points = [differences(comparison, arm, f"{side}/ce_head_{h}") for h in range(heads)]
            for at, values in zip(x, points, strict=True):
                axes.plot([at] * len(values), values, "o", color=COLOURS[index], markersize=4, alpha=0.5)
            means = [statistics.fmean(values) if values else math.nan for values in points]
            axes.plot(
                x, means, "_", color=COLOURS[index], markersize=min(16, 96 / heads), markeredgewidth=2.5, label=arm
            )
        axes.axhline(0, color="black", linewidth=1)
        head_ticks(axes, range(heads), heads)
        axes.set_title(f"{'all' if side == 'val' else side} held-out files", loc="left")
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"CE minus that of {baseline} weights [nats]\nbelow 0: better")
    panels[-1].legend(frameon=False, title=f"bar: mean of {len(comparison['seeds'])} seeds")
    figure.savefig(picture)


def spread(values: list[float], sign: str = "") -> str:
    """Format the mean of one number for each seed, with their standard deviation."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.3f}{deviation}"
