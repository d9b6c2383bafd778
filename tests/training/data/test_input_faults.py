"""Files that can't be read end a run in one line that names them, and what is not a file of the corpus ends nothing."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.data import files
from mtp_ce.training.data.corpus import Corpus, Excluded, texts
from mtp_ce.training.data.reader import find_reader, read_corpus
from mtp_ce.training.errors import RecipeError

TEXTS = [f"text number {i}" for i in range(60)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def read(corpus: Path | str, **options) -> Corpus:
    return read_corpus(DataConfig(**{"corpus": str(corpus), "holdout_fraction": 0.2, **options}))


def both(corpus: Corpus) -> list[str]:
    return sorted([*texts(corpus.train), *texts(corpus.held_out)])


def write_texts(folder: Path) -> Path:
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.py").write_text(text)
    return folder


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """Corpora of which something can't be read."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("pipes", "links", "closed", "lines"):
        write_texts(here / name)
        (here / name / "a.jsonl").write_bytes(LINES)
        (here / name / "t.txt").write_text("a line")
    os.mkfifo(here / "pipe.jsonl")
    os.mkfifo(here / "pipes" / "deep.py")
    os.mkfifo(here / "pipes" / "b.jsonl")
    for name in ("tokenizer.json", "additional_chat_templates/tools.jinja", "config.json"):
        (here / Path(name).stem / name).parent.mkdir(parents=True)
        os.mkfifo(here / Path(name).stem / name)
    (here / "links" / "gone.py").symlink_to("nowhere.py")
    (here / "links" / "round.jsonl").symlink_to("round.jsonl")
    return here


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "a pipe": (
        ["data.corpus=pipe.jsonl"],
        ["data.corpus is 'pipe.jsonl', a named pipe", "write its content to a file"],
    ),
    "a device": (["data.corpus=/dev/zero"], ["data.corpus is '/dev/zero', a named pipe, a socket or a device"]),
    "a pipe in a folder": (["data.corpus=pipes"], ["data.corpus has pipes/deep.py, which is a named pipe"]),
    "a pipe in a pattern": (["data.corpus=./pipes/*.jsonl"], ["pipes/b.jsonl, which is a named pipe"]),
    "a pipe that validates": (
        ["data.corpus=lines/a.jsonl", "data.validation_corpus=./pipes/*.jsonl"],
        ["data.validation_corpus has pipes/b.jsonl, which is a named pipe"],
    ),
    "a pipe in a tokenizer": (
        ["data.corpus=lines", "data.tokenizer=./tokenizer"],
        ["data.tokenizer './tokenizer' has tokenizer.json, which is a named pipe; write its content to a file"],
    ),
    "a pipe in a chat template": (
        ["data.corpus=lines", "data.tokenizer=./tools"],
        ["data.tokenizer './tools' has tools.jinja, which is a named pipe"],
    ),
    "a pipe in a model": (
        ["data.corpus=lines", "model.kind=pretrained", "model.source=./config"],
        ["model.source './config' has config.json, which is a named pipe"],
    ),
    "a link to nothing": (
        ["data.corpus=links"],
        ["data.corpus has links/gone.py, which can't be read: No such file", "it is a link to nowhere.py"],
    ),
    "a link to itself": (["data.corpus=./links/*.jsonl"], ["links/round.jsonl, which can't be read: Too many levels"]),
    "a user that is not there": (
        ["data.corpus=~nobody-of-this-name/x.jsonl"],
        ["data.corpus is '~nobody-of-this-name/x.jsonl'", "there is no user nobody-of-this-name"],
    ),
    "a path that is too long": ([f"data.corpus={'x' * 5000}"], ["data.corpus", "File name too long"]),
    "a pattern that is none": (["data.corpus=./lines/**x/*.jsonl"], ["data.corpus is './lines/**x/*.jsonl'"]),
    "chats in lines": (["data.corpus=lines/t.txt", "data.messages_field=m"], ["the lines of", "have no fields"]),
    "chats in files": (
        ["data.corpus=lines", "data.messages_field=m"],
        ["data.messages_field is 'm'", "have no fields"],
    ),
    "chats and prompts": (
        ["data.messages_field=m", "data.prompt_field=p", "data.completion_field=c"],
        ["messages_field and prompt_field are given"],
    ),
    "an input without a prompt": (["data.input_field=i"], ["input_field is given without prompt_field"]),
}


def test_what_can_not_be_read_is_answered_before_torch_is_imported(refused, workplace):
    refused("train-mtp", MISTAKES, workplace)


def test_a_null_character_is_one_line():
    with pytest.raises(RecipeError, match=r"data.corpus is .*, which can't be looked up: embedded null"):
        read("a\0b")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("closed", ["closed/3.py", "closed"])
def test_a_file_or_folder_without_permission_is_named(workplace, closed):
    (workplace / closed).chmod(0)
    try:
        with pytest.raises(RecipeError, match=rf"data\.corpus.*{closed}.*can't be read"):
            read(workplace / "closed")
    finally:
        (workplace / closed).chmod(0o755)


def test_locks_of_editors_are_no_files_of_a_corpus(tmp_path):
    """Emacs marks a file that is being edited by a link to nothing beside it."""
    folder = write_texts(tmp_path / "texts")
    (folder / ".#3.py").symlink_to("someone@here.1234:5678")
    assert both(read(folder)) == sorted(TEXTS)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_bytes(LINES)
    (tmp_path / "rows" / ".#a.jsonl").symlink_to("someone@here.1234:5678")
    assert both(read(tmp_path / "rows", suffix=".jsonl")) == sorted(TEXTS)
    assert both(read(tmp_path / "rows" / "*.jsonl")) == sorted(TEXTS)


def test_names_that_are_not_utf_8_are_names(tmp_path):
    """A text is read under a path that can be printed, hashed and stored."""
    folder = write_texts(tmp_path / "texts")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.py")).write_text("one more")
    corpus = read(folder)
    assert both(corpus) == sorted([*TEXTS, "one more"])
    paths = [document.path for document in (*corpus.train, *corpus.held_out)]
    assert r"caf\udce9.py" in paths
    assert all(path.encode() for path in paths)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")).write_bytes(LINES)
    assert both(read(tmp_path / "caf*.jsonl")) == sorted(TEXTS)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")).write_bytes(b"{")
    with pytest.raises(RecipeError, match=r"caf\\udce9.jsonl, line 1: not JSON"):
        read(tmp_path / "caf*.jsonl")


@pytest.mark.parametrize("name", ["texts", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_a_file_that_vanishes_before_it_is_read_is_named(tmp_path, name):
    """Between the listing and the reading, and not by the name of another file."""
    if name == "texts":
        write_texts(tmp_path / "texts")
    else:
        (tmp_path / name).write_bytes(LINES)
    reader = find_reader("data.corpus", str(tmp_path / name), DataConfig())
    reader.files[0].unlink()
    with pytest.raises(RecipeError) as raised:
        reader.read(0.2, Excluded())
    assert str(reader.files[0]) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_linked_folders_are_read_once_each(tmp_path):
    """Also by a glob; a link to a folder above, a second link and a link to a folder inside add nothing."""
    inside = tmp_path / "corpus" / "inside"
    inside.mkdir(parents=True)
    outside = write_texts(tmp_path / "outside")
    (inside / "a.py").write_text("inside")
    (inside / "a.jsonl").write_bytes(b'{"text": "inside"}')
    (outside / "b.jsonl").write_bytes(LINES)
    for number, target in enumerate((tmp_path / "corpus", inside, outside, outside)):
        (inside / f"link{number}").symlink_to(target)
    (outside / "back").symlink_to(tmp_path / "corpus")
    for corpus in (
        read(tmp_path / "corpus"),
        read(tmp_path / "corpus", suffix=".jsonl"),
        read(tmp_path / "corpus" / "**" / "*.jsonl"),
    ):
        assert both(corpus) == sorted([*TEXTS, "inside"])
        assert corpus.skipped == 0


def test_a_text_of_a_table_that_is_not_utf_8_is_named_by_its_row(tmp_path):
    values = [b"ok"] * 150 + [b"\xff\xfe"] + [b"ok"] * 20
    array = pa.array(values, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    with pytest.raises(RecipeError, match=r"a\.parquet, row 151: not UTF-8: invalid start byte"):
        read(tmp_path / "a.parquet")


DEEP = b"[" * 200_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": ' + DEEP),
        ("a.json", b'{"text": ' + DEEP),
        ("a.json", DEEP),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}"),
    ],
)
def test_deep_json_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=rf"{name}.*: not JSON that can be read") as raised:
        read(tmp_path / name)
    assert "\n" not in str(raised.value)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, or the end cut off."""
    if draw.random() < 0.3:
        return content[: draw.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 8])):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def healthy(name: str, folder: Path) -> bytes:
    """The content of a file of 60 texts."""
    if name == "a.parquet":
        pq.write_table(pa.table({"text": TEXTS}), folder / name, row_group_size=20)
        return (folder / name).read_bytes()
    if name.endswith(".zst"):
        with pa.CompressedOutputStream(str(folder / name), "zstd") as file:
            file.write(LINES)
        return (folder / name).read_bytes()
    return {
        "a.jsonl": LINES,
        "a.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
        "a.csv": ("text,n\n" + "".join(f'"{text}",1\n' for text in TEXTS)).encode(),
        "a.txt": "\n".join(TEXTS).encode(),
        "a.jsonl.gz": gzip.compress(LINES),
    }[name]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, name):
    content, draw = healthy(name, tmp_path), random.Random(name)
    answers = []
    for _ in range(60):
        (tmp_path / name).write_bytes(damaged(content, draw))
        try:
            read(tmp_path / name)
        except RecipeError as error:
            answers.append(str(error))
    assert len(answers) > 5
    assert all(name in answer and "\n" not in answer for answer in answers)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt.gz", "a.csv"])
def test_a_line_or_file_of_any_length_is_not_read(tmp_path, monkeypatch, name):
    """A few MB that decompress to many GB would take all memory."""
    monkeypatch.setattr(files, "LONGEST", 1000)
    content = b" " * 2000
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(RecipeError, match=r"(line 1: longer than|holds more than) 1,000 bytes"):
        read(tmp_path / name)


def test_errors_of_a_reader_of_ones_own_are_one_line(tmp_path, monkeypatch):
    """As the reader of docs/data.md reads its file."""
    (tmp_path / "own_reader_of_faults.py").write_text(
        "from pathlib import Path\n"
        "from mtp_ce.training.data.corpus import Document\n"
        "from mtp_ce.training.data.row_reader import RowReader\n"
        "class Own(RowReader):\n"
        "    def documents(self):\n"
        "        yield Document('a', Path(self.source.address).read_text(encoding='utf-8'))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "b").write_bytes(b"\xff")
    for address, reason in (("gone", "No such file"), ("b", "not UTF-8: invalid start byte")):
        with pytest.raises(RecipeError, match=rf"data\.corpus: .*{address} can't be read: {reason}"):
            read(tmp_path / address, reader="own_reader_of_faults:Own")
