"""A data reader from outside the package: one file, named in the recipe as docs/data.md says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mtp_ce.training.config.recipe import load_recipe
from mtp_ce.training.data.corpus import texts
from mtp_ce.training.data.reader import read_corpus
from mtp_ce.training.run.folder import decided_by

OWN = ["data.reader=my_readers:Diary", "data.corpus=diary.txt", "tracking.kind=none"]
ENTRIES = [f"Day {i}\nI walked {i} miles,\n\nand {i * i % 7} more." for i in range(60)]


@pytest.fixture
def my_readers(beside: Path, module_of_page) -> Path:
    """The module of the page, importable, and a file for it."""
    (beside / "my_readers.py").write_text(module_of_page("data.md", "my_readers.py"))
    (beside / "diary.txt").write_text("\n---\n".join(ENTRIES))
    return beside


def test_a_reader_of_ones_own_is_what_a_run_trains_on(my_readers, train, capsys, metrics):
    assert train(*OWN, "--output", "out") == 0
    corpus = read_corpus(load_recipe("tiny", [*OWN, "data.holdout_fraction=0.2"]).data)
    assert sorted([*texts(corpus.train), *texts(corpus.held_out)]) == sorted(ENTRIES)
    assert 0 < len(corpus.held_out) < 30
    # The lines of the same file would be 240 documents.
    assert f"{len(corpus.train)} documents to train on, {len(corpus.held_out)} held out" in capsys.readouterr().out
    assert [line["step"] for line in metrics()[:3]] == [1, 2, 3]
    assert all(line["train/loss"] > 0 for line in metrics()[:3])


def test_documents_are_read_again_when_the_file_or_the_reader_has_changed(my_readers):
    data = load_recipe("tiny", [*OWN, "data.holdout_fraction=0.2"]).data
    digests = {read_corpus(data).digest, read_corpus(data).digest}
    assert len(digests) == 1
    (my_readers / "diary.txt").write_text("\n---\n".join(ENTRIES[:50]))
    assert len(digests | {read_corpus(data).digest}) == 2
    module = my_readers / "my_readers.py"
    module.write_text(module.read_text().replace("Document(", "Document('new ' + "))
    del sys.modules["my_readers"]
    assert read_corpus(data).train[0].path.startswith("new ")


def test_what_validates_is_not_trained_on_whatever_reads_it(my_readers):
    (my_readers / "held_out.txt").write_text("\n---\n".join(ENTRIES[:10]))
    corpus = read_corpus(load_recipe("tiny", [*OWN, "data.validation_corpus=held_out.txt"]).data)
    assert [*texts(corpus.train)] == ENTRIES[10:]
    assert corpus.shared == 10


def test_a_dry_run_names_the_reader_and_writes_nothing(my_readers, train, capsys, files_below):
    before = files_below(my_readers)
    assert train(*OWN, "--dry-run") == 0
    assert "corpus      diary.txt, read by Diary, 20.0% held out" in capsys.readouterr().out
    assert files_below(my_readers) == before


def test_a_resumed_run_may_have_another_reader_of_the_same_documents(my_readers):
    """What was read is hashed with a checkpoint's inputs; checkpoints of runs without the key stay valid."""
    assert decided_by(load_recipe("tiny", OWN)) == decided_by(load_recipe("tiny"))


MISTAKES = {
    "no module": (["data.reader=my_missing:Reader"], "data.reader is 'my_missing:Reader', which can't be loaded"),
    "no class": (["data.reader=my_readers:Missing"], "data.reader is 'my_readers:Missing', which can't be loaded"),
    "no class path": (["data.reader=jsonl"], "expected a class of your own as package.module:Class, or null"),
    "no file": (["data.reader=my_readers:Diary", "data.corpus=gone.txt"], "data.corpus is 'gone.txt'"),
    "no reader": (["data.reader=pathlib:PurePath", "data.corpus=a"], "does not accept data.corpus 'a' (TypeError"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_reader_that_can_not_be_built_costs_one_line(my_readers, train, capsys, files_below, mistake):
    overrides, expected = MISTAKES[mistake]
    before = files_below(my_readers)
    assert train("data.corpus=diary.txt", "tracking.kind=none", *overrides, "--output", "out") == 2
    printed, error = capsys.readouterr()
    assert (printed, error.count("\n")) == ("", 1)
    assert error.startswith("train-mtp: error: ")
    assert expected in error
    assert files_below(my_readers) == before
