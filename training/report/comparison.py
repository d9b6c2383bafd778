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
    from matplotlib.figure import Figure

# Mean accepted length of drafts: as an engine counts it, and what the agreement of the heads on held-out text predicts.
LENGTH, ESTIMATE = "val/accepted_length", "val/tokens_per_forward"

# What is kept of the course of a training with planted noise.
TOKEN_SHARE, WEIGHT_SHARE, CLEAN = "train/noise_token_share", "train/noise_weight_share", "train/clean_ess"
COURSE = (TOKEN_SHARE, WEIGHT_SHARE, "train/weight_ess", CLEAN)

# The arm without token weights, which trains on the documents that the reference predicts best.
FILTERED = "filtered"


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

    Heads that draft have a second table, of their mean accepted length. Where noise is planted, `arms_table` is all.

    Args:
        comparison: the content of comparison.json.
    """
    baseline, *arms = comparison["results"]
    seeds = comparison["seeds"]
    note = f"Mean ± standard deviation over {len(seeds)} seeds; {comparison['steps']:,} steps each."
    if "course" in comparison:
        return f"{arms_table(comparison)}\n\n{note}"
    heads = len(_head_metrics(comparison))
    lines = [
        f"| held-out files | head | {baseline}, CE in nats | "
        + " | ".join(f"{arm} - {baseline}" for arm in arms)
        + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(arms),
    ]
    for side in _sides(comparison):
        for h in range(heads):
            metric = f"{side}/ce_head_{h}"
            cells = [
                spread(_levels(comparison, baseline, metric)),
                *(spread(differences(comparison, arm, metric), "+") for arm in arms),
            ]
            where = "all" if side == "val" else side
            lines.append(f"| {where} | {h} | " + " | ".join(cells) + " |")
    if LENGTH in comparison["results"][baseline][0]:
        lines += ["", length_table(comparison)]
    return "\n".join([*lines, "", note])


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


def arms_table(comparison: dict[str, Any]) -> str:
    """Format a comparison of many arms, a line for each: cross entropies on all held-out files, and weights on noise.

    Args:
        comparison: the content of comparison.json.
    """
    baseline = next(iter(comparison["results"]))
    metrics = _head_metrics(comparison)
    noise = [TOKEN_SHARE, WEIGHT_SHARE, CLEAN] if "course" in comparison else []
    titles = ["held-out CE in nats", *(f"head {h}" for h in range(len(metrics)))]
    titles += ["noise in tokens", "in weight", "clean sample"] if noise else []
    lines = [f"| {' | '.join(titles)} |", "| --- |" + " ---: |" * (len(titles) - 1)]
    for arm in comparison["results"]:
        if arm == baseline:
            cells = [arm, *(spread(_levels(comparison, arm, metric)) for metric in metrics)]
        else:
            changes = (spread(differences(comparison, arm, metric), "+") for metric in metrics)
            cells = [f"{arm} - {baseline}", *changes]
        cells += [f"{statistics.fmean(_levels(comparison, arm, metric)):.3f}" for metric in noise]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _sides(comparison: dict[str, Any]) -> list[str]:
    first = next(iter(comparison["results"].values()))[0]
    return [side for side in ("val", "documented") if f"{side}/ce_head_0" in first]


def _head_metrics(comparison: dict[str, Any]) -> list[str]:
    first = next(iter(comparison["results"].values()))[0]
    return [metric for metric in first if metric.startswith("val/ce_head_")]


def _draw(comparison: dict[str, Any], picture: Path) -> None:
    """Draw the differences to uniform weights, one point per seed."""
    # matplotlib writes a font cache on first import; a command that fails its checks writes nothing.
    from mtp_ce.training.report.plot import open_figure

    if "course" in comparison:
        figure = open_figure((10, 1.6 + 0.32 * len(comparison["results"])))
        panels = figure.subplots(1, 2, squeeze=False, width_ratios=(1.2, 1))[0]
        draw_arms(comparison, panels[0])
        draw_course(comparison, panels[1])
    else:
        figure = open_figure((4.6 * len(_sides(comparison)), 4.2))
        _draw_heads(comparison, figure)
    figure.savefig(picture)


def _draw_heads(comparison: dict[str, Any], figure: Figure) -> None:
    """Draw the arms side by side for each head, a panel for each kind of held-out files."""
    from mtp_ce.training.report.plot import COLOURS, head_ticks

    baseline, *arms = comparison["results"]
    sides, heads = _sides(comparison), len(_head_metrics(comparison))
    panels = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    apart = min(0.22, 0.9 / len(arms))
    for side, axes in zip(sides, panels, strict=True):
        for index, (arm, colour) in enumerate(zip(arms, cycle(COLOURS), strict=False)):
            x = [h + (index - (len(arms) - 1) / 2) * apart for h in range(heads)]
            points = [differences(comparison, arm, f"{side}/ce_head_{h}") for h in range(heads)]
            for at, values in zip(x, points, strict=True):
                axes.plot([at] * len(values), values, "o", color=colour, markersize=4, alpha=0.5)
            means = [statistics.fmean(values) if values else math.nan for values in points]
            axes.plot(x, means, "_", color=colour, markersize=min(16, 96 / heads), markeredgewidth=2.5, label=arm)
        axes.axhline(0, color="black", linewidth=1)
        head_ticks(axes, range(heads), heads)
        axes.set_title(f"{'all' if side == 'val' else side} held-out files", loc="left")
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"CE minus that of {baseline} weights [nats]\nbelow 0: better")
    panels[-1].legend(frameon=False, title=f"bar: mean of {len(comparison['seeds'])} seeds")


def draw_arms(comparison: dict[str, Any], axes: Axes) -> None:
    """Draw what every arm gains over uniform weights at the first and the last head, one point per seed.

    Args:
        comparison: the content of comparison.json.
        axes: one line for each arm.
    """
    from mtp_ce.training.report.plot import COLOURS

    baseline, *arms = comparison["results"]
    metrics = _head_metrics(comparison)
    shown = {0: COLOURS[0], len(metrics) - 1: COLOURS[1]}
    for h, colour in shown.items():
        for y, arm in enumerate(arms):
            values = differences(comparison, arm, metrics[h])
            at = y + (0.16 if h else -0.16) * (len(shown) > 1)
            axes.plot(values, [at] * len(values), "o", color=colour, markersize=3, alpha=0.5)
            axes.plot(statistics.fmean(values), at, "|", color=colour, markersize=10, markeredgewidth=2.5)
        axes.plot([], [], "|", color=colour, markersize=10, markeredgewidth=2.5, label=f"head {h}")
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.set_xlabel(f"CE minus that of {baseline} weights [nats], left of 0: better")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")


def draw_course(comparison: dict[str, Any], axes: Axes) -> None:
    """Draw the share of the weight on noise over the steps: the mean over the seeds, and their range.

    Args:
        comparison: the content of comparison.json, of a corpus with planted noise.
        axes: for one line per arm whose weights differ.
    """
    from mtp_ce.training.report.plot import COLOURS

    baseline, *arms = [arm for arm in comparison["course"] if arm != FILTERED]
    colours = {baseline: "black", **dict(zip(arms, cycle(COLOURS), strict=False))}
    for index, (arm, colour) in enumerate(colours.items()):
        courses = comparison["course"][arm]
        shares = list(zip(*(course[WEIGHT_SHARE] for course in courses), strict=True))
        style = "-" if index <= len(COLOURS) else "--"
        axes.plot(courses[0]["step"], list(map(statistics.fmean, shares)), style, color=colour, label=arm)
        axes.fill_between(
            courses[0]["step"], list(map(min, shares)), list(map(max, shares)), color=colour, alpha=0.12, linewidth=0
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("share of the weight on noise")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def spread(values: list[float], sign: str = "") -> str:
    """Format the mean of one number for each seed, with their standard deviation."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.3f}{deviation}"
