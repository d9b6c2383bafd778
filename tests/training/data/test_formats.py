"""Formats of rows: each gives the same documents, compressed or not, with a byte order mark or without."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.data.corpus import Corpus, texts
from mtp_ce.training.data.reader import read_corpus
from mtp_ce.training.errors import RecipeError

# With what a format has to quote, and longer than what Python's csv accepts by default.
TEXTS = [f'text {i}, "quoted"{chr(10) * (i % 2)} and é' for i in range(60)] + ["long " * 30_000]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def read(corpus: Path | str, **options) -> Corpus:
    return read_corpus(DataConfig(**{"corpus": str(corpus), "holdout_fraction": 0.2, **options}))


def both(corpus: Corpus) -> list[str]:
    return sorted([*texts(corpus.train), *texts(corpus.held_out)])


def as_csv(rows: list[dict]) -> str:
    file = io.StringIO()
    table = csv.DictWriter(file, rows[0])
    table.writeheader()
    table.writerows(rows)
    return file.getvalue()


ROWS = [{"n": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "\n".join(map(json.dumps, ROWS))
FORMS = {
    "jsonl": LINES,
    "ndjson": LINES,
    "json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "lines.json": LINES,
    "csv": as_csv(ROWS),
}
COMPRESSED = {"": bytes, ".gz": gzip.compress, ".zst": lambda content: pa.compress(content, "zstd", asbytes=True)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compressed", COMPRESSED)
def test_every_format_gives_the_same_documents(tmp_path, form, compressed):
    """On the same sides; with Windows' byte order mark, too."""
    found = []
    for folder, mark in (("plain", ""), ("marked", "\ufeff")):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / f"a.{form}{compressed}"
        path.write_bytes(COMPRESSED[compressed]((mark + FORMS[form]).encode()))
        found.append(read(path))
    found.append(read(tmp_path / "marked", suffix=f".{form.rpartition('.')[2]}{compressed}"))
    for corpus in found:
        assert both(corpus) == sorted(TEXTS)
        assert [*texts(corpus.held_out)] == [*texts(found[0].held_out)]
        assert corpus.digest == found[0].digest


@pytest.mark.parametrize("compressed", COMPRESSED)
def test_texts_may_be_compressed_and_marked_too(tmp_path, compressed):
    one_line = [text.replace("\n", "") for text in TEXTS]
    lines = COMPRESSED[compressed]("\r\n".join(["\ufeff" + one_line[0], *one_line[1:]]).encode())
    (tmp_path / f"a.txt{compressed}").write_bytes(lines)
    assert both(read(tmp_path / f"a.txt{compressed}")) == sorted(one_line)
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(one_line):
        (tmp_path / "texts" / f"{i}.md{compressed}").write_bytes(COMPRESSED[compressed](f"\ufeff{text}".encode()))
    assert both(read(tmp_path / "texts", suffix=f".md{compressed}")) == sorted(one_line)


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "a list that does not end": ("a.json", b'[{"text": "x"}, {"text": "y"}', r"a\.json: not JSON .*, after 2 objects"),
    "a list without commas": ("a.json", b'[{"text": "x"} {"text": "y"}]', r"after 1 objects: expected ',' or '\]'"),
    "text after a list": ("a.json", b'[{"text": "x"}] 1', "after 1 objects: the list does not end, or text follows"),
    "no objects": ("a.json", b'["x"]', "a.json, object 1: holds a str; expected an object"),
    "a list around a list": ("a.json", b'{"data": [{"text": "x"}]}', "object 1: no field 'text' .*; it has 'data'"),
    "null": ("a.json", b"[null]", "object 1: holds a NoneType"),
    "another encoding": ("a.json", b'[{"text": "\xe9"}]', "a.json can't be read: not UTF-8"),
    "no such column": ("a.csv", b"n,body\n1,x\n", "a.csv, line 2: no field 'text' .*; it has 'n', 'body'"),
    "too few values": ("a.csv", b"text,n\nx,1\ny\n", r"line 3: has not as many values as there are fields \(2\)"),
    "too many values": ("a.csv", b"text,n\nx,1\ny,2,3\n", "line 3: has not as many values"),
    "a quote that does not end": ("a.csv", b'text,n\n"x,1\n', "a.csv, line 2: not CSV that can be read"),
    "lines of an old Mac": ("a.csv", b"text,n\rx,1\ry,2\r", "a.csv.*not CSV that can be read"),
    "no table": ("a.parquet.gz", gzip.compress(b"x"), "a.parquet.gz: can't be read as parquet"),
    "no gzip": ("a.jsonl.gz", b'{"text": "x"}', r"a.jsonl.gz can't be read"),
    "nothing, as of a failed download": ("a.jsonl.gz", b"", r"a.jsonl.gz can't be read: it is empty"),
    "half of a gzip": ("a.jsonl.gz", gzip.compress(LINES.encode())[:500], r"a.jsonl.gz can't be read"),
    "half of a zst": ("a.jsonl.zst", COMPRESSED[".zst"](LINES.encode())[:-9], r"a.jsonl.zst can't be read"),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_what_is_no_such_format_is_one_line_with_its_place(tmp_path, mistake):
    name, content, expected = BROKEN[mistake]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=expected) as raised:
        read(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_an_instruction_has_an_input(tmp_path):
    """Alpaca's rows; an input that is empty, or null as in a table, is no paragraph."""
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say hello.", "input": "", "output": "hello"},
        {"instruction": "Say bye.", "input": None, "output": "bye"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text(json.dumps([{"instruction": "x", "input": "", "output": "y"}]))
    fields = {"prompt_field": "instruction", "input_field": "input", "completion_field": "output"}
    corpus = read(tmp_path / "a.parquet", validation_corpus=str(tmp_path / "b.json"), **fields)
    assert [(document.prompt, document.text) for document in corpus.train] == [
        ("Add.\n\n1 and 2\n\n", "3"),
        ("Say hello.\n\n", "hello"),
        ("Say bye.\n\n", "bye"),
    ]
    (tmp_path / "b.json").write_text(json.dumps([{"instruction": "x", "output": "y"}]))
    with pytest.raises(RecipeError, match=r"b.json, object 1: no field 'input' \(data.input_field\)"):
        read(tmp_path / "a.parquet", validation_corpus=str(tmp_path / "b.json"), **fields)
