"""No document of the validation corpus is trained on, whatever kinds of sources the two are."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.data.corpus import Corpus, texts
from mtp_ce.training.data.reader import read_corpus
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.run.inputs import read_inputs

OURS = [f"to train on: {i}" for i in range(40)]
THEIRS = [f"to validate on: {i}" for i in range(30)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_parquet(path: Path, rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": rows}), path)


def write_json(path: Path, rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))


def write_texts(folder: Path, rows: list[str], ends: str = "\n", before: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(rows):
        (folder / f"{i}.txt").write_bytes(f"{before}{text}\n".replace("\n", ends).encode())


def glob_of_tables(here: Path) -> dict[str, str]:
    """The line of docs/data.md."""
    write_parquet(here / "my" / "a.parquet", OURS)
    write_parquet(here / "my" / "held_out.parquet", THEIRS)
    return {"corpus": f"{here}/my/*.parquet", "validation_corpus": f"{here}/my/held_out.parquet"}


def folder_of_tables(here: Path) -> dict[str, str]:
    write_json(here / "my" / "a.jsonl", OURS)
    write_json(here / "my" / "deep" / "held_out.jsonl", THEIRS)
    return {"corpus": f"{here}/my", "validation_corpus": f"{here}/my/deep", "suffix": ".jsonl"}


def link_to_the_file(here: Path) -> dict[str, str]:
    write_json(here / "my" / "a.jsonl", OURS)
    write_json(here / "held_out.jsonl", THEIRS)
    (here / "my" / "b.jsonl").symlink_to(here / "held_out.jsonl")
    return {"corpus": f"{here}/my/*.jsonl", "validation_corpus": f"{here}/held_out.jsonl"}


def linked_folder(here: Path) -> dict[str, str]:
    write_json(here / "my" / "a.jsonl", OURS)
    write_json(here / "held_out" / "a.jsonl", THEIRS)
    (here / "my" / "validation").symlink_to(here / "held_out")
    return {"corpus": f"{here}/my", "validation_corpus": f"{here}/held_out/a.jsonl", "suffix": ".jsonl"}


def copy_of_the_file(here: Path) -> dict[str, str]:
    write_json(here / "my" / "a.jsonl", OURS)
    write_json(here / "held_out.jsonl", THEIRS)
    shutil.copy(here / "held_out.jsonl", here / "my" / "other name.jsonl")
    return {"corpus": f"{here}/my/*.jsonl", "validation_corpus": f"{here}/held_out.jsonl"}


def some_rows_of_another_format(here: Path) -> dict[str, str]:
    write_json(here / "a.jsonl", [*OURS[:20], *THEIRS, *OURS[20:], *THEIRS])
    (here / "held_out.csv").write_text("number,text\n" + "".join(f"1,{text}\n" for text in THEIRS))
    return {"corpus": f"{here}/a.jsonl", "validation_corpus": f"{here}/held_out.csv"}


def compressed_copy(here: Path) -> dict[str, str]:
    write_json(here / "a.jsonl", [*OURS, *THEIRS])
    (here / "held_out.txt.gz").write_bytes(gzip.compress("\n".join(THEIRS).encode()))
    return {"corpus": f"{here}/a.jsonl", "validation_corpus": f"{here}/held_out.txt.gz"}


def lines_that_are_files(here: Path) -> dict[str, str]:
    write_texts(here / "my", [*OURS, *THEIRS])
    (here / "held_out.txt").write_text("\n".join(THEIRS))
    return {"corpus": f"{here}/my", "validation_corpus": f"{here}/held_out.txt", "suffix": ".txt"}


def files_that_are_lines(here: Path) -> dict[str, str]:
    write_texts(here / "held_out", THEIRS)
    (here / "a.txt").write_text("\n".join([*OURS, *THEIRS]))
    return {"corpus": f"{here}/a.txt", "validation_corpus": f"{here}/held_out", "suffix": ".txt"}


def files_of_another_editor(here: Path) -> dict[str, str]:
    write_texts(here / "my", [*OURS, *THEIRS], ends="\r\n", before="\ufeff")
    write_texts(here / "held_out", THEIRS)
    return {"corpus": f"{here}/my", "validation_corpus": f"{here}/held_out", "suffix": ".txt"}


def the_folder_around_it(here: Path) -> dict[str, str]:
    write_texts(here / "my", OURS)
    write_texts(here / "my" / "held_out", THEIRS)
    return {"corpus": f"{here}/my", "validation_corpus": f"{here}/my/held_out", "suffix": ".txt"}


SOURCES: list[Callable[[Path], dict[str, str]]] = [
    glob_of_tables, folder_of_tables, link_to_the_file, linked_folder, copy_of_the_file, some_rows_of_another_format,
    compressed_copy, lines_that_are_files, files_that_are_lines, files_of_another_editor, the_folder_around_it,
]  # fmt: skip


def stripped(documents) -> list[str]:
    return sorted(text.strip() for text in texts(documents))


@pytest.mark.parametrize("sources", SOURCES, ids=lambda sources: sources.__name__)
def test_what_validates_is_never_trained_on(tmp_path, sources):
    data = DataConfig(**sources(tmp_path))
    for _ in ("read", "cached"):
        corpus = read_corpus(data)
        assert stripped(corpus.train) == sorted(OURS)
        assert stripped(corpus.held_out) == sorted(THEIRS)
        assert corpus.shared == corpus.skipped == (60 if sources is some_rows_of_another_format else 30)


def test_prompts_and_completions_are_compared_together(tmp_path):
    """The same answer to another question is another row."""
    rows = [{"p": f"question {i}", "c": "yes"} for i in range(6)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    paths = {"corpus": str(tmp_path / "a.jsonl"), "validation_corpus": str(tmp_path / "b.jsonl")}
    corpus = read_corpus(DataConfig(**paths, prompt_field="p", completion_field="c"))
    assert [document.prompt for document in corpus.train] == [f"question {i}" for i in range(2, 6)]


def test_another_validation_corpus_is_another_training_corpus(tmp_path):
    """Cached rows are those without the rows of one validation corpus."""
    write_json(tmp_path / "a.jsonl", [*OURS, *THEIRS])

    def read(rows: list[str] | None) -> Corpus:
        write_json(tmp_path / "b.jsonl", rows or [])
        validation = str(tmp_path / "b.jsonl") if rows else None
        paths = {"corpus": str(tmp_path / "a.jsonl"), "validation_corpus": validation}
        return read_corpus(DataConfig(**paths, holdout_fraction=0.3))

    digests = set()
    for rows in (THEIRS[:10], THEIRS[10:], ["another one"]):
        corpus = read(rows)
        assert not set(texts(corpus.train)) & set(rows)
        assert len(corpus.train) == 70 - corpus.shared
        digests.add(corpus.digest)
    assert len(read(None).train) + len(read(None).held_out) == 70
    assert len(digests) == 3


def test_a_corpus_that_validation_reads_whole_is_refused(tmp_path):
    write_json(tmp_path / "a.jsonl", THEIRS)
    path = str(tmp_path / "a.jsonl")
    with pytest.raises(RecipeError, match=r"0 readable documents to train on \(30 more are in data.validation_corpus"):
        read_corpus(DataConfig(corpus=path, validation_corpus=path))


def test_a_run_says_how_many_documents_it_leaves_out(small, tmp_path):
    write_json(tmp_path / "a.jsonl", [*OURS * 20, *THEIRS])
    write_json(tmp_path / "b.jsonl", THEIRS)
    printed = io.StringIO()
    data = [f"data.corpus={tmp_path}/a.jsonl", f"data.validation_corpus={tmp_path}/b.jsonl", "data.vocab_size=280"]
    read_inputs(small(data), Console(file=printed, width=200))
    assert (
        "corpus      800 documents to train on, 30 held out, 30 skipped (30 of them because validation"
        in printed.getvalue()
    )
