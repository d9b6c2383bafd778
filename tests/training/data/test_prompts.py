"""Files of prompts: what engines take as a request is tokenized as they do, and a wrong line is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from mtp_ce.training.data.prompts import encode_prompts, read_prompts
from mtp_ce.training.data.tokenizer import train_tokenizer
from mtp_ce.training.errors import RecipeError

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(["To be, or not to be, that is the question"], 260)
    made.chat_template = CHATML
    # As of Llama: a token of the tokenizer's own begins every text.
    begin = made.bos_token
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, made.bos_token_id)]
    )
    return made


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_texts_chats_and_tokens_are_what_an_engine_is_prompted_with(tokenizer, tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"from": "human", "value": "Who?"}]
    file = written(
        tmp_path / "prompts.jsonl",
        {"prompt": "To be", "domain": "verse", "id": 7},
        "\n",
        {"messages": chat, "domain": "chat"},
        {"prompt_token_ids": [3, 1, 2], "prompt": None},
    )
    text, answered, tokens = encode_prompts(read_prompts(file), tokenizer, len(tokenizer))
    assert tokenizer.decode(text.tokens) == "<|endoftext|>To be", "with the tokenizer's own first token"
    assert tokenizer.decode(answered.tokens) == "<system>Be brief.\n<user>Who?\n<assistant>", "and nothing before it"
    assert tokens.tokens == [3, 1, 2]
    assert [prompt.domain for prompt in (text, answered, tokens)] == ["verse", "chat", "-"]
    assert tokens.where.endswith("prompts.jsonl, line 4")


def test_without_domains_there_is_none(tokenizer, tmp_path):
    file = written(tmp_path / "p.jsonl", {"prompt": "To be"}, {"prompt": "that is"})
    assert {prompt.domain for prompt in encode_prompts(read_prompts(file), tokenizer, len(tokenizer))} == {""}


GOOD = {"prompt": "To be"}
USER = {"role": "user", "content": "Who?"}
WRONG = {
    "no JSON": ("{prompt}\n", "line 2: not JSON that can be read"),
    "no object": ([1, 2], "line 2: holds a list; expected an object with fields"),
    "no field": ({"text": "To be"}, "line 2: expected one of 'prompt', 'messages' and 'prompt_token_ids'; it has none"),
    "two fields": ({**GOOD, "prompt_token_ids": [1]}, "it has 'prompt' and 'prompt_token_ids'"),
    "a text that is none": ({"prompt": ["To be"]}, "line 2: field 'prompt' holds list; expected a string"),
    "messages that are none": ({"messages": "Who?"}, "line 2: field 'messages' holds str; expected a list"),
    "a message without content": ({"messages": [{"role": "user"}]}, "line 2: field 'messages', message 1: role is"),
    "no message": ({"messages": []}, "line 2: field 'messages': it has no message; expected a chat that ends"),
    "an answer": (
        {"messages": [USER, {"role": "assistant", "content": "I."}]},
        "line 2: field 'messages': the last message is the assistant's; expected a chat that ends with the message",
    ),
    "tokens that are none": (
        {"prompt_token_ids": [1, "2"]},
        "line 2: field 'prompt_token_ids' holds '2'; expected int",
    ),
    "a truth value": ({"prompt_token_ids": [True]}, "holds True; expected integers from 0"),
    "a negative token": ({"prompt_token_ids": [1, -1]}, "holds -1; expected integers from 0"),
    "a domain that is no word": ({**GOOD, "domain": 3}, "line 2: field 'domain' holds 3; expected a word"),
    "no token": ({"prompt_token_ids": []}, "line 2: field 'prompt_token_ids' has no token; expected at least one"),
    "a token beyond": ({"prompt_token_ids": [1, 260]}, "line 2: token 260 is not below 260, the model's vocabulary"),
    "tools that are none": ({"messages": [USER], "tools": 3}, "line 2: the row's field 'tools' is no list of"),
    "tools that nothing shows": ({"messages": [USER], "tools": [{"name": "f"}]}, "chat template does not show them"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_is_named_in_one_line(name, tokenizer, tmp_path):
    line, words = WRONG[name]
    file = written(tmp_path / "prompts.jsonl", GOOD, line)
    with pytest.raises(RecipeError) as raised:
        encode_prompts(read_prompts(file), tokenizer, len(tokenizer))
    assert f"{file}, " in str(raised.value)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_chat_needs_a_template(tokenizer, tmp_path):
    file = written(tmp_path / "prompts.jsonl", {"messages": [USER]})
    bare = train_tokenizer(["To be, or not to be, that is the question"], 260)
    with pytest.raises(RecipeError, match="line 1: a chat, and the tokenizer has no chat template; give a 'prompt'"):
        encode_prompts(read_prompts(file), bare, 260)


def test_a_file_without_a_prompt_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"--prompts has .*empty\.jsonl, which holds no line"):
        read_prompts(written(tmp_path / "empty.jsonl", "\n"))
    with pytest.raises(RecipeError, match=r"--prompts has .*nowhere\.jsonl, which can't be read: No such file"):
        read_prompts(tmp_path / "nowhere.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RecipeError, match=r"folder.* can't be read"):
        read_prompts(tmp_path / "folder")
