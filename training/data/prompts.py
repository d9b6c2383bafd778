"""Prompts of a file of JSON lines: a text, a chat or token ids in each, and the domain that the prompt belongs to.

    {"prompt": "def parse(line):", "domain": "code"}
    {"messages": [{"role": "user", "content": "What is a monad?"}], "domain": "chat"}
    {"prompt_token_ids": [1, 4, 29]}

The fields are those of requests to a serving engine. Texts are tokenized with the tokenizer's special tokens, and chats
are rendered with the beginning of the answer, as engines do it. Other fields are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_ce.training.data.chat import TOOLS, chat_template, encode_prompt, prompt_messages
from mtp_ce.training.data.files import check_files, shown
from mtp_ce.training.data.jsonl import objects_of
from mtp_ce.training.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT, MESSAGES, TOKENS = "prompt", "messages", "prompt_token_ids"

DOMAIN = "domain"


@dataclass(frozen=True)
class PromptLine:
    """A line of a file of prompts.

    Attributes:
        where: file and line, for messages.
        field: which of `prompt`, `messages` and `prompt_token_ids` it has.
        value: a string, messages, or integers.
        domain: its domain; None where the line has none.
        tools: those of a chat.
    """

    where: str
    field: str
    value: Any
    domain: str | None = None
    tools: Any = None


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt.

    Attributes:
        tokens: token ids.
        domain: what it is counted under; "" for none.
        where: where it is from, for messages.
    """

    tokens: list[int]
    domain: str = ""
    where: str = ""


def read_prompts(file: Path) -> list[PromptLine]:
    """Read a file of prompts, and check all that needs no tokenizer.

    Raises:
        RecipeError: the file can't be read or holds no prompt, or a line is no prompt.
    """
    check_files("--prompts", [file])
    lines = [_line(row.where, row.fields) for row in objects_of(file)]
    if not lines:
        raise RecipeError(f"--prompts has {shown(file)}, which holds no line; expected one prompt in each")
    return lines


def _line(where: str, fields: dict[str, Any]) -> PromptLine:
    given = [name for name in (TEXT, MESSAGES, TOKENS) if fields.get(name) is not None]
    if len(given) != 1:
        found = " and ".join(map(repr, given)) or "none of them"
        raise RecipeError(f"{where}: expected one of {TEXT!r}, {MESSAGES!r} and {TOKENS!r}; it has {found}")
    (field,) = given
    value, domain = fields[field], fields.get(DOMAIN)
    if domain is not None and not (isinstance(domain, str) and domain.strip()):
        raise RecipeError(f"{where}: field {DOMAIN!r} holds {domain!r}; expected a word")
    kind, expected = (str, "a string") if field == TEXT else (list, "a list")
    if not isinstance(value, kind):
        raise RecipeError(f"{where}: field {field!r} holds {type(value).__name__}; expected {expected}")
    if field == MESSAGES:
        value = prompt_messages(value, f"{where}: field {field!r}")
    if field == TOKENS and (wrong := [token for token in value if type(token) is not int or token < 0]):
        raise RecipeError(f"{where}: field {field!r} holds {wrong[0]!r}; expected integers from 0")
    return PromptLine(where, field, value, domain, fields.get(TOOLS))


def encode_prompts(lines: Sequence[PromptLine], tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> list[Prompt]:
    """Return the tokens of prompts.

    Args:
        lines: the prompts.
        tokenizer: the model's.
        vocab_size: V of the model.

    Raises:
        RecipeError: the tokenizer can't render a chat, or a prompt has no token, or one that the model does not have.
    """
    prompts = []
    domains = any(line.domain is not None for line in lines)
    for line in lines:
        if line.field == MESSAGES and chat_template(tokenizer) is None:
            raise RecipeError(f"{line.where}: a chat, and the tokenizer has no chat template; give a 'prompt' instead")
        if line.field == MESSAGES:
            tokens = encode_prompt(line.where, line.value, line.tools, tokenizer)
        else:
            tokens = tokenizer.encode(line.value) if line.field == TEXT else line.value
        if not tokens:
            raise RecipeError(f"{line.where}: field {line.field!r} has no token; expected at least one")
        if (largest := max(tokens)) >= vocab_size:
            raise RecipeError(f"{line.where}: token {largest} is not below {vocab_size}, the model's vocabulary")
        prompts.append(Prompt(tokens, line.domain or ("-" if domains else ""), line.where))
    return prompts
