"""The comparison: the arms differ in their weights alone, and what is reported is what was measured."""

from __future__ import annotations

import json
import statistics

import pytest
from PIL import Image
from rich.console import Console

from mtp_ce.training.errors import RecipeError
from mtp_ce.training.report.comparison import comparison_table, differences
from mtp_ce.training.run import compare as module
from mtp_ce.training.run.compare import compare

# A reference of its own: the cache is one for the whole session, and other tests look at how theirs is trained.
REFERENCE = "reference.train.steps=7"
ARMS = ["uniform", "rho1_excess", "shuffled", "random_matched"]


@pytest.fixture(scope="module")
def compared(rho1, finished_run, tmp_path_factory):
    """A comparison of six steps on two seeds."""
    output = tmp_path_factory.mktemp("compare") / "out"
    tracked = [
        REFERENCE,
        "tracking.kind=mlflow",
        f"tracking.uri={finished_run.database}",
        "tracking.experiment=compared",
    ]
    with (output.parent / "printed.txt").open("w") as printed, pytest.MonkeyPatch.context() as patch:
        patch.chdir(output.parent)
        found = compare(rho1([REFERENCE, *tracked]), output, 2, Console(file=printed, width=300))
    return found, output


def first_line(folder) -> dict:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


def test_every_arm_is_trained_on_every_seed(compared):
    found, output = compared
    assert list(found["results"]) == ARMS
    assert found["seeds"] == [0, 1]
    for arm in ARMS:
        for seed, result in zip(found["seeds"], found["results"][arm], strict=True):
            said = json.loads((output / f"{arm}-seed{seed}" / "stage.json").read_text())
            assert said["results"] == result
            assert {"val/ce_head_0", "val/ce_head_2", "documented/ce_head_0"} <= set(result)
    assert json.loads((output / "comparison.json").read_text()) == found


def test_arms_of_one_seed_begin_alike_and_differ_in_their_weights(compared):
    """Before the first step no weight has acted: equal cross entropies, unequal losses."""
    _, output = compared
    for seed in (0, 1):
        first = {arm: first_line(output / f"{arm}-seed{seed}") for arm in ARMS}
        assert len({line["train/ce_head_1"] for line in first.values()}) == 1
        assert len({line["train/loss"] for line in first.values()}) == len(ARMS)
        assert first["uniform"]["train/weight_ess"] == 1
        for arm in ("shuffled", "random_matched"):
            assert first[arm]["train/weight_ess"] == pytest.approx(first["rho1_excess"]["train/weight_ess"], rel=1e-5)
    assert (
        first_line(output / "uniform-seed0")["train/ce_head_0"]
        != first_line(output / "uniform-seed1")["train/ce_head_0"]
    )


def test_the_table_shows_the_differences_seed_by_seed(compared):
    found, output = compared
    table = (output / "comparison.md").read_text()
    assert table == comparison_table(found) + "\n"
    uniform = [result["val/ce_head_1"] for result in found["results"]["uniform"]]
    ours = [result["val/ce_head_1"] for result in found["results"]["rho1_excess"]]
    expected = [a - b for a, b in zip(ours, uniform, strict=True)]
    assert differences(found, "rho1_excess", "val/ce_head_1") == expected
    (row,) = [line for line in table.splitlines() if line.startswith("| all | 1 |")]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3] == f"{statistics.fmean(uniform):.3f} ± {statistics.stdev(uniform):.3f}"
    assert cells[4] == f"{statistics.fmean(expected):+.3f} ± {statistics.stdev(expected):.3f}"
    with Image.open(output / "comparison.png") as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 50


def test_heads_that_draft_are_compared_by_their_mean_accepted_length(compared):
    """Also where 1 plus the heads' agreement predicts it; of three heads it is between 1 and 3."""
    found, output = compared
    for results in found["results"].values():
        for result in results:
            assert 1 <= result["val/accepted_length"] <= 3
            agreed = result["val/agrees_head_1"] + result["val/agrees_head_2"]
            assert result["val/tokens_per_forward"] == pytest.approx(1 + agreed)
    lengths = [result["val/accepted_length"] for result in found["results"]["uniform"]]
    assert (
        f"| greedy text of the model | {statistics.fmean(lengths):.3f} ± {statistics.stdev(lengths):.3f} |"
        in (output / "comparison.md").read_text()
    )


def test_mlflow_nests_the_trainings_below_the_comparison(compared, finished_run):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=finished_run.database)
    runs = client.search_runs([client.get_experiment_by_name("compared").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    names = {run.info.run_name.removeprefix(f"{parent.info.run_name}/") for run in runs if run is not parent}
    assert names == {"reference"} | {f"{arm}-seed{seed}" for arm in ARMS for seed in (0, 1)}
    artifacts = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert artifacts == {"recipe.yaml", "comparison.json", "comparison.md", "comparison.png"}


def test_a_comparison_that_was_interrupted_goes_on_where_it_stopped(compared, rho1, tmp_path, monkeypatch):
    """Every training of the two seeds is there; only the third seed's are made, and those of another arm."""
    found, _ = compared
    sharp = rho1([REFERENCE, "scorer.temperature=0.3"])
    trained = []
    fit = module.fit

    def count(recipe, *rest):
        trained.append(("sharp" if recipe.scorer == sharp.scorer else recipe.scorer.name, recipe.seed))
        return fit(recipe, *rest)

    monkeypatch.setattr(module, "fit", count)
    again = compare(rho1([REFERENCE]), tmp_path / "again", 3, Console(quiet=True), {"sharp": sharp})
    assert trained == [("sharp", 0), ("sharp", 1), *((arm, 2) for arm in ARMS), ("sharp", 2)]
    assert again["results"]["sharp"] != again["results"]["rho1_excess"]
    assert again["scorers"]["sharp"]["temperature"] == 0.3
    assert (tmp_path / "again" / "sharp-seed2" / "stage.json").exists()
    assert {arm: again["results"][arm][:2] for arm in ARMS} == found["results"]


def test_an_arm_that_the_recipe_does_not_have_is_refused(rho1, tmp_path):
    expected = "only names 'rho-1'; give arms of the recipe: uniform, rho1_excess, shuffled, random_matched$"
    with pytest.raises(RecipeError, match=expected):
        compare(rho1([REFERENCE]), tmp_path / "out", 1, Console(quiet=True), only=["uniform", "rho-1"])
    assert not (tmp_path / "out").exists()


def test_uniform_weights_alone_are_nothing_to_compare(small, tmp_path):
    with pytest.raises(RecipeError, match="scorer is not uniform"):
        compare(small(), tmp_path / "out", 1, Console(quiet=True))
    assert not (tmp_path / "out").exists()
