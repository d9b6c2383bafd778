"""A picture of text in which each token's box has the colour of its weight."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import isnan
from pathlib import Path
from typing import Any
from unicodedata import combining

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font
from matplotlib.patches import Rectangle

from mtp_ce.training.report.weights_passage import (
    NEWLINE,
    PART,
    SCALE,
    SHAPELESS,
    Passage,
    scale_ticks,
    summary,
    weight_norm,
)

# Characters per line, maximum numbers of lines and passages, and sizes in points.
_COLUMNS, _LINES, _PASSAGES = 100, 60, 10
_FONT_SIZE, _LINE_HEIGHT = 9.0, 12.5
# The font that ships with matplotlib, so the picture is the same on every machine.
_MONO = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"
_CHARACTER_WIDTH = 0.602 * _FONT_SIZE
_GREY = "#767676"


def draw_weights(passages: Sequence[Passage], picture: Path, *, title: str, scorer: str) -> None:
    """Draw the first lines of the passages into a PNG, at most 60 lines in total.

    Args:
        passages: the passages.
        picture: PNG file to write.
        title: title of the picture.
        scorer: name of the scorer.
    """
    norm, shown = weight_norm(passages), passages[:_PASSAGES]
    limit = _LINES // max(1, len(shown))
    blocks = [_rows(passage) for passage in shown]
    # Around its text a passage has a title, a summary, a note on omitted lines, and some space.
    figure, axes = _sheet(sum(min(len(rows), limit) + 3.5 for rows in blocks) + 1, norm)
    _write_title(axes, -4.8, title, fontsize=12)
    _write(axes, 0, -3.2, f"scorer: {scorer}", color=_GREY)
    y = 0.0
    for passage, rows in zip(shown, blocks, strict=True):
        _write_title(axes, y, passage.title, fontsize=10.5)
        _write(axes, 0, y + 1, summary(passage), color=_GREY)
        y += 2
        for row in rows[:limit]:
            _draw_row(axes, y, row, passage, norm)
            y += 1
        if len(rows) > limit:
            _write(axes, 0, y, f"… {len(rows) - limit:,} more lines", color=_GREY)
        y += 1.5
    if len(passages) > len(shown):
        _write(axes, 0, y, f"… {len(passages) - len(shown):,} more passages", color=_GREY)
    figure.savefig(picture)


def _rows(passage: Passage) -> list[list[tuple[str, int, bool]]]:
    """Arrange a passage on a grid with wrapped lines: each character, its token, and whether it is a mark."""
    rows: list[list[tuple[str, int, bool]]] = [[]]
    for token, text in enumerate(passage.texts):
        for character in text or PART:
            shown = {"\t": " " * (4 - len(rows[-1]) % 4), "\n": NEWLINE}.get(character) or _drawable(character)
            # The mark of a newline may exceed the line width, so it needs no row of its own.
            if len(rows[-1]) >= _COLUMNS and character != "\n":
                rows.append([])
            rows[-1] += [(c, token, c != character or not text) for c in shown]
            if character == "\n":
                rows.append([])
    return rows if rows[-1] else rows[:-1]


def _drawable(text: str) -> str:
    """Replace characters that the font lacks or that have no width."""
    known = get_font(str(_MONO)).get_charmap()
    return "".join(c if c.isprintable() and not combining(c) and ord(c) in known else SHAPELESS for c in text)


def _sheet(height: float, norm: TwoSlopeNorm) -> tuple[Figure, Axes]:
    """Return white axes in units of characters and lines, with the colour scale below the title, on the right."""
    size = ((_COLUMNS + 6) * _CHARACTER_WIDTH / 72, (height + 5) * _LINE_HEIGHT / 72)
    # Without pyplot there is no global state and no window system.
    figure = Figure(figsize=size, dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-3, _COLUMNS + 3), ylim=(height, -5))
    axes.axis("off")
    bar = axes.inset_axes((_COLUMNS - 40, -3.2, 40, 1), transform=axes.transData)
    figure.colorbar(
        ScalarMappable(norm, SCALE), cax=bar, orientation="horizontal", ticks=scale_ticks(norm), format="%.3g"
    )
    bar.tick_params(labelsize=8)
    _write(axes, _COLUMNS - 41, -3.2, "weight", ha="right")
    return figure, axes


def _write_title(axes: Axes, y: float, text: str, fontsize: float) -> None:
    """Write one line of larger letters; the middle of a longer one is left out."""
    most = int(_COLUMNS * _FONT_SIZE / fontsize)
    if len(text) > most:
        text = f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"
    _write(axes, 0, y, text, fontsize=fontsize)


def _write(axes: Axes, x: float, y: float, text: str, **look: Any) -> None:
    look = {"fontsize": _FONT_SIZE, "font": _MONO, **look}
    # Dollar signs in source code would start a formula.
    axes.text(x, y + 0.75, _drawable(text), parse_math=False, **look)


def _draw_row(axes: Axes, y: float, row: list[tuple[str, int, bool]], passage: Passage, norm: TwoSlopeNorm) -> None:
    for (token, is_mark), columns in groupby(range(len(row)), key=lambda x: row[x][1:]):
        weight, first, *rest = passage.weights[token], *columns
        text = "".join(row[x][0] for x in (first, *rest))
        if not isnan(weight):
            box = Rectangle((first, y), len(text), 1, facecolor=SCALE(norm(weight)), edgecolor="white", linewidth=0.4)
            axes.add_patch(box)
        # Each token is positioned separately: pixel rounding of widths would accumulate along a line.
        if text.strip():
            blanks = len(text) - len(text.lstrip())
            look = {"color": _GREY if isnan(weight) else "black", "alpha": 0.6 if is_mark else 1.0}
            _write(axes, first + blanks, y, text.strip(), **look)
