"""The comparison of scorers as a Markdown table, as JSON and as a picture.

difference[seed] = CE(arm, seed) - CE(uniform, seed)        nats, of one head, on held-out text
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any


def write_comparison(found: dict[str, Any], output: Path) -> list[Path]:
    """Write comparison.json, comparison.md and comparison.png, and return the three paths."""
    results, table, picture = (output / f"comparison.{suffix}" for suffix in ("json", "md", "png"))
    results.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    table.write_text(comparison_table(found) + "\n", encoding="utf-8")
    _draw(found, picture)
    return [results, table, picture]


def differences(found: dict[str, Any], arm: str, metric: str) -> list[float]:
    """Return an arm's metric minus that of the first arm, which has uniform weights, seed by seed."""
    baseline, *_ = found["results"].values()
    return [ours[metric] - theirs[metric] for ours, theirs in zip(found["results"][arm], baseline, strict=True)]


def comparison_table(found: dict[str, Any]) -> str:
    """Lay a comparison out as a Markdown table: levels of uniform weights, differences of the other arms.

    Args:
        found: what comparison.json holds.
    """
    baseline, *arms = found["results"]
    first = found["results"][baseline][0]
    sides = [side for side in ("val", "documented") if f"{side}/ce_head_0" in first]
    heads = sum(metric.startswith("val/ce_head_") for metric in first)
    lines = [
        f"| held-out files | head | {baseline}, CE in nats | {' | '.join(f'{arm} - {baseline}' for arm in arms)} |",
        "| --- | ---: | ---: |" + " ---: |" * len(arms),
    ]
    for side in sides:
        for h in range(heads):
            metric = f"{side}/ce_head_{h}"
            levels = [result[metric] for result in found["results"][baseline]]
            cells = [_spread(levels), *(_spread(differences(found, arm, metric), "+") for arm in arms)]
            where = "all" if side == "val" else side
            lines.append(f"| {where} | {h} | " + " | ".join(cells) + " |")
    lines += ["", f"Mean ± standard deviation over {len(found['seeds'])} seeds; {found['steps']:,} steps each."]
    return "\n".join(lines)


def _draw(found: dict[str, Any], picture: Path) -> None:
    """Draw the differences to uniform weights, a point for each seed."""
    # matplotlib writes a font cache when it is first imported; a wrong recipe writes nothing.
    from mtp_ce.training.report.plot import COLOURS, open_figure

    baseline, *arms = found["results"]
    first = found["results"][baseline][0]
    sides = [side for side in ("val", "documented") if f"{side}/ce_head_0" in first]
    heads = sum(metric.startswith("val/ce_head_") for metric in first)
    figure = open_figure((4.6 * len(sides), 4.2))
    panels = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    for side, axes in zip(sides, panels, strict=True):
        for place, arm in enumerate(arms):
            x = [h + (place - (len(arms) - 1) / 2) * 0.22 for h in range(heads)]
            points = [differences(found, arm, f"{side}/ce_head_{h}") for h in range(heads)]
            for at, values in zip(x, points, strict=True):
                axes.plot([at] * len(values), values, "o", color=COLOURS[place], markersize=4, alpha=0.5)
            means = [statistics.fmean(values) for values in points]
            axes.plot(x, means, "_", color=COLOURS[place], markersize=16, markeredgewidth=2.5, label=arm)
        axes.axhline(0, color="black", linewidth=1)
        axes.set_xticks(range(heads), [f"head {h}" for h in range(heads)])
        axes.set_title(f"{'all' if side == 'val' else side} held-out files", loc="left")
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"CE minus that of {baseline} weights [nats]\nbelow 0: better")
    panels[-1].legend(frameon=False, title=f"bar: mean of {len(found['seeds'])} seeds")
    figure.savefig(picture)


def _spread(values: list[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.3f}{spread}"
