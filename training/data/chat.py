"""Chats: messages of a row as the text of a document, and the tokens of that text with those of the assistant marked.

    rendered   <|user|>Hello<|assistant|>Hi!<|end|><|user|>And?<|assistant|>Yes.<|end|>
    learnt                               ^^^^^^^^^^                         ^^^^^^^^^^^

The tokenizer's chat template renders the messages. Where it has `{% generation %}` blocks, they are what is learnt.
Elsewhere an assistant's turn begins where the generation prompt ends, and ends where the rendering without later
messages ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mtp_ce.training.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Senders of ShareGPT's `conversations`, by the role they have in a chat template.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}

_ASSISTANT = "assistant"

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Some templates write today's date into every chat. It is that of the first ones here, so that the tokens of a corpus
# are the same every day.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ '2024-07-26' if format == '%Y-%m-%d' else '26 Jul 2024' }}{%- endmacro -%}"
)


def to_text(messages: Sequence[Any], where: str) -> str:
    """Return the messages of a chat as JSON; empty where no message of an assistant has content.

    Args:
        messages: objects with `role` and `content`, or with `from` and `value` (ShareGPT).
        where: file, line and field, for messages to the user.

    Raises:
        RecipeError: a message is neither, or has content that is no text.
    """
    chat = [_message(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]
    answers = any(message["role"] == _ASSISTANT and _says_something(message) for message in chat)
    try:
        # What a table holds that JSON does not have, such as dates, no template reads.
        return json.dumps(chat, ensure_ascii=False, default=str) if answers else ""
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: can't be written as JSON: {error}") from None


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RecipeError(f"{where}: it is {type(message).__name__}; expected an object with role and content")
    # Tables have every field in every message.
    given = {name: value for name, value in message.items() if value is not None}
    if "from" in given and "role" not in given:
        sender = given.pop("from")
        if sender not in _ROLES:
            raise RecipeError(f"{where}: it is from {sender!r}; expected one of {', '.join(_ROLES)}")
        given = {"role": _ROLES[sender], "content": given.pop("value", None), **given}
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and given.get("tool_calls"))):
        raise RecipeError(
            f"{where}: role is {role!r} and content {type(content).__name__}; expected two strings, as role and "
            "content, or as from and value"
        )
    if given.get("weight", 1) != 1:
        raise RecipeError(f"{where}: weight is {given['weight']!r}, and every turn of an assistant is learnt alike")
    return given


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool((message.get("content") or "").strip() or message.get("tool_calls"))


def chat_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the tokenizer's chat template with a fixed date; None if it has none."""
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError:
        return None
    return (_FIXED_DATE if "strftime_now" in template else "") + template


def encode_chat(path: str, text: str, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[bool]]:
    """Return the tokens of a chat as its template renders it, and which of them are the assistant's.

    Args:
        path: of the document, for messages.
        text: what `to_text` returned.
        tokenizer: has a chat template.

    Raises:
        RecipeError: the template refuses the chat, or does not show which tokens are the assistant's.
    """
    template = chat_template(tokenizer)
    if template is None:
        raise RecipeError(f"{path}: a chat, and the tokenizer has no chat template; give a data.tokenizer that has one")

    def apply(part: Any, **options: Any) -> Any:
        try:
            return tokenizer.apply_chat_template(part, chat_template=template, **options)
        except Exception as error:  # a template is a program
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RecipeError(f"{path}: the tokenizer's chat template refuses the chat: {reason}") from None

    try:
        messages = json.loads(text)
    except RecursionError:
        raise RecipeError(f"{path}: the chat is nested too deeply to be read") from None
    if _MARKED.search(template):
        # It warns of chats that are longer than the model's context; rows are cut.
        quiet = {"verbose": False}
        marked = apply(messages, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs=quiet)
        return marked["input_ids"], [bool(learnt) for learnt in marked["assistant_masks"]]

    rendered, spans = _turns(
        path, messages, lambda part, prompt: apply(part, tokenize=False, add_generation_prompt=prompt)
    )
    encoding = tokenizer.backend_tokenizer.encode(rendered, add_special_tokens=False)
    # A token that lies partly in a turn is learnt.
    learnt = [any(end > first and begin < last for first, last in spans) for begin, end in encoding.offsets]
    return encoding.ids, learnt


def _turns(
    path: str, messages: list[dict[str, Any]], render: Callable[[list[dict[str, Any]], bool], str]
) -> tuple[str, list[tuple[int, int]]]:
    """Return the rendered chat, and where in it the turns of the assistant begin and end."""
    whole, spans = render(messages, False), []
    for i, message in enumerate(messages):
        # Nothing prompts an assistant that speaks first.
        if message["role"] != _ASSISTANT or i == 0:
            continue
        before, after = render(messages[:i], False), render(messages[: i + 1], False)
        # Some templates open a block of reasoning in the prompt that is not in the chat.
        begin = _common(render(messages[:i], True), whole)
        end = len(after) if whole.startswith(after) else _end(message, whole, begin, after)
        if not whole.startswith(before) or begin < len(before) or end is None:
            raise RecipeError(
                f"{path}: the tokenizer's chat template renders message {i + 1} in another way once others follow, so "
                "it does not show which tokens are the assistant's; give a data.tokenizer whose template marks them "
                "with {% generation %}"
            )
        spans.append((begin, end))
    return whole, spans


def _common(one: str, other: str) -> int:
    """Return how many characters two texts have in common from the beginning."""
    if other.startswith(one):
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _end(message: Mapping[str, Any], whole: str, begin: int, after: str) -> int | None:
    """Return where a turn ends whose reasoning is left out once other messages follow."""
    content = (message.get("content") or "").strip()
    at = whole.find(content, begin)
    closing = after[after.rfind(content) + len(content) :]
    if not content or at < 0 or content not in after or not whole.startswith(closing, at + len(content)):
        return None
    return at + len(content) + len(closing)
