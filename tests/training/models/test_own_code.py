"""A model folder with Python code of its own: the code never runs, and one line says how to load such a model."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from mtp_ce import MTPWrapper
from mtp_ce.training.cli import evaluate as eval_cli
from mtp_ce.training.cli import export as export_cli
from mtp_ce.training.cli import train as cli

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).touch()

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig

class MineTokenizer(PreTrainedTokenizerFast):
    pass
"""

OWN_MODEL = {
    "model_type": "mine",
    "architectures": ["MineForCausalLM"],
    "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"},
}
OWN_TOKENIZER = {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": [None, "mine.MineTokenizer"]}}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the code would make; whoever is asked whether it may run says yes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    return tmp_path / "the code ran"


@pytest.fixture
def folder(marker: Path, finished_run) -> Path:
    """A model with heads and tokenizer, as a run leaves it, and a file of code."""
    shutil.copytree(finished_run.folder / "model", "folder")
    # Nobody's manifest lists the files of a model from elsewhere.
    Path("folder/.mtp_files.json").unlink()
    Path("folder/mine.py").write_text(CODE.format(marker=str(marker)))
    return Path("folder")


def change(file: Path, values: dict) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


NEVER = "needs Python code that comes with it, which is never run; load it yourself, with transformers and"
PRETRAINED = ["data.vocab_size=null", "model={kind: pretrained, source: ./folder, mtp: {horizon: 3}}"]
REFERENCE = ["data.vocab_size=512", "reference={source: ./folder}", "scorer={name: rho1_excess}"]


def commands(corpus: Path) -> dict[str, tuple]:
    """Every command that reads a model, and how its complaint begins."""
    common = [f"data.corpus={corpus}", "data.holdout_fraction=0.2", "tracking.kind=none"]
    return {
        "model.source": (cli.main, ["tiny", *common, *PRETRAINED, "--output", "out"]),
        "reference.source": (cli.main, ["tiny", *common, *REFERENCE, "--output", "out"]),
        "CHECKPOINT": (eval_cli.main, ["./folder", *common, "--output", "out"]),
    }


@pytest.mark.parametrize("key", ["model.source", "reference.source", "CHECKPOINT"])
def test_the_code_of_a_model_never_runs(key, folder, marker, corpus_folder, capsys):
    change(folder / "config.json", OWN_MODEL)
    main, words = commands(corpus_folder)[key]
    assert main(words) == 2
    complained = capsys.readouterr().err
    assert f"error: {key} './folder' {NEVER}" in complained.replace("'folder'", "'./folder'")
    assert "mtp_ce.MTPWrapper(model, horizon)" in complained
    assert complained.count("\n") == 1
    assert not marker.exists()
    assert not Path("out").exists()


@pytest.mark.parametrize("key", ["model.source", "CHECKPOINT"])
def test_the_code_of_a_tokenizer_never_runs(key, folder, marker, corpus_folder, capsys):
    change(folder / "tokenizer_config.json", OWN_TOKENIZER)
    main, words = commands(corpus_folder)[key]
    assert main(words) == 2
    complained = capsys.readouterr().err
    assert NEVER in complained
    assert complained.count("\n") == 1
    assert not marker.exists()


def test_the_code_of_a_checkpoint_is_not_run_by_its_export(folder, marker, capsys):
    change(folder / "config.json", OWN_MODEL)
    assert export_cli.main(["folder", "base", "new"]) == 2
    complained = capsys.readouterr().err
    assert complained.startswith("export-mtp: error: folder can't be loaded: ")
    assert "folder needs Python code from its own files, which is not run" in complained
    assert complained.count("\n") == 1
    assert not marker.exists()


def test_the_library_does_not_run_it_either_unless_it_is_told_to(folder, marker):
    change(folder / "config.json", OWN_MODEL)
    with pytest.raises(ValueError, match=r"is not run\. Read it; then load the model .* MTPWrapper\(model, horizon\)"):
        MTPWrapper.from_pretrained(folder)
    assert not marker.exists()
    wrapper = MTPWrapper.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()
    assert type(wrapper.causal).__name__ == "MineForCausalLM"


def test_a_model_of_transformers_needs_no_code_whatever_lies_beside_it(folder, marker):
    """Many models of the hub name code of older days, and transformers has their class itself."""
    change(folder / "config.json", {"auto_map": {"AutoModelForCausalLM": "mine.MineForCausalLM"}})
    from mtp_ce.training.models.sources import check_config

    assert check_config("model.source", "folder", folder, "language model", None) == 512
    assert type(MTPWrapper.from_pretrained(folder).causal) is LlamaForCausalLM
    assert not marker.exists()


def test_the_advice_works(folder, marker):
    """Load it yourself with transformers and wrap it."""
    from transformers import AutoModelForCausalLM

    change(folder / "config.json", OWN_MODEL)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert MTPWrapper(model, 3).horizon == 3
    assert isinstance(model.config, LlamaConfig)
