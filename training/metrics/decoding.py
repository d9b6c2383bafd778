"""What the heads are worth when they draft: the same text with fewer forwards, counted and timed.

Every prompt is decoded greedily by the model alone and with its heads drafting, one after the other, so that both meet
the same machine. The texts must be the same.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtp_ce.decoding.speculative import Speculation, generate_speculatively
from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.training.data.tokens import DocumentTokens


@dataclass(frozen=True)
class DecodingResult:
    """Decoding of some prompts.

    Attributes:
        prompts: how many.
        prompt_tokens: tokens in each.
        identical: how many gave the same text both ways. Verifying several tokens at once rounds differently from
            decoding one, so where two tokens are equally likely but for rounding, the texts may part.
        speculation: what the drafts came to, over all prompts.
        plain_seconds: time of the model's own `generate`.
        speculative_seconds: time with drafts.
    """

    prompts: int
    prompt_tokens: int
    identical: int
    speculation: Speculation
    plain_seconds: float
    speculative_seconds: float

    @property
    def speedup(self) -> float:
        """Plain time over time with drafts."""
        return self.plain_seconds / self.speculative_seconds

    @property
    def kept(self) -> list[float]:
        """For each extra head, the share of rounds in which its token was kept: it and all before it were right."""
        rounds = max(self.speculation.offered[0], 1)
        return [kept / rounds for kept in self.speculation.kept]


def choose_prompts(documents: Sequence[Tensor], count: int, tokens: int) -> list[Tensor]:
    """Give passages from inside documents that are long enough, spread over all of them.

    Args:
        documents: 1-d token ids.
        count: how many prompts, fewer where the documents have no more places.
        tokens: of each.

    Returns:
        Prompts [1, tokens].
    """
    documents = DocumentTokens.of(documents)
    long = (documents.starts.diff() >= tokens).nonzero()[:, 0].tolist()
    prompts = []
    for place, several in Counter(i * len(long) // count for i in range(count if long else 0)).items():
        document = documents[long[place]]
        # One stands in the middle, two at the thirds.
        for start in sorted({(len(document) - tokens) * (j + 1) // (several + 1) for j in range(several)}):
            prompts.append(document[start : start + tokens].long()[None])
    return prompts


def measure_decoding(model: MTPWrapper, prompts: Sequence[Tensor], new_tokens: int) -> DecodingResult:
    """Decode prompts both ways.

    Args:
        model: in eval mode, with heads that can draft.
        prompts: [1, S] each, on the model's device; at least one.
        new_tokens: to decode from each, at most; decoding ends at the model's end of text.
    """
    found: Speculation | None = None
    identical, plain_seconds, speculative_seconds = 0, 0.0, 0.0
    pad = model.causal.generation_config.pad_token_id
    plain: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": new_tokens,
        "pad_token_id": 0 if pad is None else pad,
    }
    # What runs for the first time is slower.
    few = min(new_tokens, 2 * model.horizon)
    model.generate(prompts[0], attention_mask=torch.ones_like(prompts[0]), **{**plain, "max_new_tokens": few})
    generate_speculatively(model, prompts[0], max_new_tokens=few)
    for prompt in prompts:
        started = _now(prompt)
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **plain)
        between = _now(prompt)
        sequences, one = generate_speculatively(model, prompt, max_new_tokens=new_tokens)
        plain_seconds += between - started
        speculative_seconds += _now(prompt) - between
        identical += torch.equal(sequences, expected)
        found = one if found is None else found + one
    assert found is not None
    return DecodingResult(len(prompts), prompts[0].shape[1], identical, found, plain_seconds, speculative_seconds)


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
