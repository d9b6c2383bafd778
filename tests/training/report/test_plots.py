"""The plots of 1 to 16 heads: colours that differ, words that stand apart, gaps where there is nothing."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from mtp_ce.decoding.speculative import Speculation
from mtp_ce.training.metrics.decoding import DecodingResult
from mtp_ce.training.metrics.evaluation import Evaluation
from mtp_ce.training.metrics.head_scores import HeadResult
from mtp_ce.training.report import comparison, plot, weights_plot
from mtp_ce.training.report.weights_passage import Passage

NOTHING = HeadResult(None, None, None, None, 0)
HEADS = [1, 4, 7, 8, 16]


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Figures that were saved, in order."""
    figures = []
    usual = Figure.savefig

    def savefig(figure, *arguments, **options):
        usual(figure, *arguments, **options)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def boxes(figure: Figure, texts) -> list:
    """Where texts that show something are on the picture."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    return [text.get_window_extent(renderer) for text in texts if text.get_text() and text.get_visible()]


def assert_apart(figure: Figure, texts) -> None:
    placed = boxes(figure, texts)
    for one, other in pairwise(placed):
        assert not one.overlaps(other), (one, other)


def evaluation_of(heads: int, missing: int = 0) -> Evaluation:
    scores = [HeadResult(3 + h / 4, 0.5, 0.7, max(0.0, 1 - h / 10), 100) for h in range(heads - missing)]
    scores += [NOTHING] * missing
    before = [HeadResult(6.2 if h < heads - missing else None, 0.1, 0.2, 0.0, 100) for h in range(heads)]
    found = Speculation(forwards=60, rounds=58, tokens=80, offered=[50] * (heads - 1), kept=[20] * (heads - 1))
    return Evaluation(scores, 6.5, before, DecodingResult(2, 16, 2, found, 3.0, 2.0) if heads > 1 else None)


def test_every_head_has_a_colour_of_its_own_that_is_seen_on_white():
    for heads in range(1, 33):
        colours = plot.head_colours(heads)
        assert len({*colours}) == heads
        for colour in colours[:16]:
            red, green, blue = to_rgb(colour)
            assert 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.9
    assert plot.head_colours(4) == list(plot.COLOURS[:4]), "as in every picture so far"


@pytest.mark.parametrize("heads", HEADS)
def test_the_words_of_an_evaluation_stand_apart(heads, drawn, tmp_path):
    plot.draw_evaluation(evaluation_of(heads), tmp_path / "evaluation.png", "run: the heads on held-out text")
    (figure,) = drawn
    left, right = figure.axes
    for axes in (left, right):
        assert_apart(figure, axes.get_xticklabels())
        assert_apart(figure, axes.texts)
    assert len(left.get_xticklabels()) == heads
    assert [text.get_text() for text in left.texts] == [f"{3 + h / 4:.2f}" for h in range(heads)]


def test_heads_without_a_target_leave_a_gap_and_a_dash(drawn, tmp_path):
    plot.draw_evaluation(evaluation_of(4, missing=1), tmp_path / "evaluation.png", "run")
    left, right = drawn[0].axes
    assert [text.get_text() for text in left.texts] == ["3.00", "3.25", "3.50", "-"]
    assert [bar.get_height() for bar in left.patches][-1] == 0
    assert [math.isnan(y) for y in right.lines[0].get_ydata()] == [False, False, True]


def write_metrics(folder: Path, heads: int) -> Path:
    """A validation before the first step, three lines of training, one more; of many heads the last lacks a target."""
    last = heads - 1 if heads > 2 else heads
    lines = [{"step": 0, **{f"val/ce_head_{h}": 7.0 if h < last else None for h in range(heads)}}]
    lines += [
        {"step": step, **{f"train/ce_head_{h}": 7 - step / 9 + h / 5 if h < last else None for h in range(heads)}}
        for step in (1, 6, 12)
    ]
    lines += [{"step": 12, **{f"val/ce_head_{h}": 6 + h / 5 if h < last else None for h in range(heads)}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "metrics.jsonl"


@pytest.mark.parametrize("heads", HEADS)
def test_the_losses_of_all_heads_are_drawn_beside_their_legend(heads, drawn, tmp_path):
    plot.draw_losses(write_metrics(tmp_path, heads), tmp_path / "losses.png", "run: cross entropy of each head", 6.5)
    (figure,) = drawn
    (axes,) = figure.axes
    legend = axes.get_legend() or figure.legends[0]
    words = [text.get_text() for text in legend.get_texts()]
    assert len(words) == heads + 1
    assert words[-1].startswith("unigram entropy")
    assert words[heads - 1].endswith("   -" if heads > 2 else "6.00")
    assert len({line.get_color() for line in axes.lines}) == heads + 1, "and black for the unigram entropy"
    assert_apart(figure, legend.get_texts())
    if figure.legends:
        assert not legend.get_window_extent().overlaps(axes.get_window_extent()), "it covers no line"
    (canvas,) = [figure.bbox]
    assert canvas.x1 >= legend.get_window_extent().x1
    assert canvas.y1 >= legend.get_window_extent().y1
    assert legend.get_window_extent().y0 >= canvas.y0


def test_a_comparison_of_heads_without_a_target_has_dashes(drawn, tmp_path):
    def result(ce: float, heads: int = 8) -> dict[str, float | None]:
        return {f"val/ce_head_{h}": ce + h if h < heads - 1 else None for h in range(heads)}

    results = {"uniform": [result(3.0), result(3.5)], "rho1": [result(2.5), result(3.25)]}
    compared = {"seeds": [0, 1], "steps": 9, "results": results}
    table = comparison.comparison_table(compared).splitlines()
    assert table[2] == "| all | 0 | 3.250 ± 0.354 | -0.375 ± 0.177 |"
    assert table[9] == "| all | 7 | - | - |"
    comparison.write_comparison(compared, tmp_path)
    assert_apart(drawn[0], drawn[0].axes[0].get_xticklabels())


@pytest.mark.parametrize("name", ["a", "rho1-20261129T014953Z", "a run of a very long name " * 9])
def test_the_title_of_the_weights_is_clear_of_their_legend(name, drawn, tmp_path):
    passage = Passage(f"{name}.py", ["def", " f"], [1.5, 0.5], {})
    title = f"{name}: weights of held-out tokens"
    weights_plot.draw_weights([passage], tmp_path / "weights.png", title=title, scorer="rho1_excess")
    (figure,) = drawn
    axes = figure.axes[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    legend = [part.get_tightbbox(renderer) for part in axes.child_axes]
    legend += boxes(figure, [text for text in axes.texts if text.get_text() == "weight"])
    assert len(legend) == 2
    above = [text for text in axes.texts if text.get_text().endswith("tokens") and text.get_position()[1] < 0]
    above += [text for text in axes.texts if text.get_text().startswith("scorer")]
    assert len(above) == 2
    for box in boxes(figure, above):
        assert not any(box.overlaps(part) for part in legend)
    for box in boxes(figure, axes.texts):
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
