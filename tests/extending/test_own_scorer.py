"""A scorer in a file outside the package: named in the recipe, it is trained with; its mistakes cost one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mtp_ce.training.config.recipe import load_recipe
from mtp_ce.training.errors import RecipeError

SURPRISE = '''
from mtp_ce import normalize_weights
from mtp_ce.next_token import NextToken
from mtp_ce.training.config.scorers.options import ScoreConfig


class Surprise(ScoreConfig):
    """Tokens that the reference predicts badly weigh more."""

    stages = ("reference",)
    units = {"score": "nats"}

    def build(self, models, seed):
        return SurpriseScorer(models["reference"], self.normalization())


class SurpriseScorer:
    def __init__(self, reference, options):
        self.reference, self.options = reference, options

    def explain(self, input_ids, labels, document_ids=None, *, position_ids=None, current=None):
        assert current is None, "the options don't declare that the model in training is read"
        reference = NextToken.of(self.reference, input_ids, position_ids)
        return {"score": reference.token_ce(labels, document_ids)}

    def run(self, input_ids, labels, document_ids=None, **context):
        score = self.explain(input_ids, labels, document_ids, **context)["score"]
        return normalize_weights(score, labels != -100, document_ids=document_ids, **self.options)
'''

DATA = ["data.corpus=texts", "tracking.kind=none", "validation.rows=8"]
REFERENCE = "reference={documents: all, train: {steps: 2, batch_size: 4}}"


@pytest.fixture
def modules(beside: Path, module_of_page) -> Path:
    """The module that docs/weights.md shows, and one whose scorer needs a reference; both can be imported."""
    (beside / "my_scorer.py").write_text(module_of_page("weights.md", "my_scorer.py"))
    (beside / "my_surprise.py").write_text(SURPRISE)
    return beside


@pytest.fixture
def weights(metrics):
    """Return mean, min, max and ess of the token weights of every step."""

    def read() -> list[dict[str, float]]:
        names = ("mean", "min", "max", "ess")
        return [{name: line[f"train/weight_{name}"] for name in names} for line in metrics() if "train/loss" in line]

    return read


def test_a_scorer_of_a_module_outside_the_package_trains_three_steps(modules, train, weights):
    """Its options are used: the bounds of the recipe, and another distribution at every step."""
    scorer = "scorer={name: 'my_scorer:Rarity', power: 0.5, eps: 0.3, w_max: 1.5}"
    assert train(*DATA, scorer, "--output", "out") == 0
    assert len(weights()) == 3
    for step in weights():
        assert step["mean"] == pytest.approx(1, abs=1e-5)
        assert 0.3 <= step["min"] < 0.9 < 1.1 < step["max"] <= 1.5
        assert step["ess"] < 0.99
    assert len({step["ess"] for step in weights()}) == 3
    assert (modules / "out" / "weights.html").exists(), "held-out text is shown with its weights"
    assert load_recipe("out/recipe.yaml").scorer.power == 0.5, "the run's own recipe names it, too"


def test_a_scorer_of_a_module_that_needs_a_reference_has_one_trained(modules, train, weights, capsys, files_below):
    arguments = [*DATA, "scorer={name: 'my_surprise:Surprise', w_max: 2.0}", REFERENCE, "--output", "out"]
    before = files_below(modules)
    assert train(*arguments, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "reference   2 steps of 4" in printed
    assert "scorer      my_surprise:Surprise" in printed
    assert re.search(r"compute .*scoring [\d.]+ [kM]?FLOP", printed)
    assert files_below(modules) == before

    assert train(*arguments) == 0
    assert (modules / "out" / "reference" / "model" / "model.safetensors").exists()
    assert all(step["ess"] < 1 and step["max"] <= 2 for step in weights())
    assert re.search(r"score: [\d.]+ nats", (modules / "out" / "weights.html").read_text())


@pytest.mark.parametrize(
    ("scorer", "words"),
    [
        ("{name: 'no.such.module:Scorer'}", ["'no.such.module:Scorer'", "No module named 'no'"]),
        ("{name: 'my_scorer:Missing'}", ["'my_scorer:Missing'", "has no attribute 'Missing'"]),
        ("{name: 'my_scorer:RarityScorer'}", ["'my_scorer:RarityScorer'", "expected a subclass of", "ScorerConfig"]),
        ("{name: 'my_scorer:Rarity', pwer: 0.5}", ["unknown key 'scorer.pwer'", "did you mean 'scorer.power'"]),
        ("{name: 'my_scorer:Rarity', power: -1}", ["'scorer.power' is -1", "greater than 0"]),
        ("{name: 'my_surprise:Surprise'}", ["scorer my_surprise:Surprise needs a reference", "reference.source"]),
        ("{name: my_scorer}", ["'scorer.name' is 'my_scorer'", "package.module:Class"]),
    ],
)
def test_a_mistake_in_a_scorer_of_ones_own_is_one_line(modules, train, capsys, files_below, scorer, words):
    before = files_below(modules)
    assert train(*DATA, f"scorer={scorer}", "--dry-run") == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    for word in words:
        assert word in said.err
    assert files_below(modules) == before


@pytest.mark.parametrize(
    ("key", "group"),
    [
        ("scorer.name", "scorer: {name: 'my_scorer:Rarity'}"),
        ("scorer.of.name", "scorer: {name: shuffled, of: {name: 'my_scorer:Rarity'}}"),
        ("tracking.kind", "tracking: {kind: 'my_scorer:Rarity'}"),
        ("data.reader", "data: {reader: 'my_scorer:Rarity'}"),
        ("model.mtp.kind", "model: {mtp: {kind: 'my_scorer:Rarity'}}"),
    ],
)
def test_a_recipe_from_s3_names_no_class(tmp_path, monkeypatch, key, group):
    """Whatever else is wrong with it: nothing is imported."""
    from mtp_ce.training.storage import folders

    (tmp_path / "recipe.yaml").write_text(f"name: theirs\n{group}\n")
    monkeypatch.setattr(folders, "fetch_file", lambda *_: tmp_path / "recipe.yaml")
    with pytest.raises(
        RecipeError, match=rf"^{re.escape(key)} is 'my_scorer:Rarity' in the recipe s3://b/r\.yaml; only a"
    ):
        load_recipe("s3://b/r.yaml")
