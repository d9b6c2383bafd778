"""Two plots of a run: cross entropy of every head over the steps, and the evaluation of the trained heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mtp_ce.training.metrics.evaluation import Evaluation

# The colour-blind safe palette of Okabe and Ito, without its black, which is the reference line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")


def open_figure(inches: tuple[float, float]) -> Figure:
    """Return an empty figure that can be saved; without pyplot there is no global state and no window system."""
    figure = Figure(figsize=inches, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_losses(metrics: Path, picture: Path, title: str, unigram: float) -> None:
    """Draw training as lines, validation as points, and the unigram entropy as a horizontal line.

    Args:
        metrics: the run's metrics.jsonl.
        picture: PNG file to write.
        title: title of the figure.
        unigram: cross entropy of the held-out tokens under the training tokens' frequencies, nats.
    """
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = open_figure((8.5, 5.0))
    axes = figure.subplots()
    handles = []
    for h in range(sum(name.startswith("train/ce_head_") for name in lines[0])):
        colour = COLOURS[h % len(COLOURS)]
        steps, ce = _series(lines, f"train/ce_head_{h}")
        axes.plot(steps, ce, color=colour, linewidth=1.3, alpha=0.85)
        steps, ce = _series(lines, f"val/ce_head_{h}")
        axes.plot(
            *(steps, ce),
            "o",
            color=colour,
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=1.2,
            zorder=3,
        )
        last = f"   {ce[-1]:.2f}" if ce else ""
        handles.append(Line2D([], [], color=colour, marker="o", label=f"head {h} (token +{h + 1}){last}"))
    axes.axhline(unigram, color="black", linestyle="--", linewidth=1)
    handles.append(Line2D([], [], color="black", linestyle="--", label=f"unigram entropy   {unigram:.2f}"))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross entropy [nats per token]")
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(left=0)
    axes.legend(handles=handles, title="line: training, point: held-out files (last value)", frameon=False)
    figure.savefig(picture)


def draw_evaluation(evaluation: Evaluation, picture: Path, title: str) -> None:
    """Draw the cross entropy of every head, and the acceptance of their drafts.

    Args:
        evaluation: results to draw.
        picture: PNG file to write.
        title: title of the figure.
    """
    heads = evaluation.heads
    figure = open_figure((8.5, 4.2))
    left, right = figure.subplots(1, 2)
    names = [f"head {h}\n+{h + 1}" for h in range(len(heads))]
    bars = left.bar(names, [head.ce for head in heads], color=[COLOURS[h % len(COLOURS)] for h in range(len(heads))])
    left.bar_label(bars, fmt="%.2f", label_type="center", color="white", fontweight="bold")
    if evaluation.before:
        before = [head.ce for head in evaluation.before]
        left.plot(names, before, "_", color="black", markersize=22, markeredgewidth=1.5, label="before training")
    left.axhline(evaluation.unigram, color="black", linestyle="--", linewidth=1, label="unigram entropy")
    left.set_ylabel("cross entropy [nats per token]")
    right.set_ylabel("ratio of drafts")
    right.set_ylim(0, 1)
    agrees = [head.agrees for head in heads[1:]]
    if agrees and None not in agrees:
        right.plot(names[1:], agrees, "o-", color=COLOURS[0], label="agree with head 0 on held-out text")
        if evaluation.decoding:
            right.plot(names[1:], evaluation.decoding.kept, "s--", color=COLOURS[1], label="accepted in decoding")
        right.margins(x=0.15)
    else:
        right.text(0.5, 0.5, "no heads that draft", ha="center", transform=right.transAxes)
        right.set_xticks([])
    for axes in (left, right):
        axes.grid(alpha=0.25, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(picture)


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]
