"""Addresses: what is shown and stored of them, everywhere, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mtp_ce.training.addresses import is_unclear, shown
from mtp_ce.training.cli import evaluate as eval_cli
from mtp_ce.training.cli import export as export_cli
from mtp_ce.training.cli import train as cli
from mtp_ce.training.config.recipe import flatten, load_evaluation, load_recipe, to_yaml
from mtp_ce.training.errors import RecipeError

# Every form that a secret has in an address, here always s3cr3t and t0ken, and how the address is shown.
FORMS = {
    "https://me:s3cr3t@host/mlflow": "https://***@host/mlflow",
    "https://s3cr3t@host": "https://***@host",
    "https://:s3cr3t@host:5000/": "https://***@host:5000/",
    "https://me:s3cr3t@t0ken@host/x": "https://***@host/x",
    "https://me:s3cr3t?t0ken@host/x": "https://***",
    "https://me:s3cr3t/t0ken@host/x": "https://***",
    "https://me:12/s3cr3t@host/x": "https://***",
    "https://host/x?token=s3cr3t": "https://host/x?***",
    "https://host?s3cr3t": "https://host?***",
    "https://host?to=me@s3cr3t": "https://***",
    "https://host?to=a/s3cr3t": "https://host?***",
    "https://host/x?to=me@s3cr3t": "https://***",
    "https://host/x#access_token=s3cr3t": "https://host/x?***",
    "https://bucket.host/key?X-Amz-Credential=s3cr3t&X-Amz-Signature=t0ken": "https://bucket.host/key?***",
    "https://[::1]:5000/x?a=s3cr3t": "https://[::1]:5000/x?***",
    "s3://KEY:s3cr3t@bucket/prefix": "s3://***@bucket/prefix",
    "s3://KEY:s3c/r3t@bucket/prefix": "s3://***",
    "s3://bucket/key?versionId=s3cr3t": "s3://bucket/key?***",
    "postgresql://me:s3cr3t@host:5432/runs": "postgresql://***@host:5432/runs",
    "postgresql://me:s3cr3t@one:1,two:2/runs": "postgresql://***@one:1,two:2/runs",
    "mysql+pymysql://me:s3cr3t@/runs": "mysql+pymysql://***@/runs",
    "postgresql:///runs?password=s3cr3t": "postgresql:///runs?***",
}

PLAIN = (
    "http://127.0.0.1:5000", "https://host/mlflow/", "http://host/#/experiments/1/runs/0a", "sqlite:///a@b:c/mlflow.db",
    "sqlite:////var/mlflow.db", "file:///runs/a", "s3://bucket/model@v2/#3", "databricks://profile", "s3://...",
    "s3://bucket/prefix", "https://ho-st.example/a_b/c~d", "a text: no address? none=1", "my/part-?.jsonl",
)  # fmt: skip


@pytest.mark.parametrize("address", FORMS)
def test_scheme_host_port_and_path_are_shown_and_nothing_else(address):
    assert shown(address) == FORMS[address]
    assert shown(shown(address)) == shown(address)
    assert is_unclear(address) == FORMS[address].endswith("://***")


@pytest.mark.parametrize("text", PLAIN)
def test_a_text_without_a_secret_stays_as_it_is(text):
    assert shown(text) == text


def test_no_sentence_shows_a_secret_of_an_address_in_it():
    """The forms in which errors quote addresses: in quotes, brackets, before punctuation, as JSON."""
    sentences = ("'{}' can't be read", "no answer ({}): refused", '{{"uri":"{}","x":1}}', "{}, and {}.", "uri={}")
    for address in FORMS:
        for sentence in sentences:
            said = shown(sentence.format(address, address))
            assert not any(secret in said for secret in ("s3cr3t", "t0ken", "r3t@")), said
    assert shown("'s3://b/x?a=s3cr3t' can't be read") == "'s3://b/x?***' can't be read"


def test_a_query_without_its_address_is_not_shown():
    """As urllib3 quotes it."""
    said = shown("Max retries exceeded with url: /api/2.0/runs?token=s3cr3t (Caused by ...)")
    assert said == "Max retries exceeded with url: /api/2.0/runs?*** (Caused by ...)"


REFERENCE = "reference={train: {steps: 40, batch_size: 2}}"
# Every key of a recipe that can hold an address, beside those of tracking.
KEYS = {
    "data.corpus": [], "data.validation_corpus": [], "data.tokenizer": [], "checkpoint.upload": [],
    "model.source": ["model={kind: pretrained, source: x}", "data.vocab_size=null"],
    "reference.source": [REFERENCE], "critic.source": ["critic={train: {steps: 40, batch_size: 2}}"],
    "scorer.current": [REFERENCE, "scorer={name: rho1_excess}"],
    "scorer.of.current": [REFERENCE, "scorer={name: shuffled, of: {name: rho1_excess}}"],
}  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("address", ["s3://KEY:s3cr3t@bucket/prefix", "https://s3cr3t@host/x", "s3://b/k?a=s3cr3t"])
def test_credentials_in_an_address_are_refused_and_not_repeated(key, address, capsys):
    """Also by --print-config, which prints the recipe."""
    assert cli.main(["tiny", *KEYS[key], f"{key}={address}", "--print-config"]) == 2
    said, complained = capsys.readouterr()
    assert said == ""
    assert complained.count("\n") == 1
    assert "s3cr3t" not in complained
    assert key in complained
    if key != "checkpoint.upload" or address.startswith("s3://"):
        assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" in complained


@pytest.mark.parametrize("address", FORMS)
def test_the_address_of_a_tracker_is_used_whole_and_stored_shortened(address):
    own = ["tracking.kind=mine:Tracker", f"tracking.options={{hook: '{address}', more: {{urls: ['{address}']}}}}"]
    recipe = load_recipe("tiny", [f"tracking.uri='{address}'", *own])
    assert recipe.tracking.uri == address
    stored = yaml.safe_load(to_yaml(recipe))["tracking"]
    assert stored["uri"] == FORMS[address]
    assert stored["options"] == {"hook": FORMS[address], "more": {"urls": [FORMS[address]]}}
    assert "s3cr3t" not in to_yaml(recipe) + str(flatten(recipe))


def test_a_path_that_looks_like_a_query_is_stored_as_it_is():
    recipe = load_recipe("tiny", ["data.corpus=my/part-?x=1.jsonl"])
    assert yaml.safe_load(to_yaml(recipe))["data"]["corpus"] == "my/part-?x=1.jsonl"


@pytest.fixture
def stored_run(tmp_path: Path) -> Path:
    """The directory of a run whose tracker had a password in its address."""
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = load_recipe("tiny", ["tracking.uri=http://me:s3cr3t@host:5000", "data.corpus=stdlib"])
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    (folder / "run.json").write_text(json.dumps({"launch": None, "finished": "yesterday"}))
    return folder


ASKED = "tracking.uri is 'http://***@host:5000', stored without its credentials or query; give tracking.uri=... again"


def test_a_resumed_run_asks_for_the_address_that_was_stored_shortened(stored_run, capsys):
    assert cli.main(["--resume", str(stored_run)]) == 2
    assert capsys.readouterr().err == f"train-mtp: error: {ASKED}\n"
    for given in ("tracking.uri=http://me:s3cr3t@host:5000", "tracking.kind=none"):
        assert cli.main(["--resume", str(stored_run), given]) == 0, capsys.readouterr().err
        assert "finished yesterday" in capsys.readouterr().out


def test_an_evaluation_asks_for_it_too(stored_run):
    with pytest.raises(RecipeError, match=r"give tracking\.uri=\.\.\. again"):
        load_evaluation(stored_run / "recipe.yaml")
    given = load_evaluation(stored_run / "recipe.yaml", ["tracking.uri=http://host:5000", "validation.rows=2"])
    assert (given.tracking.uri, given.validation.rows) == ("http://host:5000", 2)


def test_a_run_of_before_that_stored_a_user_name_asks_too(stored_run):
    old = (stored_run / "recipe.yaml").read_text().replace("http://***@host", "http://me:***@host")
    (stored_run / "recipe.yaml").write_text(old)
    with pytest.raises(RecipeError, match=r"is 'http://\*\*\*@host:5000', stored without its credentials or query"):
        load_recipe(str(stored_run / "recipe.yaml"))


SECRET = "s3://KEY:s3cr3t@bucket/prefix"
COMMANDS = {
    "a recipe": (cli.main, [SECRET]),
    "--resume": (cli.main, ["--resume", SECRET]),
    "--resume into a folder": (cli.main, ["--resume", SECRET, "--output", "new"]),
    "an unknown option": (cli.main, ["--corpus=https://s3cr3t@host/x"]),
    "no override": (cli.main, ["tiny", "https://me:s3cr3t@host/x"]),
    "no YAML": (cli.main, ["tiny", "train.steps=[https://me:s3cr3t@host/x"]),
    "a value of another type": (cli.main, ["tiny", "train.steps=https://me:s3cr3t@host/x"]),
    "an unclear tracking address": (cli.main, ["tiny", "tracking.uri=https://me:12/s3cr3t@host/x"]),
    "a checkpoint to evaluate": (eval_cli.main, [SECRET]),
    "a checkpoint with a web address": (eval_cli.main, ["https://me:s3cr3t@host/x"]),
    "a checkpoint to export": (export_cli.main, [SECRET, "base", "new"]),
    "a web address to export": (export_cli.main, ["https://me:s3cr3t@host/x", "base", "new"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_repeats_a_secret_of_its_arguments(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main, arguments = COMMANDS[command]
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    said, complained = capsys.readouterr()
    assert (code, said, complained.count("\n")) == (2, "", 1)
    assert "s3cr3t" not in complained
    assert not list(tmp_path.iterdir())
