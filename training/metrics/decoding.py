"""Speculative decoding with the model's own heads: forwards counted and timed against plain generation.

Every prompt is decoded greedily by the model alone and then with its heads drafting, in turns, so that both see the
same load on the machine. The texts must be identical.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtp_ce.decoding.settings import OFF
from mtp_ce.decoding.speculative import Speculation, generate_speculatively
from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.training.data.tokens import DocumentTokens


@dataclass(frozen=True)
class DecodingResult:
    """Results of decoding prompts with and without drafts.

    Attributes:
        prompts: number of prompts.
        prompt_tokens: tokens of the longest prompt.
        identical: number of prompts with identical text both ways. Verifying several tokens in one forward rounds
            differently from decoding one token, so texts may diverge where two logits are equal up to rounding.
        speculation: counts of drafted and accepted tokens over all prompts.
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
        """Return plain time divided by time with drafts."""
        return self.plain_seconds / self.speculative_seconds

    @property
    def kept(self) -> list[float]:
        """Return for each extra head the ratio of rounds in which its draft and all before it were accepted.

        NaN if no round verified a draft, as where the model ends every text at once.
        """
        rounds = self.speculation.offered[0]
        return [kept / rounds if rounds else math.nan for kept in self.speculation.kept]


def choose_prompts(documents: Sequence[Tensor], count: int, tokens: int) -> list[tuple[int, list[int]]]:
    """Return passages from inside documents that are long enough, evenly spread over them.

    Args:
        documents: 1-d token ids.
        count: number of prompts; fewer if the documents have no room for more.
        tokens: tokens of each prompt.

    Returns:
        Prompts, each with the index of its document.
    """
    documents = DocumentTokens.of(documents)
    long = (documents.starts.diff() >= tokens).nonzero()[:, 0].tolist()
    prompts = []
    for index, several in Counter(i * len(long) // count for i in range(count if long else 0)).items():
        document = documents[long[index]]
        # One prompt starts in the middle of the free range, two at its thirds.
        for start in sorted({(len(document) - tokens) * (j + 1) // (several + 1) for j in range(several)}):
            prompts.append((long[index], document[start : start + tokens].tolist()))
    return prompts


def measure_decoding(
    model: MTPWrapper, prompts: Sequence[Tensor], new_tokens: int
) -> tuple[DecodingResult, list[Tensor]]:
    """Decode prompts with and without drafts; return what was measured, and the model's own texts after the prompts.

    Args:
        model: in eval mode, with heads that can draft.
        prompts: [1, S] each, on the model's device; at least one.
        new_tokens: maximum number of tokens to decode from each; decoding stops at the model's end-of-text token.

    Raises:
        UncroppableCacheError: speculative decoding is not possible with the model.
    """
    total: Speculation | None = None
    identical, plain_seconds, speculative_seconds = 0, 0.0, 0.0
    texts, settings = [], generation_settings(model)
    # Warm-up: the first call of each path is slower.
    warm_up = settings | {
        "max_new_tokens": min(new_tokens, 2 * model.horizon), "attention_mask": torch.ones_like(prompts[0])
    }  # fmt: skip
    model.generate(prompts[0], **warm_up)
    generate_speculatively(model, prompts[0], **warm_up)
    for prompt in prompts:
        settings |= {"attention_mask": torch.ones_like(prompt)}
        started = _now(prompt)
        expected = model.generate(prompt, max_new_tokens=new_tokens, **settings)
        between = _now(prompt)
        sequences, speculation = generate_speculatively(model, prompt, max_new_tokens=new_tokens, **settings)
        plain_seconds += between - started
        speculative_seconds += _now(prompt) - between
        identical += torch.equal(sequences, expected)
        texts.append(expected)
        total = speculation if total is None else total + speculation
    assert total is not None
    longest = max(prompt.shape[1] for prompt in prompts)
    result = DecodingResult(len(prompts), longest, identical, total, plain_seconds, speculative_seconds)
    return result, texts


def generation_settings(model: MTPWrapper) -> dict[str, Any]:
    """Return settings of greedy decoding: the model's own, such as a repetition penalty, without some.

    Off are those that speculation does not follow, and strings that end a text, which need a tokenizer.
    """
    pad = model.causal.generation_config.pad_token_id
    off = {name: values[0] for name, values in OFF.items()}
    return {**off, "do_sample": False, "stop_strings": None, "pad_token_id": 0 if pad is None else pad}


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
