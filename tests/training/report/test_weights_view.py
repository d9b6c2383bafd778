"""Seeing the weights: every token once with its colour, exact text, one page and one picture without other files."""

from __future__ import annotations

import math
import random
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.image import imread

from mtp_ce.training.data.tokenizer import END_OF_TEXT, train_tokenizer
from mtp_ce.training.report.weights_passage import SCALE, Passage, token_texts, weight_norm
from mtp_ce.training.report.weights_plot import draw_weights
from mtp_ce.training.report.weights_view import write_page

NAN = math.nan
HOSTILE = [
    END_OF_TEXT,
    "<b>&amp;",
    "</script>",
    "",
    "家",
    "\"'",
    "\n\n    ",
    "\t",
    "\r\n",
    "$x$",
    "http://a",
    "\x00",
    "🏠",
]
HOSTILE_WEIGHTS = [NAN, 0.0, 0.5, 0.9, 1.0, 1.1, 1.5, 2.0, 2.5, 3.0, 3.5, 0.1, 4.0]


LOSSES = {"score": "nats", "ce": "nats"}


def passage(texts=HOSTILE, weights=HOSTILE_WEIGHTS, title="a<b>.py", units=LOSSES, **details) -> Passage:
    return Passage(title, texts, weights, details, units=units)


class Page(HTMLParser):
    """Reads a page back: every tag with its attributes, and text and attributes of every token of the passages."""

    def __init__(self, passages: list[Passage], folder: Path):
        super().__init__()
        write_page(passages, folder / "page.html", title="weights & <more>", scorer="rho1_<excess>")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._within = False
        # Bytes, because reading as text would make every carriage return a newline.
        self.feed((folder / "page.html").read_bytes().decode())
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._within |= tag == "pre"
        if self._within and tag == "span":
            self.tokens.append(("", dict(attrs)))

    def handle_endtag(self, tag):
        self._within &= tag != "pre"

    def handle_data(self, data):
        self.text += data
        if self._within:
            text, attrs = self.tokens.pop()
            self.tokens.append((text + data, attrs))


def opacity(attrs: dict[str, str | None]) -> float:
    return to_rgba((attrs["style"] or "").removeprefix("background:"))[3]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x + 1\n" * 20], 270)


def test_joined_texts_are_the_decoded_text_and_a_cut_character_belongs_to_its_last_token(tokenizer):
    text = "\tΩ = 'Käse 家'  # 🏠\r\n\x00 � return  x\n\n"
    ids = [0, *tokenizer(text, add_special_tokens=False)["input_ids"], 0]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == END_OF_TEXT + text + END_OF_TEXT == tokenizer.decode(ids)
    place = texts.index("🏠")
    assert texts[place - 3 : place] == ["", "", ""]


def test_joined_texts_are_the_decoded_text_also_of_tokens_in_any_order_and_of_none(tokenizer):
    dice = random.Random(0)
    for length in range(40):
        ids = [dice.randrange(270) for _ in range(length)]
        texts = token_texts(tokenizer, ids)
        assert len(texts) == length
        assert "".join(texts) == tokenizer.decode(ids)


def test_a_passage_that_ends_within_a_character_loses_nothing(tokenizer):
    ids = tokenizer("x🏠", add_special_tokens=False)["input_ids"][:-1]
    assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids) == "x�"


def test_the_page_has_every_token_once_and_in_order_and_escaped(tmp_path):
    page = Page([passage(), passage(["a", "b\n"], [1.0, 2.0])], tmp_path)
    assert [text for text, _ in page.tokens] == [*HOSTILE, "a", "b\n"]
    assert not {"b", "script"} & {tag for tag, _ in page.tags}
    assert "weights & <more>" in page.text
    assert "rho1_<excess>" in page.text
    assert "a<b>.py" in page.text


def test_every_token_has_something_to_point_at(tmp_path):
    texts = ["", "\n", "\r", "\x0c", "\x00", "\u202e", "x", " "]
    page = Page([passage(texts, [1.0] * len(texts))], tmp_path)
    assert [text for text, _ in page.tokens] == texts
    marks = [attrs["data-mark"] for tag, attrs in page.tags if tag == "i"]
    assert marks[-6:] == ["·", "↵", "□", "□", "□", "□"]


def test_the_page_refers_to_nothing_outside_itself(tmp_path):
    page = Page([passage()], tmp_path)
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    names = {attrs.get("id") for _, attrs in page.tags}
    for _, attrs in page.tags:
        assert not {"src", "srcset", "http-equiv"} & attrs.keys()
        if "href" in attrs:
            assert attrs["href"][0] == "#"
            assert attrs["href"][1:] in names
        assert "url(" not in (attrs.get("style") or "")
    style = (tmp_path / "page.html").read_text().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_a_token_tells_its_text_weight_and_details_with_their_unit(tmp_path):
    texts, weights = ['"\n', "", "z"], [1.25, 0.5, NAN]
    losses = passage(texts, weights, score=[0.5, -0.25, NAN], ce=[2.0, 1.0, NAN])
    values = passage(texts, weights, units={}, score=[0.5, -0.25, NAN], value=[2.0, 1.0, NAN])
    titles = [attrs["title"] for _, attrs in Page([losses, values], tmp_path).tokens]
    assert titles[0] == "'\"\\n'\nweight: 1.250\nscore: 0.500 nats\nce: 2.000 nats"
    assert titles[1] == "part of a character\nweight: 0.500\nscore: -0.250 nats\nce: 1.000 nats"
    assert titles[2] == "'z'\nweight: none\nscore: none\nce: none"
    assert titles[3] == "'\"\\n'\nweight: 1.250\nscore: 0.500\nvalue: 2.000"


def test_the_highest_weight_has_the_strongest_colour_and_1_has_none(tmp_path):
    weights = [1.0, 1.2, 2.5, 1.7, 5.0]
    page = Page([passage(list("abcde"), weights)], tmp_path)
    strengths = [opacity(attrs) for _, attrs in page.tokens]
    assert np.argsort(strengths).tolist() == np.argsort(weights).tolist()
    assert strengths[0] < 0.01
    assert strengths[4] == pytest.approx(0.8, abs=0.01)


def test_weights_below_and_above_1_have_different_hues_and_equal_distances_equal_strength():
    norm = weight_norm([passage(["a"], [3.0])])
    (*blue, below), (*orange, above) = SCALE(norm(0.5)), SCALE(norm(2.0))
    assert blue[2] > blue[0]
    assert orange[0] > orange[2]
    assert below == pytest.approx(above, abs=0.01)


def test_weights_that_differ_from_1_by_rounding_have_next_to_no_colour(tmp_path):
    page = Page([passage(["a", "b"], [1 - 1e-6, 1 + 1e-6])], tmp_path)
    assert max(opacity(attrs) for _, attrs in page.tokens) < 0.01


@pytest.mark.parametrize(("paper", "ink"), [("#ffffff", "#111111"), ("#16181c", "#f4f4f4")])
def test_text_is_legible_on_every_colour_in_light_and_dark(paper, ink, tmp_path):
    """A contrast of 4.5 by WCAG 2.2."""

    def luminance(rgb) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    for red, green, blue, alpha in SCALE(np.linspace(0, 1, 64)):
        ground = alpha * np.array([red, green, blue]) + (1 - alpha) * np.array(to_rgb(paper))
        low, high = sorted([luminance(ground), luminance(to_rgb(ink))])
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_tokens_without_a_weight_have_no_colour_and_leave_the_summary(tmp_path):
    page = Page([passage(["a", "b", "c"], [NAN, 0.5, 1.5]), passage(["x"], [NAN])], tmp_path)
    assert ["style" in attrs for _, attrs in page.tokens] == [False, True, True, False]
    assert "3 tokens, 2 with a weight; mean weight 1.000; effective sample size 2 tokens (80%)" in page.text
    assert "1 tokens, 0 with a weight" in page.text


def test_the_list_holds_the_ten_highest_weights_and_scores_decide_among_clipped_ones(tmp_path):
    texts = [f"t{i} " for i in range(30)]
    weights = [NAN, *[0.5] * 14, *[3.0] * 15]
    page = Page([passage(texts, weights, score=[NAN, *map(float, range(29))])], tmp_path)
    assert [attrs["href"] for tag, attrs in page.tags if tag == "a"] == [f"#p0t{i}" for i in range(29, 19, -1)]


def draw(passages: list[Passage], folder: Path) -> np.ndarray:
    """Draw without any warning, and read the picture back."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_weights(passages, folder / "picture.png", title="weights of 家 $x$", scorer="rho1 🏠")
    return imread(folder / "picture.png")


def test_the_picture_has_many_colours_and_takes_any_character(tmp_path):
    picture = draw(
        [passage([*HOSTILE, "é", "e\u0301", "\u202e", "x" * 300], [*HOSTILE_WEIGHTS, 1.0, 2.0, 3.0, 4.0])], tmp_path
    )
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 100


def test_the_picture_shows_blue_for_low_weights_orange_for_high_ones_and_white_for_none(tmp_path):
    for weight, brighter in ((0.0, 2), (3.0, 0)):
        # The scale at the top right has every colour; what lies below it is text alone.
        below = draw([passage([" " * 50], [weight])], tmp_path)[100:, :, :3]
        coloured = below[np.ptp(below, axis=2) > 0.3]
        assert len(coloured) > 1000
        assert (coloured.argmax(axis=1) == brighter).all()
    below = draw([passage([" " * 50], [NAN])], tmp_path)[100:, :, :3]
    assert np.ptp(below, axis=2).max() < 0.1


def test_the_picture_stays_small_however_long_the_text(tmp_path):
    longest = draw([passage(["line\n"] * 60, [1.0] * 60)], tmp_path).shape[0]
    assert draw([passage(["line\n"] * 500, [1.0] * 500)], tmp_path).shape[0] == longest
    assert draw([passage(["x\n"] * 50, [1.0] * 50)] * 30, tmp_path).shape[0] < 2 * longest


def test_no_details_no_text_and_no_passages_work(tmp_path):
    for passages in ([passage()], [passage([], [])], []):
        Page(passages, tmp_path)
        assert draw(passages, tmp_path).size > 0


def test_lengths_that_differ_are_an_error_that_names_the_field():
    with pytest.raises(ValueError, match=r"^weights of passage 'a<b>.py' has 1 numbers; expected .* 2 texts"):
        passage(["a", "b"], [1.0])
    with pytest.raises(ValueError, match=r"^reference_ce of passage .* has 3 numbers"):
        passage(["a", "b"], [1.0, 1.0], ce=[1.0, 1.0], reference_ce=[1.0] * 3)
