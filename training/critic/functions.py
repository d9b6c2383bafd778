"""Functions that compile, and what becomes of them when one place is corrupted: a reward that can be checked.

    reward(ids) = 1 if compile(decode(ids)) succeeds, else 0

    delete   a b c d e  ->  a b d e          one token, any
    swap     a b c d e  ->  a d c b e        two different tokens, at most `SWAP_REACH` apart

Both work on the tokenizer's tokens, since those are what gets a value. Not every corruption breaks a
function: a word of a docstring or of a comment can go. So the reward is never assumed: Python compiles every text.

Source: corrupting code that a parser accepts and asking the parser again, as Break-It-Fix-It does, arXiv:2106.06600.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mtp_ce.training.data.corpus import Document
from mtp_ce.training.data.python_source import NOT_PYTHON, SOURCE_NAME, parse_python

Corruption = Literal["delete", "swap", "both"]

# Largest distance between two swapped tokens. A larger one is easier to see and says less about where it went wrong.
SWAP_REACH = 4


@dataclass(frozen=True)
class Pair:
    """A function and the same function corrupted in one place.

    Attributes:
        intact: token ids, the end-of-text token at both ends.
        corrupted: token ids of the corrupted function, the end-of-text token at both ends.
        rewards: of intact and corrupted, 1.0 if it compiles, else 0.0.
        first: the first index at which the ids differ; before it both have the same tokens.
    """

    intact: list[int]
    corrupted: list[int]
    rewards: tuple[float, float]
    first: int

    @property
    def differs(self) -> bool:
        """Whether the corruption changed the reward."""
        return self.rewards[0] != self.rewards[1]


@dataclass(frozen=True)
class PairRows:
    """Pairs as rows, padded on the right: P intact functions, then the same P corrupted."""

    input_ids: Tensor  # [2P, T] int64
    lengths: Tensor  # [2P] int64
    rewards: Tensor  # [2P] fp32
    first: Tensor  # [P] int64, where the rows p and P + p begin to differ

    @classmethod
    def of(cls, pairs: Sequence[Pair], pad_id: int, device: torch.device | None = None) -> PairRows:
        """Collect pairs, padded to the longest of them."""
        rows = [*(pair.intact for pair in pairs), *(pair.corrupted for pair in pairs)]
        longest = max(map(len, rows))
        rewards = [*(pair.rewards[0] for pair in pairs), *(pair.rewards[1] for pair in pairs)]
        return cls(
            input_ids=torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows], device=device),
            lengths=torch.tensor([len(row) for row in rows], device=device),
            rewards=torch.tensor(rewards, device=device),
            first=torch.tensor([pair.first for pair in pairs], device=device),
        )

    def real(self) -> Tensor:
        """Where a token stands, not padding: [2P, T]."""
        return torch.arange(self.input_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def compared(self) -> Tensor:
        """Where ranking compares: [P, T]."""
        i = torch.arange(self.input_ids.shape[1], device=self.lengths.device)
        shorter = torch.minimum(*self.lengths.chunk(2))[:, None]
        return (i >= self.first[:, None]) & (i < shorter) & self.differ()[:, None]

    def differ(self) -> Tensor:
        """Which pairs have two rewards: [P]."""
        intact, corrupted = self.rewards.chunk(2)
        return intact != corrupted

    def ranked(self, values: Tensor) -> Tensor:  # [2P, T]
        """Which pairs of two rewards have the intact function above the corrupted one at the last token: [P]."""
        last = values.gather(1, self.lengths[:, None] - 1)[:, 0]
        intact, corrupted = last.chunk(2)
        return (intact > corrupted) & self.differ()


def compiles(source: str) -> bool:
    """Say whether Python compiles a text; nothing is run."""
    try:
        # dont_inherit: this file's own __future__ imports must not decide what is valid.
        compile(source, SOURCE_NAME, "exec", dont_inherit=True)
    except NOT_PYTHON:
        return False
    return True


def find_functions(documents: Sequence[Document]) -> list[str]:
    """Give the source of every function and method, with its decorators, each text once.

    A function is dedented and kept where it compiles by itself; one that names an outer scope's variable as
    nonlocal doesn't. A file that is not valid Python is passed over.

    Args:
        documents: files in any order; functions come in the order of the files and of their lines.
    """
    found: dict[str, None] = {}
    for document in documents:
        tree = parse_python(document.text)
        if tree is None:
            continue
        # str.splitlines also breaks at form feeds, which Python does not count as lines.
        lines = re.split(r"\r\n?|\n", document.text)
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        for node in sorted(nodes, key=lambda node: node.lineno):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            source = textwrap.dedent("\n".join(lines[start - 1 : node.end_lineno])) + "\n"
            if source not in found and compiles(source):
                found[source] = None
    return list(found)


def encode_functions(functions: Sequence[str], tokenizer: PreTrainedTokenizerFast, longest: int) -> list[list[int]]:
    """Give the token ids of functions, the end-of-text token at both ends as documents have it.

    Args:
        functions: sources.
        tokenizer: a fast one; it has an end-of-text token.
        longest: tokens of the longest function to keep, both ends counted.
    """
    border = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(functions), add_special_tokens=False)
    # Two tokens that differ, or there is nothing to swap.
    return [
        [border, *encoding.ids, border]
        for encoding in encoded
        if len(encoding.ids) <= longest - 2 and len(set(encoding.ids)) > 1
    ]


def make_pair(
    intact: list[int], corruption: Corruption, tokenizer: PreTrainedTokenizerFast, generator: torch.Generator
) -> Pair:
    """Corrupt a function in one place and let Python decide both rewards.

    Args:
        intact: token ids with the end-of-text token at both ends, which stays; at least two others that differ.
        corruption: what is done; "both" tosses a coin.
        tokenizer: gives the text back.
        generator: where the draw comes from.
    """
    swap = _draw(2, generator) == 1 if corruption == "both" else corruption == "swap"
    corrupted = _swapped(intact, generator) if swap else _deleted(intact, generator)
    decode = tokenizer.backend_tokenizer.decode
    rewards = tuple(float(compiles(decode(ids[1:-1], skip_special_tokens=False))) for ids in (intact, corrupted))
    first = next(i for i, (one, other) in enumerate(zip(intact, corrupted, strict=False)) if one != other)
    return Pair(intact, corrupted, (rewards[0], rewards[1]), first)


def _deleted(ids: list[int], generator: torch.Generator) -> list[int]:
    place = 1 + _draw(len(ids) - 2, generator)
    return ids[:place] + ids[place + 1 :]


def _swapped(ids: list[int], generator: torch.Generator) -> list[int]:
    while True:
        one = 1 + _draw(len(ids) - 2, generator)
        other = one + 1 + _draw(SWAP_REACH, generator)
        if other < len(ids) - 1 and ids[one] != ids[other]:
            swapped = list(ids)
            swapped[one], swapped[other] = ids[other], ids[one]
            return swapped


def _draw(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))
