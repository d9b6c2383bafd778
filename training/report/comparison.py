"""The comparison of scorers as a Markdown table, as JSON and as a picture.

difference[seed] = CE(arm, seed) - CE(uniform, seed)        nats, of one head, on held-out text
"""

from __future__ import annotations

import json
import math
import statistics
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Mean accepted length of drafts: as an engine counts it, and what the agreement of the heads on held-out text predicts.
LENGTH, ESTIMATE = "val/accepted_length", "val/tokens_per_forward"


# What is kept of the course of a training with planted noise.
COURSE = ("train/noise_token_share", "train/noise_weight_share", "train/weight_ess", "train/clean_ess")


def noise_course(metrics: Path) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the course of the weights on noise, and its mean over all steps.

    Args:
        metrics: the metrics.jsonl of a training on a corpus with planted noise.

    Returns:
        The last step of every line and the numbers of the steps up to it, by name; and the means by name.
    """
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if COURSE[0] in line]
    steps = [line["step"] for line in lines]
    counts = [step - before for before, step in zip([0, *steps], steps, strict=False)]
    course = {"step": steps} | {name: [round(line[name], 4) for line in lines] for name in COURSE}
    means = {name: sum(n * line[name] for n, line in zip(counts, lines, strict=True)) / steps[-1] for name in COURSE}
    return course, means


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
    if "course" in comparison:
        lines += ["", noise_table(comparison)]
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


def noise_table(comparison: dict[str, Any]) -> str:
    """Format what the weights of every arm are on planted noise, and how many tokens a step is worth.

    Args:
        comparison: the content of comparison.json.
    """
    arms = comparison["results"]
    lines = ["| mean over all steps | " + " | ".join(arms) + " |", "| --- |" + " ---: |" * len(arms)]
    names = (
        "noise, share of the tokens",
        "noise, share of the weight",
        "effective sample size",
        "of clean tokens alone",
    )
    for name, metric in zip(names, COURSE, strict=True):
        lines.append(f"| {name} | " + " | ".join(spread(_levels(comparison, arm, metric)) for arm in arms) + " |")
    return "\n".join(lines)


def _draw_course(comparison: dict[str, Any], axes: Axes) -> None:
    """Draw the share of the weight on noise over the steps, and its share of the tokens."""
    from mtp_ce.training.report.plot import COLOURS

    baseline, *arms = comparison["course"]
    for colour, arm in zip(cycle(COLOURS), arms, strict=False):
        for course in comparison["course"][arm]:
            axes.plot(course["step"], course["train/noise_weight_share"], color=colour, linewidth=1, alpha=0.6)
    for course in comparison["course"][baseline]:
        axes.plot(course["step"], course["train/noise_weight_share"], color="black", linewidth=1, alpha=0.6)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_title(f"share of the weight on noise; black: {baseline}", loc="left")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw(comparison: dict[str, Any], picture: Path) -> None:
    """Draw the differences to uniform weights, one point per seed."""
    # matplotlib writes a font cache on first import; a command that fails its checks writes nothing.
    from mtp_ce.training.report.plot import COLOURS, head_ticks, open_figure

    baseline, *arms = comparison["results"]
    first = comparison["results"][baseline][0]
    sides = [side for side in ("val", "documented") if f"{side}/ce_head_0" in first]
    heads = sum(metric.startswith("val/ce_head_") for metric in first)
    course = "course" in comparison
    figure = open_figure((4.6 * (len(sides) + course), 4.2))
    panels = figure.subplots(1, len(sides) + course, squeeze=False)[0]
    if course:
        _draw_course(comparison, panels[-1])
        panels = panels[:-1]
    for axes in panels[1:]:
        axes.sharey(panels[0])
        axes.tick_params(labelleft=False)
    apart = min(0.22, 0.9 / len(arms))
    for side, axes in zip(sides, panels, strict=True):
        for index, arm in enumerate(arms):
            x = [h + (index - (len(arms) - 1) / 2) * apart for h in range(heads)]
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
