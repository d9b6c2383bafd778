"""The corpus: what is a document, and that held-out text never trains anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.data.corpus import Document, domains_of, texts
from mtp_ce.training.data.python_source import is_documented
from mtp_ce.training.data.reader import find_corpus, read_corpus
from mtp_ce.training.data.text_files import is_held_out
from mtp_ce.training.errors import RecipeError


def write(folder: Path, files: dict[str, str | bytes]) -> DataConfig:
    """Write files and give the settings that read them."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return DataConfig(corpus=str(folder), holdout_fraction=0.3)


def many(count: int) -> dict[str, str | bytes]:
    """Files that differ."""
    return {f"part{i % 3}/file{i}.py": f"print({i})\n" for i in range(count)}


def test_the_stdlib_corpus_is_source_and_nothing_else():
    source = find_corpus(DataConfig())
    paths = source.source.paths
    size = sum(file.stat().st_size for file in source.files)
    assert 5e6 < size < 20e6
    assert "json/decoder.py" in paths
    for path in paths:
        folders = set(Path(path).parts[:-1])
        assert not folders & {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


def test_the_two_sides_of_the_split_share_no_file_and_no_text(tmp_path):
    corpus = read_corpus(write(tmp_path, many(60)))
    train, held_out = ({d.path for d in side} for side in (corpus.train, corpus.held_out))
    assert train
    assert held_out
    assert not train & held_out
    assert len(train | held_out) == 60
    assert not set(texts(corpus.train)) & set(texts(corpus.held_out))


def test_the_split_depends_on_a_files_path_alone(tmp_path):
    """Neither other files nor the place of the folder nor its contents move a file to the other side."""
    few = read_corpus(write(tmp_path / "a", many(20)))
    more = read_corpus(write(tmp_path / "elsewhere" / "b", {k: f"# {v}" for k, v in many(60).items()}))
    wanted = {document.path for document in few.held_out}
    assert wanted == {document.path for document in more.held_out} & set(many(20))


def test_the_share_held_out_is_what_was_asked_for():
    held_out = sum(is_held_out(f"folder/file{i}.py", 0.04) for i in range(20_000))
    assert 700 < held_out < 900


def test_a_copy_of_a_held_out_file_does_not_train(tmp_path):
    files = many(60)
    corpus = read_corpus(write(tmp_path, files))
    leaked = corpus.held_out[0]
    copies = {f"copy{i}.py": leaked.text for i in range(20)}
    again = read_corpus(write(tmp_path, copies))
    everywhere = [*texts(again.train), *texts(again.held_out)]
    assert everywhere.count(leaked.text) == 1
    assert again.skipped == 20


def test_a_copy_with_other_line_ends_counts_once(tmp_path):
    """An editor's copy of a held-out file does not train either."""
    files = {f"file{i}.py": f"a = {i}\nb = {i}\n" for i in range(30)}
    copies: dict[str, str | bytes] = {
        f"copy{i}.py": b"\xef\xbb\xbf" * (i % 2) + f"a = {i}\r\nb = {i}\r\n".encode() for i in range(30)
    }
    corpus = read_corpus(write(tmp_path, {**files, **copies}))
    assert sorted([*texts(corpus.train), *texts(corpus.held_out)]) == sorted(files.values())
    assert corpus.skipped == 30


def test_files_that_are_not_text_are_left_out_and_counted(tmp_path):
    corpus = read_corpus(
        write(tmp_path, {**many(30), "b.py": b"\xff\xfe\x00", "e.py": "", "w.py": " \n", "n.txt": "x"})
    )
    assert corpus.skipped == 3
    assert len(corpus.train) + len(corpus.held_out) == 30


def test_the_digest_changes_with_a_text_a_name_and_the_split(tmp_path):
    files = many(30)
    digests = {
        read_corpus(write(tmp_path / "a", files)).digest,
        read_corpus(write(tmp_path / "b", files)).digest,
    }
    assert len(digests) == 1, "the folder's own place is not part of it"
    digests.add(read_corpus(write(tmp_path / "c", {**files, "part0/file0.py": "other"})).digest)
    renamed = {name.replace("file1.", "fileX."): text for name, text in files.items()}
    digests.add(read_corpus(write(tmp_path / "d", renamed)).digest)
    write(tmp_path / "e", files)
    digests.add(read_corpus(DataConfig(corpus=str(tmp_path / "e"), holdout_fraction=0.6)).digest)
    assert len(digests) == 4


def test_a_split_with_an_empty_side_is_refused(tmp_path):
    write(tmp_path, {"only.py": "x = 1\n"})
    with pytest.raises(RecipeError, match="both sides need at least one"):
        find_corpus(DataConfig(corpus=str(tmp_path)))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    """Its tokens and its text would part."""
    corpus = read_corpus(write(tmp_path, many(30)))
    path = tmp_path / corpus.train[0].path
    path.write_text("other")
    with pytest.raises(RecipeError, match=f"{path} changed while it was being read"):
        _ = corpus.train[0]
    path.unlink()
    with pytest.raises(RecipeError, match=f"{path} can't be read any more"):
        _ = corpus.train[0]


def test_a_copy_of_a_validation_file_does_not_train(tmp_path):
    write(tmp_path / "train", many(10))
    write(tmp_path / "held", {"a.py": "print(3)\n", "b.py": "another\n"})
    corpus = read_corpus(DataConfig(corpus=str(tmp_path / "train"), validation_corpus=str(tmp_path / "held")))
    assert len(corpus.train) == 9
    assert list(texts(corpus.held_out)) == ["print(3)\n", "another\n"]
    assert corpus.skipped == 1


DOCSTRING = '"""What it is for."""\n'


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("json/decoder.py", DOCSTRING, True),
        ("json/__init__.py", DOCSTRING, True),
        ("json/decoder.py", "# No docstring.\nx = 1\n", False),
        ("json/decoder.py", 'x = """not the first statement"""\n', False),
        ("_private.py", DOCSTRING, False),
        ("json/_tables.py", DOCSTRING, False),
        ("_vendored/json.py", DOCSTRING, False),
        ("json/__main__.py", DOCSTRING, False),
        ("old.py", DOCSTRING + "print 'of another Python'\n", False),
        ("null.py", DOCSTRING + "\0", False),
    ],
)
def test_the_curated_part_is_public_modules_with_a_docstring(path, text, expected, recwarn):
    assert is_documented(Document(path, text)) is expected
    assert not recwarn


def test_warnings_about_a_corpus_are_not_shown_and_filters_stay_as_they_are():
    """In a process of its own: the test runner has filters of its own."""
    program = (
        "import warnings\n"
        "from mtp_ce.training.data.python_source import parse_python\n"
        "from mtp_ce.training.critic.functions import compiles\n"
        "before = list(warnings.filters)\n"
        "text = 'x = \\'\\\\d\\' is 1'\n"
        "assert compiles(text) and parse_python(text) is not None\n"
        "assert warnings.filters == before\n"
        "compile(text, 'elsewhere.py', 'exec')\n"
    )
    answer = subprocess.run([sys.executable, "-W", "always", "-c", program], capture_output=True, text=True, check=True)
    assert "elsewhere.py" in answer.stderr
    assert "<corpus>" not in answer.stderr


@pytest.mark.parametrize(
    ("paths", "domains"),
    [
        (["code/a.py", "code/b.py", "chat/c.py"], ["code", "code", "chat"]),
        (["chat.jsonl:7", "sums.jsonl:1", "chat.jsonl:12"], ["chat.jsonl", "sums.jsonl", "chat.jsonl"]),
        (["all/code/a.jsonl:1", "all/code/b.jsonl:2", "all/chat/a.jsonl:1"], ["code", "code", "chat"]),
        (["lib/json/a.py", "lib/json/b.py", "lib/os.py"], ["json", "json", "."]),
        (["a.py", "b.py", "c.py"], ["", "", ""]),  # every file a document, in one folder
        (["rows.parquet:1", "rows.parquet:2"], ["", ""]),
        (["json/a.py"], [""]),
        ([], []),
    ],
)
def test_the_domain_of_a_document_is_the_folder_or_file_in_which_documents_differ(paths, domains):
    assert domains_of([Document(path, "text") for path in paths]) == domains
