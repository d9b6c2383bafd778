"""One picture of a run: the cross entropy of every head over the steps, read from metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Okabe and Ito's palette, told apart by colour-blind eyes too; its black is kept for the reference line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")


def open_figure(inches: tuple[float, float]) -> Figure:
    """Give an empty figure that can be saved; no pyplot: no global state, and no window system is ever asked for."""
    figure = Figure(figsize=inches, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_losses(metrics: Path, picture: Path, title: str, unigram: float) -> None:
    """Draw training as lines, validation as points, and the unigram entropy as a level to be beaten.

    Args:
        metrics: the run's metrics.jsonl.
        picture: PNG file to write.
        title: what stands above it.
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


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]
