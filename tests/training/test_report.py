"""What is shown: a moving bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from mtp_ce.training.report import Display, results_table
from mtp_ce.training.sums import HeadResult

METRICS = {
    "train/loss": 4.5,
    "train/ce_head_0": 4.25,
    "train/ce_head_1": 4.75,
    "perf/tokens_per_s": 12345.0,
}


def show(terminal: bool) -> str:
    file = StringIO()
    console = Console(file=file, force_terminal=terminal, width=120)
    with Display(console, steps=3) as display:
        for step in (1, 2, 3):
            display.tick()
            display.show(step, METRICS)
        display.show(3, {"val/ce_head_0": 4.125, "val/ce_head_1": 4.5})
        display.warn("something [odd] happened")
    return file.getvalue()


def test_without_a_terminal_every_line_of_metrics_is_one_plain_line():
    shown = show(terminal=False)
    lines = shown.splitlines()
    assert "\x1b" not in shown
    assert lines[0].startswith("step     1/3  loss 4.500  CE 4.25 4.75  12,345 tokens/s  0:00:0")
    assert lines[0].endswith(" left")
    assert lines[2].endswith("0:00:00 left")
    assert lines[3] == "step     3  validation  CE 4.12 4.50 nats"
    assert lines[4] == "warning: something [odd] happened"
    assert len(lines) == 5


def test_on_a_terminal_one_bar_shows_loss_heads_speed_and_time_left():
    shown = show(terminal=True)
    last = shown.rsplit("\r", 1)[-1]
    for words in ("3/3", "loss 4.500", "CE 4.25 4.75", "12,345 tokens/s", "left"):
        assert words in last
    assert "validation" in shown


def test_the_table_numbers_heads_from_0_and_puts_the_unigram_entropy_beside_them():
    file = StringIO()
    results = [HeadResult(ce=1.0, top1=0.5, rows=10), HeadResult(ce=2.0, top1=0.25, rows=9)]
    Console(file=file, width=120).print(results_table(results, unigram=6.5))
    assert "CE (nats)   unigram entropy (nats)   perplexity   top-1" in file.getvalue()
    rows = [line.split() for line in file.getvalue().splitlines()]
    assert ["0", "+1", "1.000", "6.500", "2.7", "50.0%"] in rows
    assert ["1", "+2", "2.000", "6.500", "7.4", "25.0%"] in rows


@pytest.mark.parametrize(("ce", "perplexity"), [(0.0, 1.0), (1e4, float("inf"))])
def test_perplexity_never_overflows(ce, perplexity):
    assert HeadResult(ce=ce, top1=0.0, rows=1).perplexity == perplexity
