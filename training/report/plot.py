"""Two plots of a run: cross entropy of every head over the steps, and the evaluation of the trained heads."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mtp_ce.training.console import number
from mtp_ce.training.metrics.evaluation import Evaluation

# The colour-blind safe palette of Okabe and Ito, without its black, which is the reference line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")

# Heads whose names and values fit below and into their bars; those of more heads are shortened and turned.
_WIDE = 6


def open_figure(inches: tuple[float, float]) -> Figure:
    """Return an empty figure that can be saved; without pyplot there is no global state and no window system."""
    figure = Figure(figsize=inches, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def head_colours(heads: int) -> list[str]:
    """Return a colour for each head: the palette, or for more heads an ordered scale without its pale end."""
    if heads <= len(COLOURS):
        return list(COLOURS[:heads])
    scale = matplotlib.colormaps["viridis"]
    return [to_hex(scale(0.93 * h / (heads - 1))) for h in range(heads)]


def head_ticks(axes: Axes, at: Sequence[float], heads: int, first: int = 0) -> None:
    """Name the heads first..heads - 1 below an axis, and the token that each predicts."""
    if heads <= _WIDE:
        axes.set_xticks(at, [f"head {h}\n+{h + 1}" for h in range(first, heads)])
    else:
        axes.set_xticks(at, [str(h) for h in range(first, heads)])
        axes.set_xlabel("head h, which predicts token t + 1 + h")


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
    # The first line may be a validation before the first step.
    heads = len({name for line in lines for name in line if name.startswith("train/ce_head_")})
    for h, colour in enumerate(head_colours(heads)):
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
        last = f"   {number(ce[-1] if ce else None, '.2f')}"
        handles.append(Line2D([], [], color=colour, marker="o", label=f"head {h} (token +{h + 1}){last}"))
    axes.axhline(unigram, color="black", linestyle="--", linewidth=1)
    handles.append(Line2D([], [], color="black", linestyle="--", label=f"unigram entropy   {unigram:.2f}"))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross entropy [nats per token]")
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(left=0)
    about = {"handles": handles, "title": "line: training, point: held-out files (last value)", "frameon": False}
    if heads <= _WIDE:
        axes.legend(**about)
    else:  # a list this long would cover the lines
        figure.legend(**about, loc="outside right upper", fontsize="small", title_fontsize="small")
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
    x, colours = range(len(heads)), head_colours(len(heads))
    for h, head in enumerate(heads):
        # A head without a target in the held-out text has a dash and no bar.
        look: dict[str, Any] = {"ha": "center", "va": "center", "fontweight": "bold"}
        if head.ce is not None and len(heads) > _WIDE:
            look |= {"fontsize": "small", "rotation": 90}
        left.bar(h, head.ce or 0, color=colours[h])
        ink = "black" if head.ce is None else _ink(colours[h])
        left.text(
            h, (evaluation.unigram if head.ce is None else head.ce) / 2, number(head.ce, ".2f"), color=ink, **look
        )
    head_ticks(left, x, len(heads))
    if evaluation.before:
        before = _gaps([head.ce for head in evaluation.before])
        width = 22 if len(heads) <= _WIDE else 130 / len(heads)
        left.plot(x, before, "_", color="black", markersize=width, markeredgewidth=1.5, label="before training")
    left.axhline(evaluation.unigram, color="black", linestyle="--", linewidth=1, label="unigram entropy")
    left.set_ylabel("cross entropy [nats per token]")
    right.set_ylabel("ratio of drafts")
    right.set_ylim(0, 1)
    agrees = [head.agrees for head in heads[1:]]
    if any(agreed is not None for agreed in agrees):
        right.plot(x[1:], _gaps(agrees), "o-", color=COLOURS[0], label="agree with head 0 on held-out text")
        if evaluation.decoding:
            right.plot(x[1:], evaluation.decoding.kept, "s--", color=COLOURS[1], label="accepted in decoding")
        right.margins(x=0.15)
        head_ticks(right, x[1:], len(heads), first=1)
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


def _ink(colour: str) -> str:
    """Return black or white, whichever can be read on a colour: its luminance by ITU-R BT.709 decides."""
    red, green, blue = to_rgb(colour)
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5 else "white"


def _gaps(values: Sequence[float | None]) -> list[float]:
    """Return values that leave a gap where there is none."""
    return [math.nan if value is None else value for value in values]


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]
