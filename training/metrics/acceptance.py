"""Drafts and accepted tokens as a serving engine counts them, from one forward over the model's own greedy text.

    y_0 y_1 ..      greedy tokens after a prompt of S tokens
    d_h(i)          argmax of head h at position S - 1 + i, with the greedy text as its input; the draft of y_(i+h)

    i = 0
    while y_i is not the last token:                a round: y_i is known, and K tokens after it are drafted
        a = largest a <= K with d_h(i) = y_(i+h) for all h = 1..a
        drafts += 1; accepted[h] += 1 for h = 1..a; i += a + 1

A draft is accepted only where all before it are, and those are tokens of the text. So heads that read drafts read the
same tokens in decoding as here, and no draft has to be decoded. vLLM counts in the same way: every round drafts K
tokens and counts all that match, also where the text ends among them.

Source: vLLM's v1/core/sched/scheduler.py, `update_from_output`; its counters `vllm:spec_decode_num_drafts` and
`vllm:spec_decode_num_accepted_tokens_per_pos`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from mtp_ce.heads.protocol import Heads
from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.training.metrics.decoding import generation_settings
from mtp_ce.training.metrics.head_scores import CHUNK_ROWS
from mtp_ce.unembedding import Unembedding


@dataclass(frozen=True)
class Acceptance:
    """Counts of one or several texts; they add up: `sum(counts, Acceptance())`.

    Attributes:
        drafts: number of rounds, each with a draft of K tokens.
        accepted: [K], in how many of them the draft's h-th token was accepted, and so all before it.
        tokens: new tokens of the text.
        prompts: number of prompts.
    """

    drafts: int = 0
    accepted: list[int] = field(default_factory=list)
    tokens: int = 0
    prompts: int = 0

    def __add__(self, other: Acceptance) -> Acceptance:
        accepted = [a + b for a, b in zip_longest(self.accepted, other.accepted, fillvalue=0)]
        return Acceptance(
            self.drafts + other.drafts, accepted, self.tokens + other.tokens, self.prompts + other.prompts
        )

    @property
    def rates(self) -> list[float]:
        """For each position of a draft, the ratio of drafts in which it was accepted; NaN without a draft."""
        return [count / self.drafts if self.drafts else math.nan for count in self.accepted]

    @property
    def mean_length(self) -> float:
        """Mean tokens of a round, accepted ones and the model's own: from 1 to K + 1; NaN without a draft."""
        return 1 + sum(self.accepted) / self.drafts if self.drafts else math.nan


def count_accepted(
    drafted: Sequence[Sequence[int]], tokens: Sequence[int], new_tokens: int, ends: Collection[int] = ()
) -> Acceptance:
    """Count drafts and accepted tokens of one greedy text.

    Args:
        drafted: K sequences; `drafted[h - 1][i]` is head h's draft of `tokens[i + h]`, for all i before the last token.
        tokens: greedy tokens after the prompt, K more than the text has: drafts beyond its end count, too.
        new_tokens: maximum number of tokens of the text.
        ends: tokens that end a text.
    """
    K, i, drafts, accepted = len(drafted), 0, 0, [0] * len(drafted)
    last = last_token(tokens, new_tokens, ends)
    while i < last:
        a = 0
        while a < K and drafted[a][i] == tokens[i + 1 + a]:
            accepted[a] += 1
            a += 1
        drafts += 1
        i += a + 1
    return Acceptance(drafts, accepted, last + 1, 1)


def last_token(tokens: Sequence[int], new_tokens: int, ends: Collection[int]) -> int:
    """Return the index of a text's last token: the first one that ends it, or the last one that it may have."""
    return next((i for i, token in enumerate(tokens[:new_tokens]) if token in ends), new_tokens - 1)


@dataclass(frozen=True)
class AcceptanceResult:
    """Counts of all prompts.

    Attributes:
        draft_tokens: K.
        domains: counts by domain; one entry, "", where prompts have none.
    """

    draft_tokens: int
    domains: dict[str, Acceptance]

    @property
    def total(self) -> Acceptance:
        """Return the counts of all domains together."""
        return sum(self.domains.values(), Acceptance())


@torch.no_grad()
def measure_acceptance(
    model: MTPWrapper,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    draft_tokens: int | None = None,
    *,
    texts: Sequence[Tensor] | None = None,
    ignore_eos: bool = False,
) -> list[Acceptance]:
    """Count what a serving engine counts for greedy texts, for each prompt.

    Args:
        model: in eval mode, with heads that can draft.
        prompts: token ids.
        new_tokens: maximum number of tokens of a text, as `max_tokens` of a request.
        draft_tokens: K, as `num_speculative_tokens`; None means H - 1. Only heads of one module draft more than that.
        texts: the greedy texts with their prompts, [1, L] each, where they were decoded before.
        ignore_eos: whether texts go on after an end-of-text token, as with `ignore_eos` of a request.

    Raises:
        ValueError: the heads can't draft, or not so far.
    """
    K = check_draft_tokens(model, draft_tokens)
    device = next(model.causal.parameters()).device
    ends = [] if ignore_eos else end_tokens(model)
    counts = []
    for index, prompt in enumerate(prompts):
        if texts is None:
            text = _generated(model, torch.tensor([list(prompt)], device=device), new_tokens, ends)
        else:
            text = texts[index]
        tokens = text[0, len(prompt) :].tolist()
        missing = last_token(tokens, new_tokens, ends) + K - len(tokens)
        if missing > 0:
            text = _generated(model, text, missing, [])
            tokens = text[0, len(prompt) :].tolist()
        drafted = draft_along(model, text, len(prompt), K)
        counts.append(count_accepted(drafted, tokens, new_tokens, ends))
    return counts


def check_draft_tokens(model: MTPWrapper, draft_tokens: int | None = None) -> int:
    """Return K, the tokens of a draft.

    Raises:
        ValueError: the heads can't draft, or not so far.
    """
    heads = model.heads
    if not heads.drafts or heads.horizon == 1:
        raise ValueError(f"heads are {heads.kind!r} with horizon {heads.horizon}; expected heads that can draft.")
    if draft_tokens is None:
        return heads.horizon - 1
    deep = _is_one_module(heads)
    if draft_tokens < 1 or (draft_tokens >= heads.horizon and not deep):
        most = "at least 1" if deep else f"from 1 to {heads.horizon - 1}, the number of extra heads"
        raise ValueError(f"draft_tokens is {draft_tokens}; expected {most}.")
    return draft_tokens


def end_tokens(model: MTPWrapper) -> list[int]:
    """Return the tokens that end a text of the model."""
    ends: Any = model.causal.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def draft_along(model: MTPWrapper, text: Tensor, prompt_tokens: int, draft_tokens: int) -> list[list[int]]:
    """Return the argmax of heads 1..K at every position of a text from the last prompt token on.

    Args:
        model: in eval mode.
        text: [1, L].
        prompt_tokens: S.
        draft_tokens: K.
    """
    drafted = []
    horizon = draft_tokens + 1 if _is_one_module(model.heads) else None
    hidden = model.head_hidden_states(horizon=horizon, input_ids=text)
    output = Unembedding.of(model.causal)
    for x in hidden[1 : draft_tokens + 1]:
        chunks = x[0, prompt_tokens - 1 :].split(CHUNK_ROWS[x.device.type])
        drafted.append([token for chunk in chunks for token in output.logits(chunk).argmax(-1).tolist()])
    return drafted


def _is_one_module(heads: Heads) -> bool:
    """Return whether the extra heads are one module that can be fed its own output."""
    return heads.shared or (heads.can_share and heads.horizon == 2)


def _generated(model: MTPWrapper, text: Tensor, new_tokens: int, ends: list[int]) -> Tensor:
    settings = generation_settings(model) | {"attention_mask": torch.ones_like(text), "eos_token_id": ends or None}
    generated: Tensor = model.generate(text, max_new_tokens=new_tokens, **settings)
    return generated
