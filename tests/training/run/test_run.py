"""One small run from corpus to saved model: what it learns, leaves behind, records and prints."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtp_ce import MTPWrapper
from mtp_ce.training.config.recipe import load_recipe, to_yaml
from mtp_ce.training.data.corpus import texts
from mtp_ce.training.data.reader import read_corpus
from mtp_ce.training.data.rows import PackedRows
from mtp_ce.training.data.tokenizer import load_tokenizer
from mtp_ce.training.data.tokens import tokenise, unigram_cross_entropy
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.run import fitting, pipeline

TRAIN_METRICS = {
    *("train/loss", "train/ce_mean", "train/ce_head_0", "train/ce_head_1", "train/ce_head_2"),
    *("train/weight_mean", "train/weight_min", "train/weight_max", "train/weight_ess"),
    "train/weight_clipped_ratio",
    "train/weight_neutral_ratio",
    *("train/valid_token_ratio", "optim/lr", "optim/grad_norm", "perf/tokens_per_s", "perf/peak_memory_mb"),
}
VAL_METRICS = {"val/ce_mean", "val/unigram_entropy", "val/tokens_per_forward", "val/agrees_head_1", "val/agrees_head_2"}
VAL_METRICS |= {f"val/{name}_head_{h}" for name in ("ce", "perplexity", "top1", "top5") for h in range(3)}
DECODING_METRICS = {"decoding/tokens_per_forward", "decoding/acceptance_length", "decoding/identical_ratio"}
DECODING_METRICS |= {"perf/decoding_speedup"}
DECODING_METRICS |= {f"decoding/{name}_head_{h}" for name in ("kept", "acceptance") for h in (1, 2)}
DECODING_METRICS |= {"val/accepted_length", "val/accepted_head_1", "val/accepted_head_2"}


@pytest.fixture(scope="module")
def mlflow_run(finished_run):
    """The one stage of the run as MLflow has it, and a client of its database."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=finished_run.database)
    experiment = client.get_experiment_by_name("mtp_ce")
    (stage,) = client.search_runs([experiment.experiment_id], "tags.mlflow.parentRunId != ''")
    return client, stage


@pytest.fixture(scope="module")
def mlflow_parent(mlflow_run):
    """The run that the stage belongs to."""
    client, stage = mlflow_run
    return client, client.get_run(stage.data.tags["mlflow.parentRunId"])


@pytest.fixture(scope="module")
def metrics(finished_run) -> list[dict]:
    return [json.loads(line) for line in (finished_run.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def held_out(finished_run):
    """The held-out rows, the tokenizer and the tokens of the run, made again from its recipe."""
    corpus = read_corpus(finished_run.recipe.data)
    tokenizer = load_tokenizer(texts(corpus.train), 512)
    tokens = tokenise(corpus, tokenizer)
    return PackedRows(tokens.held_out, 64, tokenizer.pad_token_id), tokenizer, tokens


def test_the_folder_holds_what_the_run_made_and_nothing_half_done(finished_run):
    names = {path.relative_to(finished_run.folder).as_posix() for path in finished_run.folder.rglob("*")}
    assert {"recipe.yaml", "metrics.jsonl", "losses.png", "model", "model/model.safetensors"} <= names
    assert {"evaluation.json", "evaluation.png"} <= names
    assert {"model/mtp_heads.safetensors", "model/mtp_heads.json", "model/tokenizer.json"} <= names
    assert not [name for name in names if name.startswith(".")]


def test_it_learns(metrics):
    ce = [line["train/ce_mean"] for line in metrics if "train/ce_mean" in line]
    assert ce[0] == pytest.approx(math.log(512), abs=0.2), "a model that knows nothing scores ln V"
    assert ce[-1] < ce[0] - 0.9


def test_metrics_have_their_names_in_mlflow(mlflow_run):
    _, run = mlflow_run
    assert set(run.data.metrics) == TRAIN_METRICS | VAL_METRICS | DECODING_METRICS
    assert run.info.status == "FINISHED"
    assert run.data.metrics["train/weight_mean"] == 1.0
    assert run.data.metrics["train/weight_ess"] == 1.0
    assert 0.99 < run.data.metrics["train/valid_token_ratio"] <= 1.0, "all but the last token of a document"


def test_mlflow_and_the_metrics_file_agree(mlflow_run, metrics):
    client, run = mlflow_run
    for name in ("train/loss", "val/ce_head_2", "optim/lr"):
        history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        assert history == [(line["step"], line[name]) for line in metrics if name in line]
    assert [line["step"] for line in metrics if "train/loss" in line] == [1, 12, 24, 36, 48, 60]
    assert [line["step"] for line in metrics if "val/ce_mean" in line] == [24, 48, 60]


def test_the_run_above_the_stage_shows_how_it_ended(mlflow_parent, mlflow_run, finished_run):
    _, run = mlflow_parent
    assert run.info.run_name == finished_run.folder.name
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val/ce_head_1"] == finished_run.evaluation.heads[1].ce
    assert mlflow_run[1].info.run_name == f"{finished_run.folder.name}/main"


def test_the_recipe_is_in_mlflow_as_parameters_and_as_an_artifact_that_runs_again(
    finished_run, mlflow_run, mlflow_parent, tmp_path
):
    client, stage = mlflow_run
    _, run = mlflow_parent
    for each in (stage, run):
        assert each.data.params["model.mtp.horizon"] == "3"
        assert each.data.params["optimizer.lr"] == "0.01"
    artifacts = {artifact.path for artifact in client.list_artifacts(stage.info.run_id)}
    assert artifacts == {"evaluation.json", "evaluation.png", "losses.png"}
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["recipe.yaml"]
    copy = client.download_artifacts(run.info.run_id, "recipe.yaml", str(tmp_path))
    assert load_recipe(copy) == finished_run.recipe
    assert (finished_run.folder / "recipe.yaml").read_text() == to_yaml(finished_run.recipe)


def test_the_picture_is_a_picture(finished_run):
    with Image.open(finished_run.folder / "losses.png") as picture:
        assert picture.format == "PNG"
        assert picture.width >= 800
        # A blank canvas has one colour.
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 50


def test_the_saved_model_reloads_bit_for_bit_with_plain_transformers(finished_run, held_out, monkeypatch, tmp_path):
    """Trained, saved, loaded by transformers alone: the same logits, the same heads, the same tokens."""
    trained = {}
    save = fitting.save_model

    def remember(folder, model, tokenizer, **options):
        trained["model"] = model
        save(folder, model, tokenizer, **options)

    monkeypatch.setattr(fitting, "save_model", remember)
    recipe = finished_run.recipe.model_copy(
        update={"tracking": finished_run.recipe.tracking.model_copy(update={"kind": "none"})}
    )
    pipeline.train(recipe, tmp_path / "again")

    for folder in (tmp_path / "again" / "model", finished_run.folder / "model"):
        # The first is what this very model was saved as; the second says that a run repeats bit for bit.
        trunk = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        batch = held_out[0].batch(torch.arange(3))
        original = trained["model"].eval()
        with torch.no_grad():
            expected = original.head_logits(input_ids=batch.input_ids, position_ids=batch.position_ids)
            again = MTPWrapper.from_pretrained(folder).eval()
            loaded = again.head_logits(input_ids=batch.input_ids, position_ids=batch.position_ids)
            alone = trunk.eval()(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        assert len(loaded) == 3
        assert torch.equal(loaded[0], alone)
        for one, other in zip(expected, loaded, strict=True):
            assert torch.equal(one, other)
        assert not torch.equal(loaded[0], loaded[1]), "the heads have learnt something"
        text = "def f(x):\n    return x\n"
        assert tokenizer(text)["input_ids"] == held_out[1](text)["input_ids"]
        assert tokenizer.eos_token_id == trunk.config.eos_token_id == trunk.config.pad_token_id


def test_a_plain_model_generates_from_the_folder(finished_run):
    tokenizer = AutoTokenizer.from_pretrained(finished_run.folder / "model")
    model = AutoModelForCausalLM.from_pretrained(finished_run.folder / "model")
    prompt = tokenizer("import ", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False).shape[1] == (
        prompt["input_ids"].shape[1] + 5
    )


def test_the_validation_is_that_of_the_saved_model_over_all_held_out_rows(finished_run, held_out):
    """Recomputed from the files with torch's own cross entropy, row by row, head by head."""
    model = MTPWrapper.from_pretrained(finished_run.folder / "model").eval()
    rows = held_out[0]
    batch = rows.batch(torch.arange(len(rows)))
    with torch.no_grad():
        logits = model.head_logits(input_ids=batch.input_ids, position_ids=batch.position_ids)
    for h, result in enumerate(finished_run.evaluation.heads):
        d = h + 1
        live = (batch.labels[:, d:] != -100) & (batch.document_ids[:, d:] == batch.document_ids[:, :-d])
        targets = batch.labels[:, d:][live]
        seen = logits[h][:, :-d][live]
        ce = torch.nn.functional.cross_entropy(seen.double(), targets)
        assert result.rows == len(targets)
        assert result.ce == pytest.approx(float(ce), rel=1e-5)
        assert result.top1 == pytest.approx(float((seen.argmax(-1) == targets).double().mean()), abs=1e-12)


def test_what_is_printed_without_a_terminal_is_plain_lines_and_ends_with_the_table(finished_run, held_out):
    printed = finished_run.printed
    assert "\x1b" not in printed
    assert "\r" not in printed
    steps = [line for line in printed.splitlines() if line.startswith("step ") and "tokens/s" in line]
    assert len(steps) == 6
    assert all("loss" in line and "CE" in line and "left" in line for line in steps)
    unigram = unigram_cross_entropy(held_out[2], 512)
    for h, result in enumerate(finished_run.evaluation.heads):
        (row,) = [line.split() for line in printed.splitlines() if line.split()[:2] == [str(h), f"(+{h + 1})"]]
        assert row[2:6] == [
            f"{result.ce:.3f}",
            f"{unigram:.3f}",
            f"{result.perplexity:,.1f}",
            f"{result.top1:.1%}",
        ]
    assert "mlflow ui --backend-store-uri sqlite:///" in printed


def test_an_output_folder_that_appears_meanwhile_is_left_alone(finished_run, small):
    """Between the command line's check and the run, another run may have taken the name."""
    before = (finished_run.folder / "metrics.jsonl").read_bytes()
    with pytest.raises(RecipeError, match="output folder"):
        pipeline.train(small(), finished_run.folder)
    assert (finished_run.folder / "metrics.jsonl").read_bytes() == before


def test_a_device_that_is_not_there_is_a_mistake_of_the_recipe(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=r"train\.device is 'cuda'"):
        pipeline.train(small(["train.device=cuda"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
