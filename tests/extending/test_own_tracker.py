"""A tracker from outside the package: one file, named in the recipe as docs/tracking.md says."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from mtp_ce.training.config.recipe import load_recipe
from mtp_ce.training.tracking.composite import Tracking, describe_tracking

OWN = ["tracking.kind=my_trackers:CsvTracker", "data.corpus=texts"]


@pytest.fixture
def my_trackers(beside: Path, module_of_page) -> Path:
    """The module of the page, importable."""
    (beside / "my_trackers.py").write_text(module_of_page("tracking.md", "my_trackers.py"))
    return beside


def test_a_tracker_of_ones_own_receives_the_metrics_and_the_final_status(my_trackers, train, metrics):
    assert train(*OWN, "tracking.options.path=all.csv", "--output", "out") == 0
    with open("all.csv", newline="") as file:
        rows = list(csv.reader(file))
    losses = [(int(step), float(value)) for run, step, name, value in rows if (run, name) == ("main", "train/loss")]
    assert losses == [(line["step"], line["train/loss"]) for line in metrics()[:3]]
    assert [step for step, _ in losses] == [1, 2, 3]
    assert rows[-2:] == [["main", "", "status", "FINISHED"], ["out", "", "status", "FINISHED"]]


def test_a_dry_run_says_where_the_run_could_be_viewed_and_writes_nothing(my_trackers, train, capsys, files_below):
    before = files_below(my_trackers)
    assert train(*OWN, "tracking.options.path=all.csv", "--dry-run") == 0
    assert "tracking    all.csv" in capsys.readouterr().out
    assert files_below(my_trackers) == before


MISTAKES = {
    "no module": (["tracking.kind=my_missing:Tracker"], "'my_missing:Tracker', which can't be loaded"),
    "no class": (["tracking.kind=my_trackers:Missing"], "'my_trackers:Missing', which can't be loaded"),
    "no class path": (["tracking.kind=my_trackers"], "expected one of 'mlflow', 'none', or a class of your own as"),
    "missing option": (OWN, "does not accept tracking.options (TypeError: "),
    "unknown option": ([*OWN, "tracking.options={path: a, colour: red}"], "unexpected keyword argument 'colour'"),
    "option of a tracker that has none": (["tracking.kind=none", "tracking.options.path=a"], "tracking.kind 'none'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_tracker_that_can_not_be_built_costs_one_line(my_trackers, train, capsys, files_below, mistake):
    overrides, expected = MISTAKES[mistake]
    before = files_below(my_trackers)
    assert train("data.corpus=texts", *overrides, "--output", "out") == 2
    printed, error = capsys.readouterr()
    assert (printed, error.count("\n")) == ("", 1)
    assert error.startswith("train-mtp: error: ")
    assert expected in error
    assert files_below(my_trackers) == before


BROKEN = """
class Broken:
    def __init__(self, config):
        pass

    def fail(self, *_):
        raise RuntimeError("no answer from http://me:s3cr3t@host")

    where = check = start = child = params = log = summary = tags = artifact = finish = fail
"""


def test_a_tracker_that_raises_costs_one_warning_and_does_not_end_the_run(beside, train, capsys, metrics):
    (beside / "my_broken.py").write_text(BROKEN)
    assert train("tracking.kind=my_broken:Broken", "data.corpus=texts", "--output", "out") == 0
    printed = capsys.readouterr().out
    assert printed.count("warning: the tracker fails (RuntimeError: no answer from http://***@host)") == 1
    assert "s3cr3t" not in printed
    assert [line["step"] for line in metrics()[:3]] == [1, 2, 3]


def test_no_method_of_a_tracker_that_raises_ends_a_run(beside):
    (beside / "my_broken.py").write_text(BROKEN)
    recipe = load_recipe("tiny", ["tracking.kind=my_broken:Broken"])
    warnings: list[str] = []
    with Tracking(recipe, beside, warnings.append) as run:
        run.log(1, {"train/loss": 2.0})
        run.summary(1, {"train/loss": 2.0})
        run.tags({"a": "b"})
        run.artifact(beside / "texts")
        assert run.where == "metrics.jsonl"
    assert len(warnings) == 1
    assert "can't be checked (RuntimeError" in describe_tracking(recipe.tracking)
