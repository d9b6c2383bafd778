"""docs/tracking.md names every metric that a run records, and none that it does not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from mtp_ce.training.critic.loss import PairSums
from mtp_ce.training.metrics.noise import NoiseSums

PAGE = Path(__file__).resolve().parents[3] / "docs" / "tracking.md"


def documented() -> set[str]:
    """Every name of the table, `<h>` as it stands."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| `\w+/", line)]
    return {name for row in rows for name in re.findall(r"`(\w+/[\w<>]+)`", row.split("|")[1])}


def test_the_page_of_tracking_names_every_metric(finished_run, weighted_run):
    recorded: set[str] = set()
    for run in (finished_run, weighted_run):
        for file in run.folder.rglob("metrics.jsonl"):
            for line in file.read_text(encoding="utf-8").splitlines():
                recorded |= json.loads(line).keys() - {"step", "time"}
    # The stages of a critic and of weights that are made before training, and runs with noise, have these of their own.
    recorded |= PairSums().metrics("critic/").keys() | PairSums().metrics("critic/val_").keys()
    recorded |= NoiseSums.zeros(torch.device("cpu")).metrics().keys()
    recorded |= {"weights/mean", "weights/ess", "weights/neutral_ratio"}
    assert {re.sub(r"_head_\d+$", "_head_<h>", name) for name in recorded} == documented()
