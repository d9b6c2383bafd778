"""A comparison where noise is planted: who finds it, and what is reported of it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from rich.console import Console

from mtp_ce.training.report.comparison import COURSE, arms_table, comparison_table
from mtp_ce.training.run import compare as module
from mtp_ce.training.run.compare import compare

ROOT = Path(__file__).resolve().parents[3]
TOKENS, WEIGHT, ESS, CLEAN = COURSE
SCORED = ["rho1_excess", "rho1_excess-topk", "rho1_excess-sequence"]
ARMS = ["uniform", *SCORED, "shuffled", "random_matched", "planted_truth", "filtered"]
SHORT = [
    # Of seven documents this seed chooses two, which hold about a third of the text.
    "data.noise={kind: documents, share: 0.4, seed: 3}",
    "scorer.scope=batch",
    "reference.documents=all",
    "reference.train.steps=60",
    "reference.train.batch_size=8",
    "train.steps=40",
    "train.log_every=10",
    "validation.rows=4",
    "validation.decoding.prompts=0",
]


@pytest.fixture(scope="module")
def compared(rho1, tmp_path_factory):
    """Documents of noise, one seed; and the output folder."""
    output = tmp_path_factory.mktemp("planted") / "out"
    return compare(rho1(SHORT), output, 1, Console(quiet=True)), output


def test_excess_loss_takes_weight_from_noise_and_its_control_does_not(compared):
    """In scope batch; in scope sequence a document that is all noise keeps its whole weight.

    `shuffled` permutes within a document, which so keeps the little weight that scope batch gave it: of whole documents
    `random_matched` is the control.
    """
    found, _ = compared
    assert list(found["results"]) == ARMS
    share = {arm: found["results"][arm][0][WEIGHT] / found["results"][arm][0][TOKENS] for arm in ARMS[:-1]}
    assert share["rho1_excess"] < 0.9
    assert share["rho1_excess-topk"] < 0.9
    for arm in ("uniform", "rho1_excess-sequence"):
        assert share[arm] == pytest.approx(1, abs=0.02), arm
    assert share["random_matched"] == pytest.approx(1, abs=0.1)
    assert share["shuffled"] == pytest.approx(share["rho1_excess"], abs=0.1)
    assert found["results"]["uniform"][0][TOKENS] > 0.2, "enough noise to be found"
    assert share["planted_truth"] < 0.05, "a batch that is all noise has weights, too"


def test_documents_of_noise_are_filtered_by_the_loss_of_the_reference(compared):
    found, _ = compared
    assert found["results"]["filtered"][0][TOKENS] < 0.5 * found["results"]["uniform"][0][TOKENS]


def test_the_course_and_its_mean_over_all_steps_are_in_the_results(compared):
    found, output = compared
    for arm in ARMS:
        (course,), (result,) = found["course"][arm], found["results"][arm]
        assert course["step"] == [1, 10, 20, 30, 40]
        lines = [json.loads(line) for line in (output / f"{arm}-seed0" / "metrics.jsonl").read_text().splitlines()]
        shown = [line[WEIGHT] for line in lines if WEIGHT in line]
        assert course[WEIGHT] == pytest.approx(shown, abs=1e-4)
        mean = (shown[0] + 9 * shown[1] + 10 * sum(shown[2:])) / 40
        assert result[WEIGHT] == pytest.approx(mean)
        assert result[CLEAN] <= result[ESS] + 0.02, "the first tokens of documents count in the second alone"
    assert json.loads((output / "comparison.json").read_text()) == found
    assert comparison_table(found).startswith(arms_table(found))


def test_the_table_has_a_line_for_each_arm(compared):
    found, output = compared
    table = (output / "comparison.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    assert lines[0] == [
        "held-out CE in nats",
        "head 0",
        "head 1",
        "head 2",
        "noise in tokens",
        "in weight",
        "clean sample",
    ]
    assert [line[0] for line in lines[2:]] == ["uniform", *(f"{arm} - uniform" for arm in ARMS[1:])]
    uniform, ours = (found["results"][arm][0] for arm in ("uniform", "rho1_excess"))
    assert lines[2][1] == f"{uniform['val/ce_head_0']:.3f}"
    assert lines[3][2] == f"{ours['val/ce_head_1'] - uniform['val/ce_head_1']:+.3f}"
    assert lines[3][4:] == [f"{ours[metric]:.3f}" for metric in (TOKENS, WEIGHT, CLEAN)]


def test_no_arm_is_trained_twice(compared, rho1, tmp_path, monkeypatch):
    found, _ = compared
    monkeypatch.setattr(module, "fit", None)
    monkeypatch.setattr(module, "best_predicted", None)
    again = compare(rho1(SHORT), tmp_path / "again", 1, Console(quiet=True))
    assert again["results"] == found["results"]
    assert again["course"] == found["course"]


@pytest.mark.slow
def test_the_study_of_all_kinds_in_two_minutes(monkeypatch):
    """The study as documented, with a few steps; copies are told apart only once they are learned by heart."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    study = importlib.import_module("planted_study")
    monkeypatch.setattr(study.torch, "set_num_threads", lambda threads: None)
    few = [
        *("train.steps=8", "optimizer.warmup_steps=4", "train.log_every=4", "reference.train.steps=100"),
        "validation.rows=16",
    ]
    results = {}
    for noise in ("documents", "spans", "duplicates"):
        arms = ARMS if noise == "documents" else ["uniform", "rho1_excess", "random_matched"]
        whole = study.STUDIES[noise]
        small = whole._replace(overrides=[*whole.overrides, *few], seeds=1, only=arms)
        monkeypatch.setitem(study.STUDIES, noise, small)
        found = results[noise] = study.run(noise)
        assert list(found["results"]) == arms
        (ours,) = found["results"]["rho1_excess"]
        assert 0.2 < ours[TOKENS] < 0.7
        if noise != "duplicates":
            assert ours[WEIGHT] < ours[TOKENS]
            assert list(found["quarters"]) == ["reference", *arms]
            (reference,) = found["quarters"]["reference"]
            assert reference == sorted(reference)
    assert study.tables(results).count("| uniform |") == 5, "three comparisons, two of them in quarters"
    assert study.summary(results).count("\n") == 1 + len(results)
