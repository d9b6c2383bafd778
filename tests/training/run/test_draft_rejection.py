"""Weights from rejected drafts in a whole run: one shared module on a trunk that is not trained."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from mtp_ce.training.errors import RecipeError
from mtp_ce.training.models.build import build_model
from mtp_ce.training.run import pipeline
from mtp_ce.training.run.compare import compare

ONE_MODULE = [
    "model.mtp={kind: sequential, shared: true, horizon: 3, trunk: detached}",
    "scorer={name: draft_rejection}",
    "train.steps=3",
    "train.log_every=1",
    "validation.every=null",
    "validation.rows=8",
]


def steps(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def test_weights_of_the_forward_that_is_trained_do_not_depend_on_micro_batches(small, tmp_path):
    """Three steps in one forward each, and in four; the page of weights says what a token loses."""
    for size in (8, 2):
        recipe = small([*ONE_MODULE, f"train.micro_batch_size={size}"])
        pipeline.train(recipe, tmp_path / f"{size}", Console(quiet=True))
    whole, parts = steps(tmp_path / "8"), steps(tmp_path / "2")
    for one, other in zip(whole, parts, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)
        assert one["train/weight_ess"] == pytest.approx(other["train/weight_ess"], rel=1e-4)
        assert one["train/weight_mean"] == pytest.approx(1, abs=1e-5)
        assert one["train/weight_ess"] < 0.999
        assert one["train/weight_neutral_ratio"] == 0
    page = (tmp_path / "8" / "weights.html").read_text()
    assert "tokens" in page
    assert "rejected" in page


def test_its_arms_differ_in_their_heads_and_not_in_their_trunk(small, tmp_path):
    recipe = small([*ONE_MODULE, "model.mtp.targets=trunk", "validation.decoding.prompts=3"])
    found = compare(recipe, tmp_path / "out", 1, Console(quiet=True))
    assert list(found["results"]) == ["uniform", "draft_rejection", "shuffled", "random_matched"]
    results = {arm: result for arm, (result,) in found["results"].items()}
    assert len({result["val/ce_head_0"] for result in results.values()}) == 1
    assert len({result["val/ce_head_1"] for result in results.values()}) == 4
    assert all(1 <= result["val/accepted_length"] <= 3 for result in results.values())
    first = {arm: steps(tmp_path / "out" / f"{arm}-seed0")[0] for arm in results}
    for arm in ("shuffled", "random_matched"):
        assert first[arm]["train/weight_ess"] == pytest.approx(first["draft_rejection"]["train/weight_ess"], rel=1e-5)


MODULE = """
from mtp_ce.heads.residual import MTPHeads


class Silent(MTPHeads):
    drafts = False
"""


def test_heads_of_ones_own_that_do_not_draft_are_refused_before_training(small, tmp_path, monkeypatch):
    (tmp_path / "silent_heads.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = small(["scorer={name: draft_rejection}", "model.mtp.kind=silent_heads:Silent"])
    with pytest.raises(
        RecipeError, match=r"draft_rejection needs heads that draft, and those of .* silent_heads:Silent don"
    ):
        build_model(recipe)
