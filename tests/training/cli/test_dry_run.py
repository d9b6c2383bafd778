"""`train-mtp --dry-run` sizes a run, says what it can't reach, takes seconds and writes nothing."""

from __future__ import annotations

import ctypes
import gc
import io
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from mtp_ce.training.cli import train as cli
from mtp_ce.training.config.recipe import load_recipe
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.run import dry_run as module
from mtp_ce.training.tracking import mlflow

SEVEN_BILLION = [
    "model.hidden_size=4096",
    "model.intermediate_size=11008",
    "model.layers=32",
    "model.attention_heads=32",
    "model.kv_heads=32",
    "data.vocab_size=32000",
    "data.sequence_length=4096",
    "train.device=cpu",
]


@pytest.fixture
def dry(tmp_path, monkeypatch) -> Callable[[Recipe], dict[str, str]]:
    """Describe a recipe in an empty folder, which stays empty; its lines by their first word."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / "no-cache"))

    def run(recipe: Recipe) -> dict[str, str]:
        said = io.StringIO()
        module.dry_run(recipe, Path("runs") / "one", Console(file=said, width=500))
        assert list(tmp_path.iterdir()) == []
        assert not (tmp_path.parent / "no-cache").exists()
        found: dict[str, str] = {}
        key = ""
        for line in said.getvalue().splitlines():
            key = line[:12].strip() or key
            found[key] = found.get(key, "") + line[12:] + "\n"
        return found

    return run


def status(name: str) -> int:
    line = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert line
    return int(line[1]) * 1024


def test_seven_billion_parameters_take_seconds_and_no_memory(dry):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, started = status("VmRSS"), time.monotonic()
    said = dry(load_recipe("tiny", SEVEN_BILLION))
    assert time.monotonic() - started < 10
    assert status("VmHWM") - before < 300e6
    layer, head = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096, 4096**2 + 4096
    trunk = 2 * 32000 * 4096 + 32 * layer + 4096
    assert f"{trunk + 3 * head:,} parameters: trunk {trunk:,}, extra heads {3 * head:,}" in said["model"]
    # fp32, and AdamW's two means.
    assert f"weights {4 * (trunk + 3 * head) / 1e9:.1f} GB" in said["memory"]
    assert f"optimizer {8 * (trunk + 3 * head) / 1e9:.1f} GB" in said["memory"]
    assert "4 x 4096 tokens at a time" in said["memory"]
    # 65536 rows of 32000 logits, and the gradients of hidden states and unembedding.
    assert f"logits {(65536 * 32000 + 65536 * 4096 + 32000 * 4096) * 4 / 1e9:.1f} GB" in said["loss"]


def test_a_scorer_and_its_models_are_part_of_the_cost(dry):
    weighted, uniform = dry(load_recipe("rho1")), dry(load_recipe("tiny"))
    assert "scoring" not in uniform["compute"] + uniform["memory"]
    assert "scoring 6.2 MFLOP" in weighted["compute"]
    # The reference is as large as the trunk, and has no extra heads.
    reference = 2 * 8192 * 128 + 4 * (4 * 128**2 + 3 * 128 * 384 + 2 * 128) + 128
    assert f"scoring {reference * 4 / 1e6:.1f} MB" in weighted["memory"]
    assert "600 steps of 8" in weighted["reference"]
    critic = dry(load_recipe("critic", ["data.noise.share=0.25"]))
    assert "25.0% of the tokens to train on: whole documents of permuted tokens" in critic["noise"]
    assert "noise" not in weighted
    assert "500 steps of 16" in critic["critic"]
    assert f"scoring {(reference - 8192 * 128) * 4 / 1e6:.1f} MB" in critic["memory"]


def test_weights_made_before_training_cost_the_training_nothing(dry, finished_run, corpus_folder):
    model = finished_run.folder / "model"
    named = [f"reference.source={model}", f"scorer={{name: rho1_excess, current: {model}}}", f"data.tokenizer={model}"]
    data = ["data.vocab_size=512", f"data.corpus={corpus_folder}", "data.holdout_fraction=0.2"]
    online = dry(load_recipe("rho1", [*named, *data]))
    assert "scoring" in online["compute"]
    assert "scoring" not in dry(load_recipe("rho1", [*named, *data, "precompute_weights=true"]))["compute"]


def test_a_model_in_a_gguf_file_is_sized_before_it_is_converted(dry):
    said = dry(load_recipe("smollm2"))
    assert "135,512,064 parameters: trunk 134,515,008, extra heads 997,056; only the heads are trained" in said["model"]
    # Trained as fp32, whatever the file has.
    assert "weights 542.0 MB, gradients 4.0 MB, optimizer 8.0 MB" in said["memory"]


def test_a_model_that_is_not_here_is_not_fetched(dry):
    said = dry(load_recipe("smollm2", ["model.source=nobody/no-such-model"]))
    assert "a dry run downloads nothing" in said["model"]
    assert "memory" not in said


def test_ranks_share_the_model_and_one_of_them_speaks(dry, monkeypatch):
    alone = dry(load_recipe("tiny"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    first = dry(load_recipe("tiny"))
    assert "weights 12.0 MB" in alone["memory"]
    assert "a rank of 2, 2 x 128 tokens at a time: weights 6.0 MB" in first["memory"]
    assert "2 ranks" in first["device"]
    with pytest.raises(RecipeError, match=r"train\.batch_size 3 is not divisible by 2 ranks"):
        dry(load_recipe("tiny", ["train.batch_size=3"]))
    with pytest.raises(RecipeError, match="batch_size 7 is not divisible"):
        dry(load_recipe("rho1", ["reference.train.batch_size=7"]))
    for weighted in ("rho1", "critic"):
        assert "scoring" in dry(load_recipe(weighted))["memory"]


def test_ranks_that_share_layers_hold_a_part_of_the_logits_too(dry, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    apart, shared = (dry(load_recipe("tiny", [f"train.tensor_parallel={n}"])) for n in (1, 2))
    assert "4 ranks, groups of 2 share the layers" in shared["device"]
    assert "weights 3.0 MB" in apart["memory"]
    # The residual heads and the norms are whole in each group: 3 x (128 x 128 + 128) and 9 x 128 numbers.
    small = 4 * (3 * (128 * 128 + 128) + 9 * 128)
    weights = (4 * 2_999_808 - small) / 4 + small / 2
    assert f"weights {weights / 1e6:.1f} MB" in shared["memory"]
    assert "1 x 128 tokens at a time" in apart["memory"]
    assert "2 x 128 tokens at a time" in shared["memory"]
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(RecipeError, match=r"train\.tensor_parallel is 8, but num_attention_heads of .* is 4; give"):
        dry(load_recipe("tiny", ["train.tensor_parallel=8", "train.batch_size=8"]))
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(RecipeError, match=r"tensor_parallel 2 does not divide the 1 rank of this run; start a multi"):
        dry(load_recipe("tiny", ["train.tensor_parallel=2"]))
    monkeypatch.setenv("RANK", "1")
    assert dry(load_recipe("tiny")) == {}


def test_a_file_that_cannot_be_read_is_named(dry, corpus_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "corpus"
    shutil.copytree(corpus_folder, folder)
    (folder / "gone.py").symlink_to("nowhere.py")
    with pytest.raises(RecipeError, match=r"gone\.py, which can't be read"):
        dry(load_recipe("tiny", [f"data.corpus={folder}", "data.holdout_fraction=0.2"]))


@pytest.fixture
def server():
    """A web server that answers with the status of its path's first part."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(self.path.split("/")[1]))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    serving = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://me:s3cr3t@127.0.0.1:{serving.server_port}"
    serving.shutdown()
    serving.server_close()


def test_a_tracking_server_that_is_well_is_where_to_look(dry, server):
    said = dry(load_recipe("tiny", [f"tracking.uri={server}/200"]))["tracking"]
    # The address of its pages, which `mlflow ui` can not open.
    assert said.strip() == f"{server}/200".replace("me:s3cr3t@", "")


def test_a_tracking_server_that_is_down_is_a_line_and_no_error(dry, server, monkeypatch):
    monkeypatch.setattr(mlflow, "CHECK_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as hangs:
        uris = {
            "[Errno": "http://127.0.0.1:9",
            "timed out": f"http://127.0.0.1:{hangs.getsockname()[1]}",
            "it answers 503": f"{server}/503",
            "there is no folder nowhere": "sqlite:///nowhere/mlflow.db",
        }
        for why, uri in uris.items():
            said = dry(load_recipe("tiny", [f"tracking.uri={uri}"]))["tracking"]
            assert f"not reachable: {why}" in said
            assert "training would continue with metrics.jsonl" in said
            assert "s3cr3t" not in said


def test_an_address_in_s3_that_does_not_answer_is_a_mistake(tmp_path, monkeypatch, capsys):
    """No one listens on port 9; the answer comes from boto3 itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    assert cli.main(["rho1", "reference.source=s3://bucket/model", "--dry-run"]) == 2
    said, complained = capsys.readouterr()
    assert said == ""
    assert complained.startswith("train-mtp: error: reference.source 's3://bucket/model'")
    assert complained.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
