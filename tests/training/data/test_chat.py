"""Chats: what the tokenizer's template writes is read, and of it what the assistant says is learnt."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.data.chat import encode_chat, to_text
from mtp_ce.training.data.corpus import Corpus
from mtp_ce.training.data.reader import read_corpus
from mtp_ce.training.data.rows import IGNORE, PackedRows, PaddedRows
from mtp_ce.training.data.tokenizer import train_tokenizer
from mtp_ce.training.data.tokens import tokenise
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.models.sources import fetch_source
from mtp_ce.training.run import inputs as run_inputs
from mtp_ce.training.run import pipeline
from mtp_ce.training.run.inputs import read_inputs

# ChatML, the form of Qwen and SmolLM2.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The last turn alone has its (empty) reasoning, as in Qwen3.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>"
    "\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The prompt opens a block of reasoning that the chat does not have, as in DeepSeek-R1.
OPENING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# The system's message stands in the last of the user's, as in early Mistral.
MOVING = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{% if loop.index0 >= messages | length - 2 %}"
    "{{ messages[0].content }}{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ m.content }}"
    "<|im_end|>{% endif %}{% endfor %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHATML

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "And who am I?"},
    {"role": "assistant", "content": "A user, I think."},
]
ANSWERS = ["A model.<|im_end|>\n", "A user, I think.<|im_end|>\n"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = train_tokenizer([json.dumps(CHAT)] * 3, 300)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def learnt_parts(tokenizer: PreTrainedTokenizerFast, ids: list[int], learnt: list[bool]) -> list[str]:
    """The text of each run of tokens that are learnt."""
    parts: list[list[int]] = []
    for number, (token, label) in enumerate(zip(ids, learnt, strict=True)):
        if label:
            parts += [] if number and learnt[number - 1] else [[]]
            parts[-1].append(token)
    return [tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in parts]


LEARNT = {
    "chatml": (CHATML, ANSWERS),
    "marked": (MARKED, ANSWERS),
    "reasoning of the last turn": (REASONING, [ANSWERS[0], f"<think>\n\n</think>\n\n{ANSWERS[1]}"]),
    "a prompt that opens reasoning": (OPENING, ANSWERS),
    "a date": (DATED, ANSWERS),
}


@pytest.mark.parametrize("case", LEARNT)
def test_what_the_assistant_says_is_learnt_and_nothing_else(tokenizer, case):
    tokenizer.chat_template, answers = LEARNT[case]
    ids, learnt = encode_chat("a:1", to_text(CHAT, "a"), tokenizer)
    assert learnt_parts(tokenizer, ids, learnt) == answers
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if case == "a date":
        assert whole.startswith("26 Jul 2024\n<|im_start|>system\n"), "the same tokens every day"
    else:
        assert whole == tokenizer.apply_chat_template(CHAT, tokenize=False)
        assert ids == tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]


@pytest.mark.parametrize("template", [CHATML, MARKED, REASONING])
@pytest.mark.parametrize("muted", [0, 1])
def test_a_turn_of_weight_0_is_read_and_not_learnt(tokenizer, template, muted):
    """The tokens are those of the chat without weights."""
    tokenizer.chat_template = template
    weights = [{} if message["role"] != "assistant" else {"weight": 1} for message in CHAT]
    weights[2 + 2 * muted] = {"weight": 0}
    chat = [{**message, **weight} for message, weight in zip(CHAT, weights, strict=True)]
    ids, learnt = encode_chat("a:1", to_text(chat, "a"), tokenizer)
    plain, every = encode_chat("a:1", to_text(CHAT, "a"), tokenizer)
    assert ids == plain
    assert learnt_parts(tokenizer, ids, learnt) == [learnt_parts(tokenizer, plain, every)[1 - muted]]


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}}
# As in ChatML templates of models that call functions.
TOOLED = "{% if tools %}{{ tools | map(attribute='function.name') | join(' ') }}\n{{ tools | tojson }}\n{% endif %}"


def test_the_tools_of_a_row_reach_the_template(tmp_path, tokenizer):
    """From each form, without the fields that a table adds; a row without them is a chat as any other."""
    tokenizer.chat_template = TOOLED + CHATML
    # A table has every field in every row.
    other = {
        "type": "function",
        "function": {"name": "time", "parameters": {"properties": {"zone": {"type": "string"}}}},
    }
    rows = [{"messages": CHAT[1:3], "tools": tools} for tools in ([TOOL], [TOOL, other], [])] + [
        {"messages": CHAT[1:3]}
    ]
    pq.write_table(pa.Table.from_pylist([{"tools": [], **row} for row in rows]), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{**row, "tools": json.dumps(row.get("tools", []))} for row in rows]
    (tmp_path / "a.json").write_text(json.dumps(texts))
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": CHAT[1:]}))
    for name in ("a.parquet", "a.jsonl", "a.json"):
        corpus = read(tmp_path / name, validation_corpus=str(tmp_path / "b.jsonl"))
        said = [encode_chat(document.path, document.text, tokenizer)[0] for document in corpus.train]
        heads = [tokenizer.decode(ids).partition("<|im_start|>")[0] for ids in said]
        assert heads == [f"weather\n{json.dumps([TOOL])}\n", f"weather time\n{json.dumps([TOOL, other])}\n", "", ""]
    tokenizer.chat_template = CHATML
    with pytest.raises(
        RecipeError, match=r"a:1: the row has tools, and the tokenizer's chat template does not show the"
    ):
        encode_chat("a:1", to_text(CHAT, "a", [TOOL]), tokenizer)
    for wrong, reason in (
        ("{", "is not JSON"),
        ({"a": 1}, "is no list of functions"),
        (["f"], "is no list of functions"),
    ):
        with pytest.raises(RecipeError, match=f"a: the row's field 'tools' {reason}"):
            to_text(CHAT, "a", wrong)


def test_a_template_of_its_own_for_tools_is_used(tokenizer):
    tokenizer.chat_template = {"default": CHATML, "tool_use": TOOLED + CHATML}
    for tools, begins in ((None, "<|im_start|>"), ([TOOL], "weather\n")):
        ids, learnt = encode_chat("a:1", to_text(CHAT, "a", tools), tokenizer)
        assert tokenizer.decode(ids).startswith(begins)
        assert learnt_parts(tokenizer, ids, learnt) == ANSWERS


def test_a_template_that_does_not_show_the_assistants_tokens_is_refused(tokenizer):
    tokenizer.chat_template = MOVING
    with pytest.raises(
        RecipeError, match=r"a:1: .* renders message 3 in another way .* marks them with \{% generation %\}"
    ):
        encode_chat("a:1", to_text(CHAT, "a"), tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(RecipeError, match="a:1: the tokenizer's chat template refuses the chat: no system messages"):
        encode_chat("a:1", to_text(CHAT, "a"), tokenizer)


SENDERS = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [{"from": SENDERS[message["role"]], "value": message["content"]} for message in CHAT]


def write_chats(folder: Path) -> list[Path]:
    """The same chats in each form, ten times with a different last word."""
    chats = [[*CHAT[:-1], {**CHAT[-1], "content": f"A user, number {i}."}] for i in range(40)]
    # A table has every field in every message.
    tables = [[{**message, "tool_calls": None} for message in chat] for chat in chats]
    pq.write_table(pa.Table.from_pylist([{"messages": chat} for chat in tables]), folder / "a.parquet")
    (folder / "a.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    theirs = [[*SHAREGPT[:-1], {"from": "gpt", "value": chat[-1]["content"]}] for chat in chats]
    (folder / "a.json").write_text(json.dumps([{"messages": chat} for chat in theirs]))
    return [folder / name for name in ("a.parquet", "a.jsonl", "a.json")]


def read(corpus: Path, **options) -> Corpus:
    data = {"corpus": str(corpus), "holdout_fraction": 0.3, "messages_field": "messages"}
    return read_corpus(DataConfig(**{**data, **options}))


def test_openai_and_sharegpt_give_the_same_chats(tmp_path):
    found = [read(path) for path in write_chats(tmp_path)]
    for corpus in found:
        assert [document.text for document in corpus.train] == [document.text for document in found[0].train]
        assert corpus.train[0].chat
        assert 3 < len(corpus.held_out) < 25


def test_chats_without_an_answer_are_skipped_and_counted(tmp_path):
    empty = [{"role": "assistant", "content": " "}, {"role": "assistant", "content": "No.", "weight": 0}]
    chats = [CHAT, CHAT[:2], [], *([*CHAT[:2], message] for message in empty), CHAT[:3]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [*CHAT[:4], {"role": "assistant", "content": "?"}]}))
    corpus = read(tmp_path / "a.jsonl", validation_corpus=str(tmp_path / "b.jsonl"))
    assert (len(corpus.train), len(corpus.held_out), corpus.skipped) == (2, 1, 4)


BROKEN: dict[str, tuple[object, str]] = {
    "a text": (
        "hello",
        r"a.jsonl, line 1: field 'messages' \(data.messages_field\) holds str; expected a list of mess",
    ),
    "a list of texts": (["hello"], "a.jsonl, line 1: field 'messages', message 1: it is str; expected an object"),
    "no role": ([{"content": "x"}], "message 1: role is None and content str; expected two strings"),
    "pictures": (
        [CHAT[1], {"role": "user", "content": [{"type": "image"}]}],
        "message 2: role is 'user' and content list",
    ),
    "another sender": (
        [{"from": "narrator", "value": "x"}],
        "message 1: it is from 'narrator'; expected one of human, ",
    ),
    "another weight": ([{**CHAT[2], "weight": 0.5}], "message 1: weight is 0.5; expected 1, or 0 for a turn that is n"),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_what_is_no_chat_is_one_line_with_its_place(tmp_path, mistake):
    messages, expected = BROKEN[mistake]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(RecipeError, match=expected):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("kind", [PackedRows, PaddedRows])
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_labels_are_the_tokens_of_the_assistant(tmp_path, tokenizer, kind, template):
    """In rows of packed and of padded documents, of all and of some; counts are those of labels."""
    tokenizer.chat_template = template
    corpus = read(write_chats(tmp_path)[1])
    tokens = tokenise(corpus, tokenizer).train
    chosen = [3, 1, 7]
    for documents, numbers in ((tokens, range(len(tokens))), (tokens.choose(chosen), chosen)):
        rows = kind(documents, 120, tokenizer.pad_token_id)
        batch = rows.batch(torch.arange(len(rows)))
        for place, number in enumerate(numbers):
            here = batch.document_ids == place
            document = corpus.train[number]
            ids, learnt = encode_chat(document.path, document.text, tokenizer)
            assert batch.input_ids[here].tolist() == ids[: here.sum()]
            labels = [token if label else IGNORE for token, label in zip(ids, learnt, strict=True)]
            assert batch.labels[here].tolist() == labels[: here.sum()]
    every = [encode_chat(document.path, document.text, tokenizer)[1] for document in corpus.train]
    assert tokens.counts.sum() == sum(map(sum, every))


def test_the_template_of_a_model_on_the_hub_is_downloaded(tmp_path, tokenizer, monkeypatch):
    """It is a file of its own, beside those of the tokenizer."""
    import huggingface_hub

    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    patterns = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda _, allow_patterns: patterns.extend(allow_patterns) or str(tmp_path)
    )
    fetch_source("data.tokenizer", "somebody/model")
    for file in tmp_path.iterdir():
        assert any(fnmatch(file.name, pattern) for pattern in patterns), file.name


def test_another_template_makes_other_tokens(tmp_path, tokenizer):
    """The cache of tokens and the identity of a run's inputs follow it."""
    corpus = read(write_chats(tmp_path)[0])
    lengths = set()
    for template in (CHATML, REASONING):
        tokenizer.chat_template = template
        lengths.add(tokenise(corpus, tokenizer).train.token_count)
    assert len(lengths) == 2


def test_a_tokenizer_without_a_template_is_refused_before_the_corpus_is_read(small, tmp_path, tokenizer):
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    chats = [f"data.corpus={write_chats(tmp_path)[0]}", "data.messages_field=messages"]
    for named, theirs in (([], "a tokenizer trained here"), ([f"data.tokenizer={tmp_path}/plain"], "the tokenizer")):
        with pytest.raises(RecipeError, match=rf"data.messages_field is 'messages', but {theirs} has no chat template"):
            read_inputs(small([*chats, *named]), Console(quiet=True))
    assert not (tmp_path / "cache" / "mtp_ce" / "rows").exists()


def test_a_template_that_marks_nothing_is_refused(small, tmp_path, tokenizer):
    tokenizer.chat_template = CHATML + "{% generation %}{% endgeneration %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    chats = [f"data.corpus={write_chats(tmp_path)[0]}", "data.messages_field=messages"]
    with pytest.raises(RecipeError, match="no token of the documents to train on is learnt"):
        read_inputs(small([*chats, f"data.tokenizer={tmp_path}/chat"]), Console(quiet=True))


def test_a_run_learns_from_chats_and_says_how_far_it_is(small, tmp_path, tokenizer, monkeypatch):
    """From the file to the saved model, whose tokenizer has the template."""
    monkeypatch.setattr(run_inputs, "SILENT_S", 1e-4)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "chat")
    chats = [f"data.corpus={write_chats(tmp_path)[2]}", "data.messages_field=messages"]
    few = ["train.steps=6", "train.log_every=1", "validation.every=null", "model.mtp.head_reduction=target"]
    recipe = small([*chats, f"data.tokenizer={tmp_path}/chat", *few])
    with (tmp_path / "printed.txt").open("w") as printed:
        pipeline.train(recipe, tmp_path / "out", Console(file=printed, width=200))
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    # To an untrained model all rows are alike; divided by a count of positions the loss would be another number.
    assert steps[0]["train/loss"] == pytest.approx(steps[0]["train/ce_mean"], rel=1e-3)
    assert all(0.1 < line["train/valid_token_ratio"] < 0.8 for line in steps)
    assert (tmp_path / "out" / "model" / "chat_template.jinja").read_text() == CHATML
    assert "tokenized   40 of 40 documents" in (tmp_path / "printed.txt").read_text()
