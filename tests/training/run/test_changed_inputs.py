"""A run that is resumed with other inputs says which of them have changed."""

from __future__ import annotations

import json
import shutil

import pytest
from rich.console import Console

from mtp_ce.training.data.tokenizer import train_tokenizer
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.loop import checkpoint
from mtp_ce.training.run import pipeline

SHORT = ["train.steps=2", "optimizer.warmup_steps=1", "checkpoint.every=1", "validation.decoding={prompts: 0}"]


def test_a_changed_corpus_or_tokenizer_is_named_as_such(small, corpus_folder, tmp_path):
    folder, run = tmp_path / "corpus", tmp_path / "run"
    shutil.copytree(corpus_folder, folder)
    recipe = small([*SHORT, f"data.corpus={folder}"])
    pipeline.train(recipe, run, Console(quiet=True))
    train_tokenizer(["a tokenizer of two words"], 265).save_pretrained(tmp_path / "other")
    other = small([*SHORT, f"data.corpus={folder}", f"data.tokenizer={tmp_path}/other"])
    with pytest.raises(RecipeError, match="was trained on another tokenizer; resume with the one"):
        pipeline.train(other, run, Console(quiet=True), resume=True)
    kept = {state_file: state_file.read_text() for state_file in (run / "checkpoints").glob("*/state.json")}
    for state_file, text in kept.items():  # as earlier versions wrote it
        state = json.loads(text)
        del state["sha256"]
        assert state["decided"].pop("rows.halos") == [0, recipe.model.mtp.horizon]
        state_file.write_text(json.dumps(state | {"sha256": checkpoint._digest(state)}))
    with pytest.raises(
        RecipeError, match="of a version whose packed rows lose the targets at their end; finish the run"
    ):
        pipeline.train(recipe, run, Console(quiet=True), resume=True)
    for state_file, text in kept.items():
        state_file.write_text(text)
    (folder / "json" / "more.py").write_text("more = True\n")
    with pytest.raises(RecipeError, match=r"was trained on another corpus: the documents of .*have changed"):
        pipeline.train(recipe, run, Console(quiet=True), resume=True)
