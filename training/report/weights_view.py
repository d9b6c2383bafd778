"""An HTML page of text with every token coloured by its weight.

One file without scripts that needs no other file and no network. A token's numbers are in its title attribute.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import TwoSlopeNorm, to_hex

from mtp_ce.training.report.weights_passage import (
    NEWLINE,
    PART,
    SCALE,
    SHAPELESS,
    STOPS,
    Passage,
    scale_ticks,
    summary,
    weight_norm,
)

_HIGHEST = 10


def write_page(passages: Sequence[Passage], page: Path, *, title: str, scorer: str) -> None:
    """Write one self-contained HTML file: legend, passages, and the highest weights of each.

    Args:
        passages: the passages.
        page: HTML file to write.
        title: title of the page.
        scorer: name of the scorer.
    """
    norm = weight_norm(passages)
    ticks = "".join(f"<span>{tick:.3g}</span>" for tick in scale_ticks(norm))
    scale = ", ".join(f"{colour} {position:.0%}" for position, colour in STOPS)
    sections = "\n".join(_section(f"p{p}", passage, norm) for p, passage in enumerate(passages))
    page.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style></head>
<body>
<header><h1>{html.escape(title)}</h1>
<p>Scorer: {html.escape(scorer)}. Point at a token to read its numbers.</p>
<div class="scale" style="background: linear-gradient(to right, {scale})"></div>
<div class="ticks">{ticks}</div>
<p>Weight of a token in the loss; 1 has no colour, <span class="none">grey</span> has no weight.
{_mark(NEWLINE)} is a line's end, {_mark(PART)} a part of a character that a later token completes,
{_mark(SHAPELESS)} an invisible character.</p>
</header>
{sections}
</body></html>
""",
        encoding="utf-8",
    )


_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #111; --faint: #767676; --line: #ddd }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #f4f4f4; --faint: #8d929b; --line: #3a3e45 }
}
body { margin: 1.5rem auto; max-width: 76rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1.05rem; margin: 2rem 0 0; overflow-wrap: anywhere }
p { margin: .3rem 0 .6rem }
pre, code { font: 13px/1.55 "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre; tab-size: 4 }
pre { border: 1px solid var(--line); border-radius: 4px; padding: .7rem; margin: 0; overflow-x: auto }
/* A character that turns the direction of writing acts within its token alone. */
pre span { border-radius: 2px; box-decoration-break: clone; -webkit-box-decoration-break: clone; unicode-bidi: isolate }
pre span:hover, pre span:target { outline: 2px solid var(--ink) }
.none { color: var(--faint) }
/* Drawn, yet no part of the text: copied source stays exact. */
i::before { content: attr(data-mark); font-style: normal; opacity: .6 }
.scale { height: 1rem; max-width: 26rem; border: 1px solid var(--line); margin-top: .6rem }
.ticks { display: flex; justify-content: space-between; max-width: 26rem; font-size: .85rem }
.ticks span { display: flex; justify-content: center; width: 0 }
table { border-collapse: collapse; margin: .4rem 0; font-size: .85rem; display: block; overflow-x: auto }
th, td { text-align: right; padding: .1rem .8rem .1rem 0; font-weight: normal; font-variant-numeric: tabular-nums }
th { color: var(--faint) } th:last-child, td:last-child { text-align: left }
a { color: inherit } mark { color: inherit; border-radius: 2px }
"""


def _section(name: str, passage: Passage, norm: TwoSlopeNorm) -> str:
    tokens = "".join(_token(f"{name}t{i}", passage, i, norm) for i in range(len(passage.texts)))
    # A newline right after <pre> would be dropped; one inside a token is safe.
    return (
        f"<section><h2>{html.escape(passage.title)}</h2>\n<p>{summary(passage)}</p>\n<pre>{tokens}</pre>\n"
        f"{_highest(name, passage, norm)}</section>"
    )


def _token(anchor: str, passage: Passage, i: int, norm: TwoSlopeNorm) -> str:
    text, weight = passage.texts[i], passage.weights[i]
    units = passage.units
    numbers = [f"{name}: {_number(values[i], units.get(name, ''))}" for name, values in passage.details.items()]
    tip = "\n".join([repr(text) if text else "part of a character", f"weight: {_number(weight)}", *numbers])
    look = 'class="none"' if np.isnan(weight) else f'style="background:{_colour(weight, norm)}"'
    shown = "".join(map(_marked, text)) or _mark(PART)
    return f'<span id="{anchor}" {look} title="{_escape(tip)}">{shown}</span>'


def _highest(name: str, passage: Passage, norm: TwoSlopeNorm) -> str:
    """Return a table of the tokens with the highest weights; the score breaks ties of clipped weights."""
    weights = np.asarray(passage.weights, dtype=float)
    scores = np.asarray(passage.details.get("score", weights), dtype=float)
    order = [i for i in np.lexsort((-scores, -weights))[:_HIGHEST].tolist() if not np.isnan(weights[i])]
    units = {detail: passage.units.get(detail, "") for detail in passage.details}
    head = "".join(f"<th>{html.escape(detail)}{f' [{unit}]' if unit else ''}</th>" for detail, unit in units.items())
    rows = []
    for i in order:
        before, after = "".join(passage.texts[max(0, i - 40) : i])[-40:], "".join(passage.texts[i + 1 : i + 41])[:40]
        left, text, right = (_in_line(piece) for piece in (before.rjust(40), passage.texts[i], after))
        mark = f'<mark style="background:{_colour(weights[i], norm)}">{text or PART}</mark>'
        numbers = "".join(f"<td>{_number(passage.details[detail][i])}</td>" for detail in units)
        rows.append(
            f'<tr><td><a href="#{name}t{i}">{weights[i]:.3f}</a></td>{numbers}'
            f"<td><code>{left}{mark}{right}</code></td></tr>"
        )
    if not rows:
        return ""
    return (
        "<details open><summary>Highest weights</summary>\n"
        f"<table><tr><th>weight</th>{head}<th>in context</th></tr>\n" + "\n".join(rows) + "</table></details>"
    )


def _colour(weight: float, norm: TwoSlopeNorm) -> str:
    return to_hex(SCALE(norm(weight)), keep_alpha=True)


def _number(value: float, unit: str = "") -> str:
    return "none" if np.isnan(value) else f"{value:.3f} {unit}".rstrip()


def _in_line(text: str) -> str:
    text = text.replace("\n", NEWLINE).replace("\t", " ")
    return _escape("".join(c if c.isprintable() else SHAPELESS for c in text))


def _marked(character: str) -> str:
    """Prefix an invisible character with a mark."""
    if character.isprintable() or character == "\t":
        return _escape(character)
    return _mark(NEWLINE if character == "\n" else SHAPELESS) + _escape(character)


def _mark(sign: str) -> str:
    return f'<i data-mark="{sign}"></i>'


def _escape(text: str) -> str:
    # A browser reads a bare carriage return as a newline.
    return html.escape(text).replace("\r", "&#13;")
