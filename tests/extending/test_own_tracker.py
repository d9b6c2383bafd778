"""A tracker from outside the package: one file, named in the recipe as docs/tracking.md says."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

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
    "no module": (["tracking.kind=my_missing:Tracker"], "tracking.kind is 'my_missing:Tracker', which can't be loaded"),
    "no class": (
        ["tracking.kind=my_trackers:Missing"],
        "tracking.kind is 'my_trackers:Missing', which can't be loaded",
    ),
    "no class path": (["tracking.kind=my_trackers"], "expected one of 'mlflow', 'none', or a class of your own as"),
    "missing option": (OWN, "does not accept tracking.options (TypeError: "),
    "unknown option": ([*OWN, "tracking.options={path: a, colour: red}"], "unexpected keyword argument 'colour'"),
    "option of a tracker that has none": (["tracking.kind=none", "tracking.options.path=a"], "tracking.kind 'none'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_tracker_that_can_not_be_built_is_one_line_and_nothing_is_written(
    my_trackers, train, capsys, mistake, files_below
):
    overrides, expected = MISTAKES[mistake]
    before = files_below(my_trackers)
    assert train("data.corpus=texts", *overrides, "--output", "out") == 2
    printed, error = capsys.readouterr()
    assert (printed, error.count("\n")) == ("", 1)
    assert error.startswith("train-mtp: error: ")
    assert expected in error
    assert files_below(my_trackers) == before


BROKEN = """
from mtp_ce.training.tracking.none import NoTracker


class Broken(NoTracker):
    def __init__(self, config, *, method):
        super().__init__(config)
        setattr(self, method, self.fail)

    def fail(self, *_):
        raise RuntimeError("no answer from http://me:s3cr3t@host")
"""


@pytest.mark.parametrize("method", ["start", "child", "params", "log", "summary", "artifact", "finish", "where"])
def test_a_tracker_that_raises_is_one_warning_and_does_not_end_the_run(beside, train, capsys, method, metrics):
    (beside / "my_broken.py").write_text(BROKEN)
    own = ["tracking.kind=my_broken:Broken", f"tracking.options.method={method}"]
    assert train(*own, "data.corpus=texts", "--output", "out") == 0
    printed = capsys.readouterr().out
    assert printed.count("warning: the tracker fails (RuntimeError: no answer from http://me:***@host)") == 1
    assert [line["step"] for line in metrics()[:3]] == [1, 2, 3]
