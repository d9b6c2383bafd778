"""What is shown: a moving bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import math
import re
from io import StringIO

import pytest
from rich.console import Console

from mtp_ce.decoding.speculative import Speculation
from mtp_ce.training.console import Display
from mtp_ce.training.metrics.acceptance import Acceptance, AcceptanceResult
from mtp_ce.training.metrics.decoding import DecodingResult
from mtp_ce.training.metrics.evaluation import Evaluation
from mtp_ce.training.metrics.head_scores import HeadResult
from mtp_ce.training.report.evaluation import acceptance_table, print_evaluation, write_evaluation

METRICS = {
    "train/loss": 4.5,
    "train/ce_head_0": 4.25,
    "train/ce_head_1": 4.75,
    "perf/tokens_per_s": 12345.0,
}


def show(terminal: bool, width: int = 120, steps: int = 3) -> str:
    file = StringIO()
    console = Console(file=file, force_terminal=terminal, width=width)
    with Display(console, steps=steps) as display:
        for step in (1, 2, 3):
            display.tick()
            display.show(step, METRICS)
        display.show(3, {"val/ce_head_0": 4.125, "val/ce_head_1": 4.5})
        display.warn("something [odd] happened")
    return file.getvalue()


def test_a_head_without_a_target_is_a_dash_on_the_screen():
    file = StringIO()
    with Display(Console(file=file, width=120), steps=3) as display:
        display.show(1, {**METRICS, "train/loss": math.nan, "train/ce_head_1": math.nan})
        display.show(3, {"val/ce_head_0": 4.125, "val/ce_head_1": math.nan})
    first, second = file.getvalue().splitlines()
    assert first.startswith("step     1/3  loss -  CE 4.25 -  12,345 tokens/s")
    assert second == "step     3  validation  CE 4.12 - nats"


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


@pytest.mark.parametrize(("width", "steps"), [(40, 600), (40, 1_000_000), (60, 600), (24, 3)])
def test_a_narrow_terminal_keeps_the_step_count(width, steps):
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", show(terminal=True, width=width, steps=steps)).splitlines()
    last = [line for line in lines if "left" in line][-1].rsplit("\r", 1)[-1]
    assert f"3/{steps}" in last
    assert len(last) <= width


def head(ce: float, agrees: float | None) -> HeadResult:
    return HeadResult(ce=ce, top1=0.5, top5=0.75, agrees=agrees, rows=1200)


def table(evaluation: Evaluation) -> tuple[str, list[list[str]]]:
    """What is printed on 80 columns: the whole text, and its lines in words."""
    file = StringIO()
    print_evaluation(Console(file=file, width=80), evaluation)
    return file.getvalue(), [line.split() for line in file.getvalue().splitlines()]


def test_the_table_numbers_heads_from_0_and_puts_the_unigram_entropy_beside_them():
    text, rows = table(Evaluation([head(1.0, 1.0), head(2.0, 0.25)], unigram=6.5))
    assert ["head", "CE", "unigram", "perplexity", "top-1", "top-5", "agree"] in rows
    assert ["0", "(+1)", "1.000", "6.500", "2.7", "50.0%", "75.0%"] in rows
    assert ["1", "(+2)", "2.000", "6.500", "7.4", "50.0%", "75.0%", "25.0%"] in rows
    assert "held-out text: 1,200 tokens" in text
    assert "1.25 tokens per forward" in text


def test_the_table_of_a_trained_model_shows_the_values_before_and_the_acceptance():
    found = Speculation(forwards=60, rounds=58, tokens=80, offered=[50, 20], kept=[20, 2])
    decoding = DecodingResult(
        prompts=2, prompt_tokens=16, identical=2, speculation=found, plain_seconds=3.0, speculative_seconds=2.0
    )
    before = [head(1.0, 1.0), head(9.0, 0.0), head(9.5, 0.0)]
    heads = [head(1.0, 1.0), head(2.0, 0.5), head(3.0, 0.25)]
    text, rows = table(Evaluation(heads, 6.5, before, decoding))
    assert ["1", "(+2)", "9.000", "2.000", "6.500", "7.4", "50.0%", "75.0%", "50.0%", "40.0%"] in rows
    assert ["2", "(+3)", "9.500", "3.000", "6.500", "20.1", "50.0%", "75.0%", "25.0%", "4.0%"] in rows
    assert "80 new tokens: 1.33 tokens per forward (acceptance length 1.38), 1.50 times the speed" in text
    assert "identical text for 2 of 2 prompts" in text


def test_heads_that_can_not_draft_have_no_agreement():
    text, rows = table(Evaluation([head(1.0, 1.0), head(2.0, None)], unigram=6.5))
    assert ["1", "(+2)", "2.000", "6.500", "7.4", "50.0%", "75.0%"] in rows
    assert "tokens per forward" not in text


def test_a_head_without_a_target_is_a_dash_in_the_table_and_null_in_json(tmp_path):
    nothing = HeadResult(ce=None, top1=None, top5=None, agrees=None, rows=0)
    evaluation = Evaluation([head(1.0, 1.0), nothing], 6.5, [head(3.0, 1.0), nothing])
    text, rows = table(evaluation)
    assert ["0", "(+1)", "3.000", "1.000", "6.500", "2.7", "50.0%", "75.0%"] in rows
    assert ["1", "(+2)", "-", "-", "6.500", "-", "-", "-", "-"] in rows
    assert "tokens per forward" not in text
    stored, _ = write_evaluation(evaluation, tmp_path, "run")
    said = json.loads(stored.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    for found in (said["heads"][1], said["before"][1]):
        assert [found[name] for name in ("ce", "perplexity", "top1", "top5", "agrees")] == [None] * 5
    assert said["tokens_per_forward"] is None


ACCEPTED = AcceptanceResult(
    3, {"chat": Acceptance(1200, [800, 90, 4], 2048, 32), "code": Acceptance(9, [9, 7, 5], 30, 1)}
)


def test_what_an_engine_counts_is_a_row_for_every_domain_and_one_for_all():
    text, rows = table(Evaluation([head(1.0, 1.0), head(2.0, 0.25)], 6.5, acceptance=ACCEPTED))
    assert "in a serving engine, num_speculative_tokens=3" in " ".join(text.split())
    assert ["prompts", "tokens", "drafts", "accepted", "length"] in rows
    assert ["32", "chat", "2,048", "1,200", "800", "90", "4", "1.75"] in rows
    assert ["1", "code", "30", "9", "9", "7", "5", "3.33"] in rows
    assert ["33", "all", "2,078", "1,209", "809", "97", "9", "1.76"] in rows
    alone = AcceptanceResult(1, {"": Acceptance(0, [0], 1, 1)})
    _, rows = table(Evaluation([head(1.0, 1.0), head(2.0, 0.25)], 6.5, acceptance=alone))
    assert ["1", "all", "1", "0", "0", "-"] in rows


def test_on_a_narrow_terminal_no_count_of_an_engine_is_cut_off():
    file = StringIO()
    console = Console(file=file, width=40)
    many = AcceptanceResult(7, {"a domain of some length": Acceptance(1200, [800, 90, 40, 30, 20, 10, 9], 2048, 32)})
    console.print(acceptance_table(many))
    assert max(map(len, file.getvalue().splitlines())) <= 40
    assert "…" not in file.getvalue()
    for number in ("2,048", "1,200", "800", "90", "40", "30", "20", "10", "9"):
        assert number in file.getvalue().split()


def test_drafts_that_were_never_verified_have_no_acceptance(tmp_path):
    """As where the model ends every text with its first token."""
    found = Speculation(forwards=2, rounds=0, tokens=2, offered=[0, 0], kept=[0, 0])
    evaluation = Evaluation(
        [head(1.0, 1.0), head(2.0, 0.5), head(3.0, 0.25)], 6.5, None, DecodingResult(2, 16, 2, found, 1.0, 1.0)
    )
    _, rows = table(evaluation)
    assert ["1", "(+2)", "2.000", "6.500", "7.4", "50.0%", "75.0%", "50.0%", "-"] in rows
    stored, _ = write_evaluation(evaluation, tmp_path, "run")
    assert json.loads(stored.read_text())["decoding"]["acceptance"] == [None, None]
    assert math.isnan(evaluation.metrics()["decoding/kept_head_1"])
