"""Corpora of rows: what is a document, what is refused and where it stands, and on which side a row is."""

from __future__ import annotations

import gzip
import json
import shlex
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from moto import mock_aws
from rich.console import Console

from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.config.recipe import load_recipe
from mtp_ce.training.data import row_store
from mtp_ce.training.data.corpus import Corpus, texts
from mtp_ce.training.data.reader import read_corpus
from mtp_ce.training.data.rows import IGNORE, PackedRows, PaddedRows
from mtp_ce.training.data.tokenizer import train_tokenizer
from mtp_ce.training.data.tokens import tokenise
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.run import pipeline

TEXTS = [f"text number {i}, {'é' * (i % 5)}" for i in range(250)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_json(path: Path, rows: list) -> Path:
    """One JSON value a line, after a blank line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=70)
    return path


def both(corpus: Corpus) -> list[str]:
    return [*texts(corpus.train), *texts(corpus.held_out)]


def read(corpus: Path | str, **options) -> Corpus:
    return read_corpus(DataConfig(**{"corpus": str(corpus), "holdout_fraction": 0.2, **options}))


def test_every_format_gives_the_same_documents_on_the_same_sides(tmp_path):
    rows = [{"text": text, "number": i} for i, text in enumerate(TEXTS)]
    (tmp_path / "c.txt").write_text("\n\n".join(TEXTS) + "\r\n  \n")
    found = [
        read(write_json(tmp_path / "a.jsonl", rows)),
        read(write_parquet(tmp_path / "b.parquet", rows)),
        read(tmp_path / "c.txt"),
    ]
    for corpus in found:
        assert sorted(both(corpus)) == sorted(TEXTS)
        assert 25 < len(corpus.held_out) < 80
        assert not set(texts(corpus.train)) & set(texts(corpus.held_out))
        assert [*texts(corpus.held_out)] == [*texts(found[0].held_out)], "the content decides the side"
        assert corpus.characters == sum(map(len, TEXTS))
        assert list(texts(corpus.train)) == [text for text in TEXTS if text in set(texts(corpus.train))], "in order"


def test_documents_can_be_read_in_any_order(tmp_path):
    train = read(write_json(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])).train
    forward = list(train)
    assert [train[i] for i in reversed(range(len(train)))] == forward[::-1]
    assert list(train[150:10:-7]) == forward[150:10:-7]
    assert train[-1] == forward[-1]
    assert forward[0].path == f"a.jsonl:{TEXTS.index(forward[0].text) + 2}", "file and line"


def test_a_folder_or_a_glob_of_tables_is_all_of_their_rows(tmp_path):
    write_json(tmp_path / "all" / "a.jsonl", [{"text": text} for text in TEXTS[:100]])
    write_json(tmp_path / "all" / "deep" / "b.jsonl", [{"text": text} for text in TEXTS[100:]])
    (tmp_path / "all" / "notes.md").write_text("not read")
    assert sorted(both(read(tmp_path / "all", suffix=".jsonl"))) == sorted(TEXTS)
    assert sorted(both(read(tmp_path / "all" / "**" / "*.jsonl"))) == sorted(TEXTS)
    assert sorted(both(read(tmp_path / "all" / "*.jsonl"))) == sorted(TEXTS[:100])


def test_copies_of_a_row_are_on_one_side_and_all_of_them_count(tmp_path):
    corpus = read(write_json(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS * 3]))
    assert len(both(corpus)) == 750
    assert not set(texts(corpus.train)) & set(texts(corpus.held_out))


def test_rows_may_have_other_fields_that_differ(tmp_path):
    """`datasets` takes the fields from the first rows, and ends at a later row that has others."""
    rows = [
        {"text": text, **({"meta": {"a": 1}} if i < 200 else {"meta": ["b"], "more": 2})}
        for i, text in enumerate(TEXTS)
    ]
    assert len(both(read(write_json(tmp_path / "a.jsonl", rows)))) == 250


def test_rows_without_text_are_left_out_and_counted(tmp_path):
    rows = [{"text": text, "p": "ask", "c": text} for text in TEXTS]
    rows += [{"text": " \n", "p": "ask", "c": ""}] * 3
    path = write_json(tmp_path / "a.jsonl", rows)
    for options in ({}, {"prompt_field": "p", "completion_field": "c"}):
        corpus = read(path, **options)
        assert corpus.skipped == 3
        assert len(both(corpus)) == 250


BROKEN: dict[str, tuple[str, bytes, list[str]]] = {
    "a broken line": ("a.jsonl", b'{"text": "x"}\n{"text": \n', ["a.jsonl, line 2", "not JSON"]),
    "a missing field": ("a.jsonl", b'{"text": "x"}\n\n{"body": "x"}\n', ["line 3", "no field 'text'", "'body'"]),
    "a number": ("a.jsonl", b'{"text": 3}\n', ["line 1", "(data.text_field) holds int; expected a string"]),
    "null": ("a.jsonl", b'{"text": null}\n', ["line 1", "holds NoneType"]),
    "a list": ("a.jsonl", b"[1, 2]\n", ["line 1", "holds a list; expected an object"]),
    "half a character": ("a.jsonl", b'{"text": "\\ud800"}\n', ["a.jsonl:1", "not valid Unicode"]),
    "another encoding": ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', ["line 2", "not UTF-8"]),
    "text of another encoding": ("a.txt", b"x\ny\n\xff\xfe\n", ["a.txt, line 3", "not UTF-8"]),
    "no parquet": ("a.parquet", b"PAR1 and then nothing", ["a.parquet", "can't be read as parquet"]),
    "nothing": ("a.jsonl", b"\n", ["0 readable documents to train on"]),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_what_can_not_be_read_is_one_line_with_its_place(tmp_path, mistake):
    name, content, expected = BROKEN[mistake]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError) as raised:
        read(tmp_path / name)
    assert "\n" not in str(raised.value)
    for words in expected:
        assert words in str(raised.value)
    assert not any((tmp_path / "cache").rglob("*.arrow")) or mistake == "nothing", "nothing half done is kept"


def test_parquet_names_the_column_or_the_row_that_is_wrong(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"body": "x", "number": 1}] * 3)
    with pytest.raises(RecipeError, match=r"a\.parquet: no field 'text' \(data\.text_field\); it has 'body', 'number'"):
        read(path)
    with pytest.raises(RecipeError, match=r"a\.parquet, row 1: field 'number' \(data\.text_field\) holds int"):
        read(path, text_field="number")


NOT_FOUND: dict[str, tuple[dict, str]] = {
    "no file of a pattern": ({"corpus": "./*.jsonl"}, "no file matches it"),
    "other files": ({"corpus": "here/*"}, r"end in \.md, \.txt; expected one of \.jsonl"),
    "another kind of file": ({"corpus": "here/notes.md"}, r"end in \.md.*give the folder, and data\.suffix"),
    "fields of lines": ({"corpus": "here/a.txt", "prompt_field": "p", "completion_field": "c"}, "have no fields"),
    "fields of files": (
        {"corpus": "here", "suffix": ".txt", "prompt_field": "p", "completion_field": "c"},
        "a folder of text files, which have no fields",
    ),
    "no validation corpus": (
        {"corpus": "here/a.txt", "validation_corpus": "b.txt"},
        r"data\.validation_corpus is 'b.txt'",
    ),
}


@pytest.mark.parametrize("mistake", NOT_FOUND)
def test_what_is_no_corpus_is_named(tmp_path, monkeypatch, mistake):
    options, expected = NOT_FOUND[mistake]
    (tmp_path / "here").mkdir()
    for name in ("notes.md", "a.txt"):
        (tmp_path / "here" / name).write_text("some text\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=expected):
        read_corpus(DataConfig(**options))


def test_a_validation_corpus_is_held_out_and_all_else_is_trained_on(tmp_path):
    train = write_json(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS[:200]])
    (tmp_path / "b.txt").write_text("\n".join(TEXTS[200:]))
    corpus = read(train, validation_corpus=str(tmp_path / "b.txt"))
    assert [*texts(corpus.train)] == TEXTS[:200]
    assert corpus.shared == 0
    assert [*texts(corpus.held_out)] == TEXTS[200:]
    assert corpus.digest != read(train).digest


def test_files_are_read_once_and_again_when_they_have_changed(tmp_path, monkeypatch):
    path = write_json(tmp_path / "a.jsonl", [{"text": text, "other": text[::-1]} for text in TEXTS])
    first = read(path)
    original = row_store._write
    monkeypatch.setattr(row_store, "_write", None)
    again = read(path)
    assert again.digest == first.digest
    assert both(again) == both(first)
    monkeypatch.setattr(row_store, "_write", original)
    digests = {first.digest, read(path, text_field="other").digest, read(path, holdout_fraction=0.5).digest}
    with path.open("a") as file:
        file.write('{"text": "one more"}\n')
    assert "one more" in both(read(path))
    assert len(digests | {read(path).digest}) == 4


@pytest.fixture
def asked(tmp_path) -> DataConfig:
    """Prompts and completions, some of them longer than a row of 32."""
    rows = [{"p": f"what is {i}? ", "c": f"it is {'very ' * (i % 9)}{i}", "text": "x"} for i in range(60)]
    path = write_json(tmp_path / "pairs.jsonl", rows)
    return DataConfig(corpus=str(path), holdout_fraction=0.3, prompt_field="p", completion_field="c")


@pytest.mark.parametrize("kind", [PackedRows, PaddedRows])
def test_prompts_are_read_and_not_learnt(asked, kind):
    corpus = read_corpus(asked)
    tokenizer = train_tokenizer([*texts(corpus.train)], 280)
    tokens = tokenise(corpus, tokenizer)
    batch = kind(tokens.train, 32, tokenizer.pad_token_id).batch(torch.arange(12))
    longest = None if kind is PackedRows else 32
    for number in batch.document_ids.unique().tolist()[:8]:
        here = batch.document_ids == number
        prompt, text = (
            tokenizer.backend_tokenizer.encode(part).ids
            for part in (corpus.train[number].prompt, corpus.train[number].text)
        )
        end = tokenizer.eos_token_id
        ids, labels = [end, *prompt, *text, end], [*[IGNORE] * (1 + len(prompt)), *text, end]
        assert batch.input_ids[here].tolist() == ids[:longest]
        assert batch.labels[here].tolist() == labels[:longest]


def test_what_is_learnt_is_part_of_what_tokens_are_kept_by(asked):
    """The same characters, but all of them learnt: other tokens in the cache, and other counts."""
    corpus = read_corpus(asked)
    tokenizer = train_tokenizer([*texts(corpus.train)], 280)
    masked = tokenise(corpus, tokenizer).train
    rows = [{"text": prompt_and_text} for prompt_and_text in (*texts(corpus.train), *texts(corpus.held_out))]
    path = write_json(Path(asked.corpus).parent / "plain.jsonl", rows)
    plain = tokenise(read_corpus(DataConfig(corpus=str(path), holdout_fraction=0.3)), tokenizer).train
    assert masked.prompts is not None
    assert plain.prompts is None
    assert masked.counts.sum() == sum(len(ids) - masked for ids, masked in zip(masked, masked.prompts, strict=True))
    assert plain.counts.sum() == plain.token_count - len(plain)


@pytest.fixture
def bucket(monkeypatch):
    """An S3 of this process alone, with the texts below an address."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        client = boto3.client("s3")
        client.create_bucket(Bucket="my-bucket")
        for name, part in (("a", TEXTS[:100]), ("deep/b", TEXTS[100:])):
            body = "\n".join(json.dumps({"text": text}) for text in part)
            client.put_object(Bucket="my-bucket", Key=f"texts/{name}.jsonl", Body=body.encode())
        yield client


def test_a_folder_in_s3_is_fetched(bucket):
    assert sorted(both(read("s3://my-bucket/texts", suffix=".jsonl"))) == sorted(TEXTS)
    with pytest.raises(RecipeError, match=r"data\.corpus 's3://my-bucket/nothing'"):
        read("s3://my-bucket/nothing")


def hub_cache(folder: Path, owner: str, name: str, split: str, rows: list[dict], subset: str = "default") -> None:
    """What `datasets` keeps of a data set of the hub that was loaded once."""
    import datasets

    inside = folder / f"{owner}___{name}" / subset / "0.0.0" / ("0" * 40)
    inside.mkdir(parents=True)
    table = datasets.Dataset.from_list(rows)
    with datasets.arrow_writer.ArrowWriter(path=str(inside / f"{name}-{split}.arrow"), features=table.features) as file:
        for row in rows:
            file.write(row)
        file.finalize()
    splits = datasets.SplitDict({split: datasets.SplitInfo(split, num_examples=len(rows), dataset_name=name)})
    about = {"builder_name": "json", "dataset_name": name, "config_name": subset, "version": "0.0.0"}
    datasets.DatasetInfo(features=table.features, splits=splits, **about).write_to_directory(str(inside))


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Without the hub, but with a data set that was loaded from it before."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    hub_cache(tmp_path / "hub", "someone", "texts", "test", [{"body": text, "n": i} for i, text in enumerate(TEXTS)])


def test_a_data_set_of_the_hub_is_read_row_by_row(offline):
    corpus = read("someone/texts", split="test", text_field="body")
    assert sorted(both(corpus)) == sorted(TEXTS)
    assert corpus.train[0].path.startswith("test:")
    with pytest.raises(RecipeError, match=r"'someone/texts', row 1: no field 'text' .* it has 'body', 'n'"):
        read("someone/texts", split="test")


@pytest.mark.parametrize(("name", "split"), [("nobody/nothing", "train"), ("someone/texts", "train")])
def test_a_data_set_that_can_not_be_had_is_one_line(offline, name, split):
    with pytest.raises(RecipeError, match=f"data.corpus is '{name}', which is not a local path") as raised:
        read(name, split=split)
    assert f"'{split}'" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_hub_is_asked_for_subset_and_split(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return datasets.load_from_disk(str(tmp_path / "saved"))

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(both(read("someone/texts", subset="en", split="train[:50%]"))) == 250
    assert asked == [(("someone/texts", "en"), {"split": "train[:50%]"})]


PAGE = Path(__file__).resolve().parents[3] / "docs" / "data.md"
COMMANDS = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("train-mtp ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_on_data_reads_a_corpus(command, offline, bucket, tmp_path, monkeypatch):
    """Files, hub and bucket as the page has them."""
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "my" / "rows.jsonl", [{"body": text} for text in TEXTS])
    write_json(tmp_path / "my" / "pairs.jsonl", [{"question": "which? ", "answer": text} for text in TEXTS])
    zipped = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / "my" / "deep").mkdir()
    (tmp_path / "my" / "deep" / "rows.jsonl.gz").write_bytes(gzip.compress(zipped))
    (tmp_path / "my" / "table.csv").write_text("".join(["body\n", *(f'"{text}"\n' for text in TEXTS)]))
    alpaca = [{"instruction": "Say it.", "input": "", "output": text} for text in TEXTS]
    (tmp_path / "my" / "alpaca.json").write_text(json.dumps(alpaca))
    chats = [[{"role": "user", "content": "Say it."}, {"role": "assistant", "content": text}] for text in TEXTS]
    write_json(tmp_path / "my" / "chats.jsonl", [{"messages": chat} for chat in chats])
    theirs = [[{"from": "human", "value": "Say it."}, {"from": "gpt", "value": text}] for text in TEXTS]
    (tmp_path / "my" / "sharegpt.json").write_text(json.dumps([{"conversations": chat} for chat in theirs]))
    for name in ("a", "b", "held_out"):
        write_parquet(tmp_path / "my" / f"{name}.parquet", [{"text": f"{name} {text}"} for text in TEXTS])
    (tmp_path / "my" / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "my" / "texts" / f"{i}.txt").write_text(text)
    wikitext = [{"text": text} for text in TEXTS]
    hub_cache(tmp_path / "hub", "Salesforce", "wikitext", "train", wikitext, "wikitext-2-raw-v1")
    recipe = load_recipe("tiny", shlex.split(command)[2:])
    corpus = read_corpus(recipe.data)
    assert len(corpus.train) + len(corpus.held_out) >= 250
    assert (corpus.train[0].prompt is None) == ("prompt_field" not in command)
    assert corpus.train[0].chat == ("messages_field" in command)
    assert not {*texts(corpus.train)} & {*texts(corpus.held_out)}


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_a_run_learns_from_prompts_and_completions(small, tmp_path, packing):
    """From the file to the saved model; a position is scored where some head has a target that is learnt."""
    rows = [
        {"p": f"question number {i}: ", "c": f"the answer is {i * i}, or {'maybe ' * (i % 30)}not"} for i in range(300)
    ]
    path = write_json(tmp_path / "pairs.jsonl", rows)
    data = [f"data.corpus={path}", "data.prompt_field=p", "data.completion_field=c", "data.vocab_size=300"]
    budget = ["train.steps=null", "train.max_tokens=2000", "train.log_every=1", "validation.every=null"]
    recipe = small([*data, *budget, f"data.packing={packing}"])
    pipeline.train(recipe, tmp_path / "out", Console(quiet=True))
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    assert len(steps) == 4, "64 tokens in a row, 8 rows in a step"
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    assert all(0.3 < line["train/valid_token_ratio"] < 0.95 for line in steps)
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
