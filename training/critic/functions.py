"""Pairs of a function that compiles and a corrupted copy of it, with a verifiable reward.

    reward(ids) = 1 if compile(decode(ids)) succeeds, else 0

    delete   a b c d e  ->  a b d e          one token, any
    swap     a b c d e  ->  a d c b e        two different tokens, at most `SWAP_REACH` apart

Both act on tokens of the tokenizer, because values belong to tokens. Not every corruption breaks a function: a word of
a docstring or comment can go. So the reward is never assumed: Python compiles every text.

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

from mtp_ce.training.critic.compiler import compiles
from mtp_ce.training.data.corpus import Document
from mtp_ce.training.data.python_source import parse_python

Corruption = Literal["delete", "swap", "both"]

# Largest distance between two swapped tokens. A larger one is easier to detect and localises the error less.
SWAP_REACH = 4

# Characters of a file that is searched for functions.
_LONGEST_FILE = 5_000_000


@dataclass(frozen=True)
class Pair:
    """A function and a copy corrupted at one position.

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
        """Return whether the corruption changed the reward."""
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
        """Stack pairs, padded to the longest function."""
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
        """Return the mask of tokens that are not padding: [2P, T]."""
        return torch.arange(self.input_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def compared(self) -> Tensor:
        """Return the mask of tokens that the ranking loss compares: [P, T]."""
        i = torch.arange(self.input_ids.shape[1], device=self.lengths.device)
        shorter = torch.minimum(*self.lengths.chunk(2))[:, None]
        return (i >= self.first[:, None]) & (i < shorter) & self.differ()[:, None]

    def differ(self) -> Tensor:
        """Return the mask of pairs whose rewards differ: [P]."""
        intact, corrupted = self.rewards.chunk(2)
        return intact != corrupted

    def ranked(self, values: Tensor) -> Tensor:  # [2P, T]
        """Return the mask of pairs with differing rewards that the last token's value ranks correctly: [P]."""
        last = values.gather(1, self.lengths[:, None] - 1)[:, 0]
        intact, corrupted = last.chunk(2)
        return (intact > corrupted) & self.differ()


def find_functions(documents: Sequence[Document]) -> list[str]:
    """Return the source of every function and method with its decorators, without duplicates.

    A function is dedented, and dropped if it does not compile alone, for example because of a nonlocal variable. Files
    that are not valid Python, or very long, are skipped.

    Args:
        documents: files in any order; functions come in the order of the files and of their lines.
    """
    sources: dict[str, None] = {}
    for document in documents:
        # A tree takes a hundred times the memory of its text.
        tree = parse_python(document.text) if len(document.text) <= _LONGEST_FILE else None
        if tree is None:
            continue
        # str.splitlines also breaks at form feeds, which Python does not count as lines.
        lines = re.split(r"\r\n?|\n", document.text)
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        for node in sorted(nodes, key=lambda node: node.lineno):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            source = textwrap.dedent("\n".join(lines[start - 1 : node.end_lineno])) + "\n"
            if source not in sources and compiles(source):
                sources[source] = None
    return list(sources)


def encode_functions(functions: Sequence[str], tokenizer: PreTrainedTokenizerFast, longest: int) -> list[list[int]]:
    """Return the token ids of functions, with the end-of-text token at both ends as in documents.

    Args:
        functions: sources.
        tokenizer: a fast one; it has an end-of-text token.
        longest: maximum number of tokens of a function, both ends included; longer ones are dropped.
    """
    border = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(functions), add_special_tokens=False)
    # A swap needs two different tokens.
    return [
        [border, *encoding.ids, border]
        for encoding in encoded
        if len(encoding.ids) <= longest - 2 and len(set(encoding.ids)) > 1
    ]


def make_pair(
    intact: list[int], corruption: Corruption, tokenizer: PreTrainedTokenizerFast, generator: torch.Generator
) -> Pair:
    """Corrupt a function at one position, and compute both rewards with Python's compiler.

    Args:
        intact: token ids with the end-of-text token at both ends, which is not corrupted; at least two other tokens
            must differ.
        corruption: "delete", "swap", or "both" for either with probability 1/2.
        tokenizer: decodes the ids.
        generator: source of randomness.
    """
    swap = _draw(2, generator) == 1 if corruption == "both" else corruption == "swap"
    corrupted = _swapped(intact, generator) if swap else _deleted(intact, generator)
    decode = tokenizer.backend_tokenizer.decode
    rewards = tuple(float(compiles(decode(ids[1:-1], skip_special_tokens=False))) for ids in (intact, corrupted))
    first = next(i for i, (one, other) in enumerate(zip(intact, corrupted, strict=False)) if one != other)
    return Pair(intact, corrupted, (rewards[0], rewards[1]), first)


def _deleted(ids: list[int], generator: torch.Generator) -> list[int]:
    i = 1 + _draw(len(ids) - 2, generator)
    return ids[:i] + ids[i + 1 :]


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
