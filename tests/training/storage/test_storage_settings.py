"""Each setting that docs/s3.md names is seen on the wire, and each of its commands works as described."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_ce.training.cli import evaluate as eval_cli
from mtp_ce.training.cli import export as export_cli
from mtp_ce.training.cli import train as cli
from mtp_ce.training.config.recipe import load_recipe, to_yaml
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage.folders import MANIFEST, check_address, fetch_folder, upload_folder

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "s3.md").read_text(encoding="utf-8")
PROGRAMS = {"train-mtp": cli.main, "eval-mtp": eval_cli.main, "export-mtp": export_cli.main}


def sent(proxy, method: str) -> str:
    """The heads of all requests of a method."""
    return "\n".join(head for head in proxy.asked if head.startswith(method)).lower()


def exchange(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "one").mkdir(exist_ok=True)
    (tmp_path / "one" / "file").write_text("some text")
    upload_folder("DIR", tmp_path / "one", f"s3://models/{prefix}")
    fetch_folder("model.source", f"s3://models/{prefix}")


def test_checksums_are_sent_and_requested_unless_only_required_ones_are_wanted(
    s3, proxy, prefix, tmp_path, monkeypatch
):
    exchange(tmp_path, prefix)
    assert "x-amz-checksum-crc32" in sent(proxy, "PUT")
    assert "x-amz-checksum-mode: enabled" in sent(proxy, "GET")
    for name in ("REQUEST_CHECKSUM_CALCULATION", "RESPONSE_CHECKSUM_VALIDATION"):
        monkeypatch.setenv(f"AWS_{name}", "when_required")
    proxy.asked.clear()
    exchange(tmp_path, f"{prefix}-plain")
    assert "x-amz-checksum-crc32" not in sent(proxy, "PUT")
    assert "x-amz-checksum-mode" not in sent(proxy, "GET")


def test_the_region_is_the_one_that_requests_are_signed_for(s3, proxy, monkeypatch):
    for name, region in (("AWS_DEFAULT_REGION", "eu-west-1"), ("AWS_REGION", "eu-west-2")):
        monkeypatch.setenv(name, region)
        with pytest.raises(RecipeError):
            check_address("model.source", "s3://models/nothing")
        assert f"/{region}/s3/aws4_request" in proxy.asked[-1]


@pytest.mark.parametrize(("style", "asked"), [("path", "GET /models/nothing"), ("virtual", "GET /nothing")])
def test_the_addressing_style_says_where_the_bucket_is_named(s3, proxy, monkeypatch, tmp_path, style, asked):
    """A host whose names all lead to the proxy, as a server's does whose buckets are hosts."""
    port, resolve = proxy.endpoint.rpartition(":")[2], socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: resolve("127.0.0.1", *rest, **more))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://storage.example:{port}")
    (tmp_path / "config").write_text(f"[profile mine]\ns3 =\n  addressing_style = {style}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    with pytest.raises(RecipeError):
        check_address("model.source", "s3://models/nothing")
    assert proxy.asked[0].startswith(f"{asked} HTTP")
    host = {"path": "storage.example", "virtual": "models.storage.example"}[style]
    assert f"\r\nHost: {host}:{port}\r\n" in proxy.asked[0]


def test_a_profile_can_hold_everything(s3, proxy, prefix, monkeypatch, tmp_path):
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    profile = re.search(r"```ini\n(.*?)```", PAGE, re.DOTALL)[1].replace("http://127.0.0.1:9000", proxy.endpoint)
    (tmp_path / "config").write_text(profile.replace("region = us-east-1", "region = eu-west-3"))
    (tmp_path / "keys").write_text("[mine]\naws_access_key_id = testkey\naws_secret_access_key = testsecret123\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    exchange(tmp_path, prefix)
    assert "eu-west-3" in proxy.asked[0]
    assert all(head.split()[1].startswith("/models") for head in proxy.asked)
    assert "x-amz-checksum-crc32" not in sent(proxy, "PUT")
    assert "x-amz-checksum-mode" not in sent(proxy, "GET")


def test_attempts_are_as_many_as_the_environment_says(s3, proxy, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    proxy.cuts = [0] * 5
    with pytest.raises(RecipeError, match="no answer"):
        check_address("model.source", "s3://models/nothing")
    assert len(proxy.asked) == 2


def test_a_recipe_in_s3_is_read_and_its_mistakes_are_named_without_torch(s3, prefix):
    s3.put_object(Bucket="models", Key=f"{prefix}/good.yaml", Body=to_yaml(load_recipe("tiny")).encode())
    s3.put_object(Bucket="models", Key=f"{prefix}/bad.yaml", Body=b"train:\n  steps: 1\n  steps: 2\n")
    program = (
        "import sys; from mtp_ce.training.cli.train import main\n"
        "codes = [main([f's3://models/{sys.argv[1]}/{name}.yaml', 'train.steps=777', '--print-config'])"
        " for name in ('good', 'bad', 'none')]\n"
        "print(codes, [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program, prefix], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "steps: 777" in run.stdout, run.stderr
    assert run.stdout.endswith("[0, 2, 2] []\n")
    bad, none = run.stderr.splitlines()
    assert bad.startswith(f"train-mtp: error: recipe s3://models/{prefix}/bad.yaml, line 3: key 'steps' is given twice")
    assert none == (
        f"train-mtp: error: recipe 's3://models/{prefix}/none.yaml' can't be read: there is no such object (NoSuchKey)"
    )


@pytest.fixture
def workplace(s3, small, corpus_folder, tmp_path, monkeypatch) -> Path:
    """What the page's commands refer to: an untrained model, a recipe that begins with it, texts and settings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from mtp_ce import MTPWrapper
    from mtp_ce.training.data.corpus import texts
    from mtp_ce.training.data.reader import read_corpus
    from mtp_ce.training.data.tokenizer import load_tokenizer

    monkeypatch.chdir(tmp_path)
    shutil.copytree(corpus_folder, "my/texts")
    overrides = ["data.corpus=my/texts", "train.steps=2", "train.batch_size=2", "optimizer.warmup_steps=0"]
    recipe = small([*overrides, "train.log_every=1", "validation.every=null", "data.vocab_size=300"])
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    MTPWrapper(LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)), 3).save_pretrained("first")
    load_tokenizer(texts(read_corpus(recipe.data).train), 300).save_pretrained("first")
    for path in Path("first").iterdir():
        s3.upload_file(str(path), "models", f"first/{path.name}")
    pretrained = "model={kind: pretrained, source: 's3://models/first', mtp: {horizon: 3}}"
    Path("tiny.yaml").write_text(to_yaml(recipe))
    made = to_yaml(load_recipe("tiny.yaml", [pretrained, "data.vocab_size=null"]))
    s3.put_object(Bucket="models", Key="recipes/first.yaml", Body=made.encode())
    profile = re.search(r"```ini\n(.*?)```", PAGE, re.DOTALL)[1]
    Path("my/aws.ini").write_text(profile.replace("http://127.0.0.1:9000", s3.meta.endpoint_url))
    return tmp_path


def test_every_command_of_the_page_does_what_it_says(s3, workplace, monkeypatch, capsys):
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    assert len(lines) > 6
    for name, *words in lines:
        if name == "export":
            variable, _, value = words[0].partition("=")
            monkeypatch.setenv(variable, value)
        else:
            assert PROGRAMS[name](words) == 0, (name, words, capsys.readouterr())
    assert Path("runs/second/model/config.json").is_file()
    assert json.loads(Path("runs/measured/evaluation.json").read_text())
    assert (Path("heads-of-first") / "mtp_heads.json").read_bytes() == Path("first/mtp_heads.json").read_bytes()
    exported = fetch_folder("model.source", "s3://models/exported")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in exported.iterdir()}
    assert s3.get_object(Bucket="models", Key=f"exported/{MANIFEST}")
    secrets = subprocess.run(["grep", "-rl", "testsecret123", "runs"], cwd=workplace, capture_output=True, text=True)
    assert secrets.stdout == ""
    capsys.readouterr()
    assert export_cli.main(["runs/first", "base", "s3://models/exported"]) == 2
    assert "there are objects at this address already" in capsys.readouterr().err
    assert eval_cli.main(["s3://models/nothing", "--output", "new"]) == 2
    assert "CHECKPOINT 's3://models/nothing' can't be read" in capsys.readouterr().err
    assert not os.path.exists("new")


def test_a_model_whose_tensors_were_cut_off_is_one_line(s3, workplace, capsys):
    """Nobody's manifest says how long the object was."""
    cut = Path("first/model.safetensors").read_bytes()[:-1]
    s3.put_object(Bucket="models", Key="first/model.safetensors", Body=cut)
    for program, words in ((eval_cli.main, []), (cli.main, ["s3://models/recipes/first.yaml"])):
        address = [] if words else ["s3://models/first", "data.corpus=my/texts", "data.holdout_fraction=0.2"]
        assert program([*words, *address, "tracking.kind=none", "--output", "new"]) == 2
        said = capsys.readouterr().err
        assert "'s3://models/first' has a model.safetensors that is damaged or not whole" in said
    assert not Path("new").exists()
