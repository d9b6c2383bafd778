"""Trained models that a recipe names: found, compared with the run's own tokens, refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import boto3
import pytest
from moto import mock_aws
from rich.console import Console
from transformers import AutoTokenizer, LlamaConfig, LlamaForTokenClassification

from mtp_ce.training.errors import RecipeError
from mtp_ce.training.models.sources import fetch_source, find_sources
from mtp_ce.training.run import pipeline
from mtp_ce.training.run.inputs import read_inputs

QUIET = Console(quiet=True)


@pytest.fixture(scope="session")
def reference(weighted_run) -> Path:
    """A trained model of the small recipes' tokenizer."""
    return weighted_run.folder / "reference" / "model"


@pytest.fixture
def bucket(monkeypatch):
    """An S3 of this process alone."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        client = boto3.client("s3")
        client.create_bucket(Bucket="models")
        yield client


def upload(client, folder: Path, prefix: str) -> None:
    for path in folder.iterdir():
        client.upload_file(str(path), "models", f"{prefix}/{path.name}")


def changed(folder: Path, where: Path, **config) -> Path:
    """A copy of a model with other values in its config.json, and without the list of its files, which would differ."""
    shutil.copytree(folder, where, ignore=shutil.ignore_patterns(".mtp_files.json"))
    old = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps({**old, **config}))
    return where


def test_a_reference_in_a_folder_is_used_as_it_is(reference, weighted_run, rho1, tmp_path):
    recipe = rho1([f"reference.source={reference}"])
    pipeline.train(recipe, tmp_path / "run", QUIET)
    assert not (tmp_path / "run" / "reference").exists()
    ours, theirs = ((folder / "metrics.jsonl").read_text() for folder in (tmp_path / "run", weighted_run.folder))
    weights = [[json.loads(line).get("train/weight_ess") for line in text.splitlines()] for text in (ours, theirs)]
    assert weights[0] == weights[1], "the same reference as the one that the recipe would train"


def test_a_reference_in_s3_is_fetched_once(reference, rho1, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    upload(bucket, reference, "some/reference")
    recipe = rho1(["reference.source=s3://models/some/reference"])
    find_sources(recipe)
    folder = read_inputs(recipe, QUIET).model_folders["reference.source"]
    assert {path.name for path in folder.iterdir()} == {path.name for path in reference.iterdir()}
    assert (folder / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert fetch_source("reference.source", "s3://models/some/reference/") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    bucket.put_object(Bucket="models", Key="some/reference/config.json", Body=b"{}")
    assert fetch_source("reference.source", "s3://models/some/reference") != folder, "its content has changed"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s3://models/nothing", "has no objects"),
        ("s3://nowhere/model", "NoSuchBucket"),
        ("s3://models", "expected s3://bucket/prefix"),
        ("s3:///model", "expected s3://bucket/prefix"),
    ],
)
def test_what_is_not_in_s3_is_named(bucket, address, words):
    with pytest.raises(RecipeError, match=words) as raised:
        fetch_source("reference.source", address)
    assert "reference.source" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_s3_without_credentials_is_one_line(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(RecipeError, match=r"critic\.source 's3://models/critic' can't be read: .*credentials"):
        fetch_source("critic.source", "s3://models/critic")


def test_a_hub_name_that_can_not_be_had_is_one_line(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="'nobody/nothing', which is not on this machine") as raised:
        fetch_source("reference.source", "nobody/nothing")
    assert "\n" not in str(raised.value)


PRETRAINED = ["data.vocab_size=null", "scorer={name: uniform}"]


def pretrained(rho1, source: str, *overrides: str):
    """The small recipe, beginning with a trained model; the reference, where there is one, begins with it too."""
    return rho1([f"model={{kind: pretrained, source: '{source}', mtp: {{horizon: 3}}}}", *PRETRAINED, *overrides])


def test_a_model_inside_an_installed_package_is_found(reference, monkeypatch, tmp_path):
    package = tmp_path / "some_models"
    shutil.copytree(reference, package / "one")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert fetch_source("model.source", "package:some_models/one") == package / "one"
    with pytest.raises(RecipeError, match=r"model\.source .* which is neither a folder nor a \.gguf file"):
        fetch_source("model.source", "package:some_models/two")
    with pytest.raises(RecipeError, match=r"there is no package other_models; install it .* --no-deps other-models"):
        fetch_source("model.source", "package:other_models/one")


def test_a_hub_name_is_a_repository_or_a_gguf_file_in_one(reference, monkeypatch, tmp_path):
    """The hub itself is not asked here; what it would be asked is."""
    import huggingface_hub

    (tmp_path / "small.gguf").write_bytes(b"not a model")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(reference))
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *names: asked.append(names) or str(tmp_path / names[1])
    )
    assert fetch_source("model.source", "somebody/model") == reference
    with pytest.raises(RecipeError, match=r"small\.gguf' can't be read"):
        fetch_source("model.source", "somebody/model-GGUF/small.gguf")
    assert asked == ["somebody/model", ("somebody/model-GGUF", "small.gguf")]


def test_a_file_that_only_calls_itself_gguf_is_one_line(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    with pytest.raises(RecipeError, match=r"model\.source .*model\.gguf' can't be read") as raised:
        fetch_source("model.source", str(tmp_path / "model.gguf"))
    assert "\n" not in str(raised.value)


def test_saved_heads_that_can_not_be_read_are_one_line(weighted_run, rho1, tmp_path):
    shutil.copytree(weighted_run.folder / "model", tmp_path / "model")
    (tmp_path / "model" / "mtp_heads.json").write_text("{")
    with pytest.raises(RecipeError, match=r"has a mtp_heads\.json that can't be read"):
        find_sources(pretrained(rho1, tmp_path / "model"))


@pytest.mark.parametrize(("key", "value"), [("horizon", 4), ("kind", "layer")])
def test_heads_other_than_those_the_recipe_names_are_refused_before_torch(weighted_run, rho1, key, value):
    with pytest.raises(RecipeError, match=f"model.mtp.{key} is {value}, but model.source .* has heads of {key} "):
        find_sources(pretrained(rho1, weighted_run.folder, f"model.mtp.{key}={value}"))


def test_a_trained_model_goes_on_learning_weighted_by_a_reference_that_began_as_it(weighted_run, rho1, tmp_path):
    recipe = pretrained(rho1, weighted_run.folder, "scorer={name: rho1_excess}", "validation.at_start=true")
    evaluation = pipeline.train(recipe, tmp_path / "run", QUIET)
    assert evaluation.before == weighted_run.evaluation.heads, "model and heads begin where that run ended"
    assert evaluation.heads != evaluation.before
    said = json.loads((tmp_path / "run" / "reference" / "stage.json").read_text())
    assert said["results"]["val/ce_head_0"] < evaluation.before[0].ce + 0.05, "it has learnt further, not anew"


def test_a_critic_can_begin_as_the_trained_model(weighted_run, rho1, tmp_path):
    critic = ["critic.train.steps=2", "critic.train.batch_size=2", "critic.optimizer.lr=1e-3"]
    critic += ["scorer={name: critic_delta}", "optimizer.warmup_steps=0", "data.sequence_length=256"]
    pipeline.train(pretrained(rho1, weighted_run.folder, *critic), tmp_path / "run", QUIET)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["train/weight_ess"] < 0.99


def test_a_vocabulary_of_another_size_is_refused_from_its_config(reference, rho1, tmp_path):
    other = changed(reference, tmp_path / "other", vocab_size=600)
    with pytest.raises(RecipeError, match=r"reference\.source .* has a vocabulary of 600 entries .* one of 512"):
        find_sources(rho1([f"reference.source={other}"]))


def test_another_tokenizer_of_the_same_size_is_refused_before_anything_is_written(reference, rho1, tmp_path):
    """The numbers would mean other tokens; nothing else could notice."""
    other = changed(reference, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = [entry for entry, number in vocabulary.items() if number in (300, 400)]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = rho1([f"reference.source={other}"])
    find_sources(recipe)
    with pytest.raises(RecipeError, match=r"another tokenizer: 510 of 512 entries agree; give data\.tokenizer"):
        pipeline.train(recipe, tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()


def test_a_reference_that_predicts_no_tokens_is_refused(reference, rho1, tmp_path):
    other = changed(reference, tmp_path / "other", architectures=["LlamaForTokenClassification"])
    with pytest.raises(RecipeError, match="is a LlamaForTokenClassification; expected a causal language model"):
        find_sources(rho1([f"reference.source={other}"]))


def save_critic(folder: Path, labels: int) -> Path:
    """A tiny token classification model."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForTokenClassification(LlamaConfig(vocab_size=512, num_labels=labels, **sizes)).save_pretrained(folder)
    return folder


def critic_recipe(rho1, source: Path):
    return rho1(["scorer={name: critic_delta}", f"critic.source={source}"])


def test_a_critic_without_a_value_head_is_refused(reference, rho1, tmp_path):
    with pytest.raises(RecipeError, match="is a LlamaForCausalLM without a value head"):
        find_sources(critic_recipe(rho1, reference))
    with pytest.raises(RecipeError, match="without a value head; expected a ForTokenClassification of one label"):
        find_sources(critic_recipe(rho1, save_critic(tmp_path / "two", labels=2)))


def test_a_critic_in_a_folder_weighs_the_training(reference, rho1, tmp_path):
    save_critic(tmp_path / "critic", labels=1)
    AutoTokenizer.from_pretrained(reference).save_pretrained(tmp_path / "critic")
    recipe = critic_recipe(rho1, tmp_path / "critic")
    find_sources(recipe)
    pipeline.train(recipe, tmp_path / "run", QUIET)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["train/weight_ess"] < 0.99


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_folder_that_lacks_a_file_is_refused_by_name(reference, rho1, tmp_path, missing):
    other = changed(reference, tmp_path / "other")
    (other / missing).unlink()
    if missing == "tokenizer.json":
        (other / "tokenizer_config.json").unlink()
    with pytest.raises(RecipeError, match=r"reference\.source .* has no (readable config.json|tokenizer)"):
        read_inputs(rho1([f"reference.source={other}"]), QUIET)


def test_a_run_can_take_the_tokenizer_of_a_trained_model(reference, rho1, corpus_folder):
    recipe = rho1([f"data.tokenizer={reference}", f"reference.source={reference}", "data.vocab_size=512"])
    inputs = read_inputs(recipe, QUIET)
    assert inputs.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(reference).get_vocab()
    with pytest.raises(
        RecipeError, match=r"data\.tokenizer .* has a tokenizer of 512 entries, but the model's vocabulary has 500"
    ):
        read_inputs(rho1([f"data.tokenizer={reference}", "data.vocab_size=500"]), QUIET)
