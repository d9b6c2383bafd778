"""Stages: a reference is trained once, on what it is meant for, and the main model is weighted by it."""

from __future__ import annotations

import errno
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from mtp_ce.scorers.rho1 import Rho1ExcessScorer
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.errors import RecipeError, StateRefusedError
from mtp_ce.training.run import fitting, main_stage, pipeline, stages
from mtp_ce.training.run.folder import decided_by, finished
from mtp_ce.training.run.inputs import read_inputs
from mtp_ce.training.run.stage_cache import cached_stage, stage_key, store_stage
from mtp_ce.training.run.stages import documents_of, reference_recipe
from mtp_ce.training.storage import atomic


def run(recipe: Recipe, folder: Path, **options: Any) -> str:
    """Train, and return what was printed."""
    with (folder.parent / f"{folder.name}.txt").open("w+") as printed:
        pipeline.train(recipe, folder, Console(file=printed, width=200), **options)
        printed.seek(0)
        return printed.read()


def lines(folder: Path) -> list[dict]:
    """The training metrics of a run."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time" and "perf" not in k} for line in metrics]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """No stage was ever finished; tokenizers and tokens are made again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_reference_is_trained_first_and_weighs_the_tokens(weighted_run):
    metrics = lines(weighted_run.folder)
    for line in metrics[:-1]:
        if "train/loss" in line:
            assert line["train/weight_mean"] == pytest.approx(1, abs=1e-5)
            assert 0.05 <= line["train/weight_min"] < 0.9
            assert 1.1 < line["train/weight_max"] <= 3
            assert line["train/weight_ess"] < 0.99
    assert (weighted_run.folder / "reference" / "model" / "model.safetensors").exists()
    assert "reference   a next-token model of" in weighted_run.printed


def test_mlflow_has_one_run_with_a_child_for_each_stage(weighted_run):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=weighted_run.database)
    runs = client.search_runs([client.get_experiment_by_name("weighted").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_name: run for run in runs if run is not parent}
    assert set(children) == {f"{weighted_run.folder.name}/{stage}" for stage in ("reference", "main")}
    children = {name.rpartition("/")[2]: run for name, run in children.items()}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}
    assert children["reference"].data.params["model.mtp.horizon"] == "1"
    assert children["reference"].data.metrics["val/ce_head_0"] > 0
    assert len(children["reference"].data.tags["stage.key"]) == 32
    artifacts = {artifact.path for artifact in client.list_artifacts(children["main"].info.run_id)}
    assert artifacts == {"evaluation.json", "evaluation.png", "losses.png", "weights.html", "weights.png"}


def test_a_second_run_reuses_the_reference_and_says_so(weighted_run, rho1, tmp_path):
    printed = run(rho1(["name=other", "reference.train.log_every=3"]), tmp_path / "again")
    assert "reference   reused, unchanged since" in printed
    assert not (tmp_path / "again" / "reference" / "model").exists()
    assert lines(tmp_path / "again") == lines(weighted_run.folder), "the same reference, so the same training"
    said = json.loads((tmp_path / "again" / "reference" / "stage.json").read_text())
    assert Path(said["folder"], "model", "model.safetensors").exists()


@pytest.mark.parametrize(
    "change",
    ["reference.train.steps=9", "reference.seed=1", "reference.documents=all", "data.sequence_length=32", "seed=3"],
)
def test_a_stage_is_made_again_when_what_decides_it_changes(rho1, change):
    """The main model's own seed is none of the reference's business."""

    def key(recipe: Recipe) -> str:
        own = reference_recipe(recipe)
        settings = own.model_dump(include={"seed", "data", "model", "optimizer", "train"})
        return stage_key("reference", {**settings, "documents": recipe.reference.documents}, ["texts"])

    same = change == "seed=3"
    assert (key(rho1()) == key(rho1([change]))) is same


def test_a_stage_is_not_made_again_for_what_changes_no_result():
    one = stage_key("critic", {"train": {"steps": 3, "log_every": 1, "device": "cpu"}}, ["texts"])
    other = stage_key("critic", {"train": {"steps": 3, "log_every": 9, "device": "cuda"}}, ["texts"])
    assert one == other
    assert one != stage_key("critic", {"train": {"steps": 4, "log_every": 1, "device": "cpu"}}, ["texts"])
    assert one != stage_key("critic", {"train": {"steps": 3, "log_every": 1, "device": "cpu"}}, ["other texts"])


@pytest.mark.parametrize(
    ("scorer", "decide"),
    [
        ("{name: uniform}", False),
        ("{name: rho1_excess}", False),
        ("{name: shuffled, of: {name: rho1_excess}}", False),
        ("{name: rho1_excess, scope: batch}", True),
        ("{name: shuffled, of: {name: rho1_excess, scope: global}}", True),
        ("{name: random_matched, of: {name: rho1_excess}}", True),
    ],
)
def test_rows_per_forward_decide_a_training_where_they_are_weighed_together(rho1, scorer, decide):
    """What a comparison has kept, and what a run is gone on with; never the reference, which weighs nothing."""
    whole, parts = (rho1([f"scorer={scorer}", f"train.micro_batch_size={rows}"]) for rows in (4, 2))
    keys = [stage_key("main", recipe.model_dump(include={"train", "scorer"}), []) for recipe in (whole, parts)]
    assert (keys[0] != keys[1]) is decide
    assert (decided_by(whole) != decided_by(parts)) is decide
    references = [reference_recipe(recipe).model_dump(include={"train", "scorer"}) for recipe in (whole, parts)]
    assert stage_key("reference", references[0], []) == stage_key("reference", references[1], [])


def test_other_texts_are_another_reference(weighted_run, rho1, corpus_folder, tmp_path, monkeypatch):
    shutil.copytree(corpus_folder, tmp_path / "corpus")
    with (tmp_path / "corpus" / "json" / "decoder.py").open("a") as file:
        file.write("\n# one more line\n")
    printed = run(rho1([f"data.corpus={tmp_path / 'corpus'}"]), tmp_path / "other")
    assert "reused" not in printed


def test_a_stage_that_did_not_finish_is_not_kept(rho1, empty_cache, tmp_path):
    """The learning rate explodes in the reference; nothing of it may be found later."""
    from mtp_ce.training.errors import StepRefusedError

    recipe = rho1(["reference.optimizer={lr: 1.0e+30, clip_norm: null}"])
    with pytest.raises(StepRefusedError):
        run(recipe, tmp_path / "broken")
    assert not (tmp_path / "cache" / "mtp_ce" / "stages").exists()
    assert (tmp_path / "broken" / "reference" / "metrics.jsonl").exists(), "what was measured stays"


def test_a_finished_stage_is_kept_where_its_process_died_before_it_was_stored(rho1, empty_cache, tmp_path, monkeypatch):
    """The resumed run stores it; what an earlier save left beside its model is not copied along."""
    recipe = rho1(["train.steps=2", "optimizer.warmup_steps=0", "validation.decoding.prompts=0"])

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "store_stage", dies)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "run")
    metrics = (tmp_path / "run" / "reference" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "reference" / ".hidden").write_text("x")
    printed = run(recipe, tmp_path / "run", resume=True)
    assert "reference   reused, unchanged since" in printed
    assert (tmp_path / "run" / "reference" / "metrics.jsonl").read_bytes() == metrics
    (stored,) = (tmp_path / "cache" / "mtp_ce" / "stages" / "reference").glob("*[!k]")
    assert stored.is_dir()
    assert not {".hidden", "checkpoints"} & {path.name for path in stored.iterdir()}


def test_a_full_cache_costs_no_stage(rho1, empty_cache, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stages, "store_stage", full)
    recipe = rho1(["train.steps=2", "optimizer.warmup_steps=0", "validation.decoding.prompts=0"])
    printed = run(recipe, tmp_path / "run")
    folder = tmp_path / "run" / "reference"
    assert (
        f"the reference could not be stored in the cache (No space left on device); this run uses {folder}" in printed
    )
    assert finished(tmp_path / "run")


def test_a_damaged_stage_runs_again(weighted_run, rho1, caplog):
    """Of the copy in the cache no damaged tensor is ever loaded."""
    record = json.loads((weighted_run.folder / "reference" / "stage.json").read_text())
    weights = Path(record["folder"], "model", "model.safetensors")
    content = weights.read_bytes()
    atomic._verified.clear()
    try:
        weights.write_bytes(bytes(len(content)))
        assert cached_stage("reference", record["key"]) is None
        assert "model/model.safetensors differs from what was written); the stage runs again" in caplog.text
    finally:
        weights.write_bytes(content)
    assert cached_stage("reference", record["key"]) == Path(record["folder"])


def test_a_kept_folder_is_a_copy_and_the_first_one_wins(tmp_path, empty_cache):
    for text in ("first", "second"):
        (tmp_path / text).mkdir()
        (tmp_path / text / "file.txt").write_text(text)
        kept = store_stage("critic", "some-key", tmp_path / text)
    assert kept == cached_stage("critic", "some-key")
    assert (kept / "file.txt").read_text() == "first"
    assert cached_stage("critic", "other-key") is None
    assert cached_stage("reference", "some-key") is None


def test_a_reference_learns_from_documented_files_alone(rho1, corpus_folder, tmp_path):
    """A private file and one without a docstring are trained on by the main model, and by reference.documents=all."""
    corpus = tmp_path / "corpus"
    shutil.copytree(corpus_folder, corpus)
    (corpus / "_private.py").write_text('"""A docstring."""\nx = 1\n')
    (corpus / "script.py").write_text("print(1)\n")
    recipe = rho1([f"data.corpus={corpus}", "data.holdout_fraction=0.1"])
    inputs = read_inputs(recipe, Console(quiet=True))
    paths = [document.path for document in inputs.corpus.train]
    assert {"_private.py", "script.py"} <= set(paths)
    documented = documents_of(recipe.reference, inputs)
    expected = [
        tokens
        for path, tokens in zip(paths, inputs.tokens.train, strict=True)
        if path not in ("_private.py", "script.py")
    ]
    assert all(torch.equal(one, other) for one, other in zip(documented, expected, strict=True))
    everything = documents_of(recipe.reference.model_copy(update={"documents": "all"}), inputs)
    assert len(everything) == len(paths)


def test_a_corpus_without_documented_files_is_refused_before_anything_is_written(rho1, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(20):
        (corpus / f"file{i}.py").write_text(f"x{i} = {'[1, 2, 3, 4, 5], ' * 30}\nname_{i} = 'text number {i}'\n" * 5)
    recipe = rho1([f"data.corpus={corpus}", "data.vocab_size=280"])
    with pytest.raises(RecipeError, match=r"reference\.documents is 'documented'.*give reference\.documents=all"):
        pipeline.train(recipe, tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_weights_of_the_first_step_are_those_of_the_saved_reference(weighted_run, rho1):
    """The whole way: stage, cache, scorer. The model is made again from the seed, the reference read from disk."""
    from mtp_ce.next_token import NextToken
    from mtp_ce.training.data.rows import rows_of_step
    from mtp_ce.training.models.build import build_model

    recipe = weighted_run.recipe
    inputs = read_inputs(recipe, Console(quiet=True))
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, end_of_text=inputs.tokenizer.eos_token_id)
    reference = AutoModelForCausalLM.from_pretrained(weighted_run.folder / "reference" / "model")
    rows = inputs.rows(inputs.tokens.train)
    batch = rows.batch(rows_of_step(0, recipe.train.batch_size, len(rows), recipe.seed))
    _, statistics = Rho1ExcessScorer(reference, **recipe.scorer.normalization()).run(
        batch.input_ids, batch.labels, batch.document_ids,
        position_ids=batch.position_ids, current=NextToken.of(model.causal, batch.input_ids, batch.position_ids),
    )  # fmt: skip
    first = lines(weighted_run.folder)[0]
    for name in ("min", "max", "ess"):
        assert first[f"train/weight_{name}"] == pytest.approx(float(getattr(statistics, name)), rel=1e-4), name


@pytest.mark.parametrize("control", [False, True])
def test_weights_made_before_training_give_the_losses_of_online_scoring(
    weighted_run, rho1, tmp_path, control, monkeypatch
):
    """The current model is frozen here, so every token of a row has one weight for the whole training.

    Those beyond a row have it only where it was made before (tests/training/loop/test_trainer.py).
    """
    monkeypatch.setattr(fitting, "label_halos", lambda model: (0, 0))
    frozen = f"{{name: rho1_excess, current: {weighted_run.folder / 'model'}}}"
    scorer = f"scorer={{name: shuffled, of: {frozen}}}" if control else f"scorer={frozen}"
    run(rho1([scorer]), tmp_path / "online")
    before = rho1([scorer, "precompute_weights=true", "validation.batch_size=3"])
    printed = run(before, tmp_path / "before")
    assert "weights     " in printed
    online, stored = lines(tmp_path / "online"), lines(tmp_path / "before")
    assert len(online) == len(stored)
    assert online[0]["train/weight_ess"] < 0.99
    for one, other in zip(online, stored, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    again = run(before, tmp_path / "again")
    assert "weights     reused, unchanged since" in again


def test_weights_made_before_training_are_refused_where_the_scorer_fails(
    weighted_run, rho1, tmp_path, empty_cache, monkeypatch
):
    """They would all be the neutral 1, in the cache too."""
    explain = Rho1ExcessScorer.explain

    def failing(*arguments, **options):
        return {name: part * torch.nan for name, part in explain(*arguments, **options).items()}

    scorer = f"scorer={{name: rho1_excess, current: {weighted_run.folder / 'model'}}}"
    reference = f"reference={{source: {weighted_run.folder / 'reference'}}}"
    recipe = rho1([scorer, reference, "precompute_weights=true"])
    monkeypatch.setattr(Rho1ExcessScorer, "explain", failing)
    with pytest.raises(StateRefusedError, match=r"weights/neutral_ratio is 0\.9\d+ after step 0, expected 0 to 0\.01"):
        run(recipe, tmp_path / "failing")
    assert not (tmp_path / "cache" / "mtp_ce" / "stages").exists()
    assert finished(tmp_path / "failing") is None


def test_the_table_of_weights_has_a_weight_for_every_token(weighted_run, rho1, tmp_path):
    import datasets

    scorer = f"scorer={{name: rho1_excess, current: {weighted_run.folder / 'model'}}}"
    run(rho1([scorer, "precompute_weights=true"]), tmp_path / "run")
    said = json.loads((tmp_path / "run" / "weights" / "stage.json").read_text())
    table = datasets.load_from_disk(str(Path(said["folder"]) / "token_weights"))
    inputs = read_inputs(weighted_run.recipe, Console(quiet=True))
    assert table["path"][:] == [document.path for document in inputs.corpus.train]
    assert [len(weights) for weights in table["token_weights"]] == [len(tokens) for tokens in inputs.tokens.train]
    flat = [weight for weights in table["token_weights"] for weight in weights]
    assert sum(flat) / len(flat) == pytest.approx(1, abs=1e-5)
    assert 0.05 <= min(flat) < max(flat) <= 3


def test_a_report_that_fails_costs_a_line_and_has_the_memory_of_the_training(rho1, tmp_path, monkeypatch):
    """In bf16 the model is sharded, also on one process, and its files are loaded for the report."""
    alive, found = [], {}
    usual = main_stage.fit

    def fit(recipe, *arguments, **options):
        trainer, results = usual(recipe, *arguments, **options)
        if recipe.reference:  # or it is that of the reference itself
            alive.extend(map(weakref.ref, (trainer, trainer.model, trainer.optimizer, trainer.weigh.__self__)))
        return trainer, results

    def decode(model, *_):
        found.update(finished=finished(tmp_path / "run"), alive=[one() for one in alive])
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee documentation")

    recipe = rho1(["train.precision=bf16", "train.steps=2", "optimizer.warmup_steps=1"])
    with monkeypatch.context() as patch:
        patch.setattr(main_stage, "fit", fit)
        patch.setattr(main_stage, "decode", decode)
        printed = run(recipe, tmp_path / "run")
    assert found["finished"], "before the report"
    assert found["alive"] == [None] * 4
    warnings = [line for line in printed.splitlines() if "OutOfMemoryError" in line]
    assert len(warnings) == 1
    assert "failed with OutOfMemoryError: CUDA out of memory. The model is saved; train-mtp --resume" in warnings[0]
    said = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert said["decoding"] is None
    assert said["heads"][0]["ce"] > 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "weights.html").exists()
    printed = run(recipe, tmp_path / "run", resume=True)
    assert "its report is missing\n" in printed
    assert "warning" not in printed
    again = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert again["heads"] == said["heads"]
    assert again["decoding"]["prompts"] > 0
    assert (tmp_path / "run" / "weights.html").exists()
