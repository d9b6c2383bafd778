"""Chats: messages of a row as the text of a document, and the tokens of that text with those of the assistant marked.

    rendered   <|user|>Hello<|assistant|>Hi!<|end|><|user|>And?<|assistant|>Yes.<|end|>
    learnt                               ^^^^^^^^^^                         ^^^^^^^^^^^

The tokenizer's chat template renders the messages. Where it has `{% generation %}` blocks, they are what is learnt.
Elsewhere an assistant's turn begins where the generation prompt ends, and ends where the rendering without later
messages ends. A turn of weight 0 is read and not learnt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
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

# Field of a row, beside that of its messages, with the functions that the assistant may call.
TOOLS = "tools"

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Some templates write today's date into every chat. It is that of the first ones here, so that the tokens of a corpus
# are the same every day.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ '2024-07-26' if format == '%Y-%m-%d' else '26 Jul 2024' }}{%- endmacro -%}"
)


def to_text(messages: Sequence[Any], where: str, tools: Any = None) -> str:
    """Return a chat as JSON, a list of messages or an object with messages and tools; empty if nothing of it is learnt.

    Args:
        messages: objects with `role` and `content`, or with `from` and `value` (ShareGPT). A `weight` of 0 takes a
            message of the assistant out of what is learnt.
        where: file, line and field, for messages to the user.
        tools: the functions that the assistant may call, a list of JSON schemas or its JSON text; None: none.

    Raises:
        RecipeError: a message is neither, or has content that is no text or another weight; or `tools` is no such list.
    """
    chat = [_message(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]
    listed = _tools(tools, where)
    answers = any(message["role"] == _ASSISTANT and _is_learnt(message) for message in chat)
    try:
        # What a table holds that JSON does not have, such as dates, no template reads.
        whole = {"messages": chat, TOOLS: listed} if listed else chat
        return json.dumps(whole, ensure_ascii=False, default=str) if answers else ""
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
    if given.get("weight", 1) not in (0, 1):
        raise RecipeError(f"{where}: weight is {given['weight']!r}; expected 1, or 0 for a turn that is not learnt")
    return given


def _tools(tools: Any, where: str) -> list[Any]:
    """Return the tools of a row without the empty fields that a table gives them."""
    try:
        listed = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or []
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: the row's field '{TOOLS}' is not JSON that can be read: {error}") from None
    if not isinstance(listed, list) or not all(isinstance(tool, Mapping) for tool in listed):
        raise RecipeError(f"{where}: the row's field '{TOOLS}' is no list of functions; expected one, or its JSON text")
    return [_without_none(tool) for tool in listed]


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _is_learnt(message: Mapping[str, Any]) -> bool:
    says = bool((message.get("content") or "").strip() or message.get("tool_calls"))
    return says and message.get("weight", 1) != 0


def chat_template(tokenizer: PreTrainedTokenizerFast, tools: list[Any] | None = None) -> str | None:
    """Return the tokenizer's chat template with a fixed date; None if it has none.

    Args:
        tokenizer: may have another template for chats with tools.
        tools: those of the chat, also an empty list; None: none.
    """
    try:
        template: str = tokenizer.get_chat_template(tools=tools)
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
    try:
        chat = json.loads(text)
    except RecursionError:
        raise RecipeError(f"{path}: the chat is nested too deeply to be read") from None
    given, tools = (chat["messages"], chat[TOOLS]) if isinstance(chat, dict) else (chat, None)
    template, apply = _applied(path, tools, tokenizer)

    def render(part: list[dict[str, Any]], prompt: bool) -> str:
        rendered: str = apply(part, tokenize=False, add_generation_prompt=prompt)
        return rendered

    messages = [{name: value for name, value in message.items() if name != "weight"} for message in given]
    turns = {i for i, message in enumerate(messages) if message["role"] == _ASSISTANT}
    muted = {i for i in turns if given[i].get("weight") == 0}
    if _MARKED.search(template):
        # It warns of chats that are longer than the model's context; rows are cut.
        options = {"verbose": False, "return_offsets_mapping": True}
        marked = apply(messages, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs=options)
        spans = _spans(path, messages, muted, render, "leave out its weight of 0") if muted else []
        learnt = [bool(mask) for mask in marked["assistant_masks"]]
        inside = _inside(marked["offset_mapping"], spans)
        return marked["input_ids"], [mask and not out for mask, out in zip(learnt, inside, strict=True)]

    # Nothing prompts an assistant that speaks first.
    way_out = "give a data.tokenizer whose template marks them with {% generation %}"
    spans = _spans(path, messages, turns - muted - {0}, render, way_out)
    encoding = tokenizer.backend_tokenizer.encode(render(messages, False), add_special_tokens=False)
    return encoding.ids, _inside(encoding.offsets, spans)


def prompt_messages(messages: Sequence[Any], where: str) -> list[dict[str, Any]]:
    """Return the messages of a chat that the assistant is to answer.

    Args:
        messages: as in `to_text`.
        where: file, line and field, for messages to the user.

    Raises:
        RecipeError: as `to_text`, there is no message, or the last one is the assistant's.
    """
    chat = [_message(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]
    if not chat or chat[-1]["role"] == _ASSISTANT:
        last = "the last message is the assistant's" if chat else "it has no message"
        raise RecipeError(f"{where}: {last}; expected a chat that ends with the message to answer")
    return chat


def encode_prompt(
    where: str, messages: list[dict[str, Any]], tools: Any, tokenizer: PreTrainedTokenizerFast
) -> list[int]:
    """Return the tokens of a chat with the beginning of the assistant's answer, as an engine is prompted.

    Args:
        where: file and line, for messages to the user.
        messages: what `prompt_messages` returned.
        tools: as in `to_text`.
        tokenizer: renders the chat.

    Raises:
        RecipeError: the tokenizer has no chat template, or it refuses the chat or its tools.
    """
    _, apply = _applied(where, _tools(tools, where) or None, tokenizer)
    rendered = apply(messages, tokenize=False, add_generation_prompt=True)
    encoded: list[int] = tokenizer.encode(rendered, add_special_tokens=False)
    return encoded


def _applied(path: str, tools: Any, tokenizer: PreTrainedTokenizerFast) -> tuple[str, Callable[..., Any]]:
    """Return the chat template, and a function that renders messages with it; arguments as of `encode_chat`."""
    template = chat_template(tokenizer, tools)
    if template is None:
        raise RecipeError(f"{path}: a chat, and the tokenizer has no chat template; give a data.tokenizer that has one")
    if tools and TOOLS not in template:
        raise RecipeError(
            f"{path}: the row has {TOOLS}, and the tokenizer's chat template does not show them; give a data.tokenizer "
            "whose template does, or leave out the field"
        )

    def apply(part: Any, **options: Any) -> Any:
        try:
            return tokenizer.apply_chat_template(part, tools=tools, chat_template=template, **options)
        except Exception as error:  # a template is a program
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RecipeError(f"{path}: the tokenizer's chat template refuses the chat: {reason}") from None

    return template, apply


def _inside(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Return which tokens lie in a span, wholly or partly."""
    return [any(end > first and begin < last for first, last in spans) for begin, end in offsets]


def _spans(
    path: str,
    messages: list[dict[str, Any]],
    turns: Collection[int],
    render: Callable[[list[dict[str, Any]], bool], str],
    way_out: str,
) -> list[tuple[int, int]]:
    """Return where some of the assistant's turns begin and end in the rendered chat."""
    whole, spans = render(messages, False), []
    for i in sorted(turns):
        before, prompt = (render(messages[:i], False), render(messages[:i], True)) if i else ("", "")
        after = render(messages[: i + 1], False)
        # Some templates open a block of reasoning in the prompt that is not in the chat.
        begin = _common(prompt, whole)
        end = len(after) if whole.startswith(after) else _end(messages[i], whole, begin, after)
        if not whole.startswith(before) or begin < len(before) or end is None:
            raise RecipeError(
                f"{path}: the tokenizer's chat template renders message {i + 1} in another way once others follow, so "
                f"it does not show which tokens are the assistant's; {way_out}"
            )
        spans.append((begin, end))
    return spans


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
