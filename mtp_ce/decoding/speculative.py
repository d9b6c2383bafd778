"""Self-speculative decoding: the heads draft, the model verifies the draft in one forward, the text is the model's own.

    y_0 ~ p(. | prefix)                  head 0 is the model itself: y_0 needs no verification
    y_h ~ q_h(. | prefix)                h = 1..H-1, drafted by head h
    p_h = p(. | prefix, y_0 .. y_{h-1})  all from one forward over y_0 .. y_{H-1}, with the cache of the prefix
    y_h is accepted with probability min(1, p_h(y_h) / q_h(y_h)); the first rejected one is replaced by
    y_h ~ max(0, p_h - q_h), and if all are accepted, y_H ~ p_H follows: either is the next round's y_0

Every token accepted or replaced in this way has the distribution p, whatever q is. Greedy decoding is the case in which
p and q are 0 and 1: a draft is accepted if the model would have chosen it. A round costs one forward of the model and
yields at least one token.

Source: arXiv:2302.01318, algorithm 2, with drafts from heads as in arXiv:2401.10774.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer

from mtp_ce.heads.protocol import ModelWithHeads
from mtp_ce.unembedding import Unembedding


@dataclass
class Speculation:
    """Counts of one decoding. Those of several prompts add up: `sum(counts, Speculation())`.

    Attributes:
        forwards: forwards of the model, that of the prompt included.
        rounds: forwards that verified a draft, or computed the last token: all but the prompt's.
        tokens: new tokens.
        offered: for each extra head, how often its token was verified: all before it were accepted.
        kept: for each extra head, how often its token was accepted.
    """

    forwards: int = 0
    rounds: int = 0
    tokens: int = 0
    offered: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)

    def __add__(self, other: Speculation) -> Speculation:
        return Speculation(
            self.forwards + other.forwards,
            self.rounds + other.rounds,
            self.tokens + other.tokens,
            *([one + more for one, more in zip_longest(*counts, fillvalue=0)]
              for counts in ((self.offered, other.offered), (self.kept, other.kept))),
        )  # fmt: skip

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per forward, that of the prompt included; 1 for plain decoding."""
        return self.tokens / max(self.forwards, 1)

    @property
    def acceptance(self) -> list[float]:
        """For each extra head, the fraction of its verified tokens that were accepted; NaN if none was verified."""
        return [kept / offered if offered else math.nan for kept, offered in zip(self.kept, self.offered, strict=True)]

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per round, accepted drafts and the model's own token: tau of arXiv:2401.15077, from 1 to H."""
        return 1 + sum(self.kept) / max(self.rounds, 1)


class SpeculativeOutput(NamedTuple):
    """Tokens, and the counts of their decoding."""

    sequences: Tensor  # [1, S + new], the prompt included
    speculation: Speculation


@torch.no_grad()
def generate_speculatively(
    wrapper: ModelWithHeads,
    input_ids: Tensor,  # [1, S]
    attention_mask: Tensor | None = None,  # [1, S]
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | list[int] | None = None,
    generator: torch.Generator | None = None,
) -> SpeculativeOutput:
    """Decode with drafts of the wrapper's heads.

    Of the model's generation settings only the length and the end of text apply: no penalty or other change of logits.

    Args:
        wrapper: an `MTPWrapper` with heads that draft: "residual", "layer" or "sequential", or your own.
        input_ids: one prompt, not padded.
        attention_mask: ones, as a tokenizer returns them.
        max_new_tokens: maximal number of new tokens; None takes the model's own generation settings, and where they
            set none, max_length.
        max_length: maximal number of tokens, the prompt included; None takes the model's own generation settings, and
            where they set none, 20 new tokens.
        do_sample: whether to sample; else greedy.
        temperature: of sampling, above 0.
        top_k: sample among the k most likely tokens; None or 0 means all.
        top_p: sample among the most likely tokens with this total probability, from 0 to 1; None means all.
        eos_token_id: decoding ends with it; None takes the model's own generation settings.
        generator: source of random numbers; None means torch's own.

    Returns:
        The tokens of the model's own greedy decoding, or samples of its distribution, and the counts. A forward over
        several tokens rounds differently from one over a single token: where two tokens tie but for rounding, the text
        may differ from that of `generate`.

    Raises:
        ValueError: more than one prompt, a padded one, heads that can't draft, a model whose cache can't be cropped, or
            a setting out of its range.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids is {list(input_ids.shape)}; expected one prompt, [1, S].")
    if attention_mask is not None and (attention_mask.shape != input_ids.shape or not attention_mask.all()):
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)} with {int(attention_mask.sum())} ones; expected ones of "
            f"{list(input_ids.shape)}: no head drafts for a padded prompt. Pass the prompt without its padding."
        )
    causal, heads, H = wrapper.causal, wrapper.heads, wrapper.heads.horizon
    if not heads.drafts or H == 1:
        raise ValueError(
            f"heads are {heads.kind!r} with horizon {H}; speculative decoding needs heads that draft, such as "
            "heads='residual', and a horizon above 1."
        )
    max_new_tokens = _new_tokens(max_new_tokens, max_length, input_ids.shape[1], causal)
    _check_sampling(temperature, top_k, top_p)
    choice = _Sampling(temperature, top_k, top_p, generator) if do_sample else _Greedy()
    output, base, cache_argument = Unembedding.of(causal), causal.base_model, _cache_argument(causal.base_model)
    ends = _ends(eos_token_id, causal)
    cache = _new_cache(causal)
    counts = Speculation(forwards=1, offered=[0] * (H - 1), kept=[0] * (H - 1))

    def run(tokens: Tensor) -> Tensor:  # [1, S] -> [1, S, D]
        hidden: Tensor = base(input_ids=tokens, use_cache=True, **{cache_argument: cache}).last_hidden_state
        return hidden

    with heads.drafter(causal, lambda: _new_cache(causal)) as drafter:
        hidden = run(input_ids)
        _check_croppable(cache, input_ids.shape[1], causal)
        token, drawn_from = choice.draw(output.logits(hidden[0, -1:]))
        # `text` holds the accepted tokens; `begin` is the position at which the last forward began.
        text, begin = torch.cat([input_ids[0], token]), 0
        new = token.tolist()
        while len(new) < max_new_tokens and new[-1] not in ends:
            # The cache holds every position but the newest token's. What is cropped: the positions of rejected tokens,
            # and those that the next forward repeats.
            cached = len(text) - 1
            width = min(H - 1, max_new_tokens - len(new) - 1)
            draft = token[:0]  # the last token needs no draft
            if width:
                draft, drawn_from = drafter.draft(hidden, cached - begin - 1, text[begin:], width, choice.draw)
            end_of_cache = begin + hidden.shape[1]
            begin = max(cached - drafter.repeats, 0)
            _crop([*cache.layers, *drafter.layers], end_of_cache - begin)
            hidden = run(torch.cat([text[begin:], draft])[None])
            counts.forwards, counts.rounds = counts.forwards + 1, counts.rounds + 1
            count, token = choice.verify(draft, drawn_from, output.logits(hidden[0, -1 - width :]))
            # The one synchronisation with the device per round.
            *drafted, follows, accepted = torch.cat([draft, token, count]).tolist()
            for h in range(min(accepted + 1, width)):
                counts.offered[h] += 1
                counts.kept[h] += h < accepted
            text = torch.cat([text, draft[:accepted], token])
            end = next((i for i, one in enumerate(drafted[:accepted]) if one in ends), accepted)
            new += [*drafted[:accepted], follows][: end + 1]
    counts.tokens = len(new)
    return SpeculativeOutput(text[None, : input_ids.shape[1] + len(new)], counts)


class _Greedy:
    """Greedy decoding: p and q are 0 and 1."""

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:  # [N, V]
        """Return tokens [N], and the scores [N, V] that they were drawn from."""
        return logits.argmax(-1), logits

    def verify(self, draft: Tensor, drawn_from: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many tokens of a draft [h] are accepted, [1], and the token [1] after them.

        Args:
            draft: [h], tokens.
            drawn_from: [h, V], their scores.
            logits: [h + 1, V] of the model, at the positions before, in and after the draft.
        """
        argmax = logits.argmax(-1)
        count = _leading(draft == argmax[:-1])
        return count, argmax.gather(0, count)


class _Sampling:
    """Sampling from the distribution of the logits under temperature, top-k and top-p."""

    def __init__(
        self, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
    ) -> None:
        self.steps: list[Any] = [TemperatureLogitsWarper(float(temperature))]
        self.steps += [TopKLogitsWarper(top_k)] if top_k else []
        self.steps += [TopPLogitsWarper(top_p)] if top_p is not None and top_p < 1 else []
        self.generator = generator

    def distribution(self, logits: Tensor) -> Tensor:
        """Return probabilities [N, V]."""
        logits = logits.float()
        for step in self.steps:
            logits = step(None, logits)
        return logits.softmax(-1)

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens [N], and the scores [N, V] that they were drawn from."""
        probabilities = self.distribution(logits)
        return self._sample(probabilities), probabilities

    def verify(self, draft: Tensor, drawn_from: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many tokens of a draft [h] are accepted, [1], and the token [1] after them.

        Args:
            draft: [h], tokens.
            drawn_from: [h, V], their scores.
            logits: [h + 1, V] of the model, at the positions before, in and after the draft.
        """
        p, h = self.distribution(logits), len(draft)
        q = F.pad(drawn_from[:h], (0, 0, 0, 1))  # nothing was drafted for the position after the draft
        ratio = (p[:h].gather(1, draft[:, None]) / q[:h].gather(1, draft[:, None]))[:, 0]
        count = _leading(torch.rand(h, device=p.device, generator=self.generator) < ratio)
        p, q = p.index_select(0, count), q.index_select(0, count)
        rest = (p - q).clamp(min=0)
        # Where p and q differ by rounding alone, the rest may be 0 everywhere.
        return count, self._sample(torch.where(rest.any(), rest, p))

    def _sample(self, weights: Tensor) -> Tensor:  # [N, V], need not sum to 1
        # As in torch.multinomial, without its validity check, which would synchronise with the device.
        return (weights / torch.empty_like(weights).exponential_(generator=self.generator)).argmax(-1)


def _new_tokens(requested: int | None, max_length: int | None, prompt: int, causal: Any) -> int:
    """Return the maximal number of new tokens, by the rules of transformers."""
    settings = causal.generation_config
    requested = settings.max_new_tokens if requested is None else requested
    limit = settings.max_length if max_length is None else max_length
    for name, value in (("max_new_tokens", requested), ("max_length", limit)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{name} is {value!r}; expected an integer.")
    if requested is not None:
        if requested < 1:
            raise ValueError(f"max_new_tokens is {requested}; expected at least 1.")
        return requested
    if limit is None:
        positions = getattr(causal.config.get_text_config(decoder=True), "max_position_embeddings", None)
        limit = prompt + 20 if positions is None else min(prompt + 20, positions)
    if limit <= prompt:
        raise ValueError(
            f"max_length is {limit} and the prompt has {prompt} tokens; expected more. Or set max_new_tokens."
        )
    return limit - prompt


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature}; expected a number above 0. do_sample=False takes the most likely token."
        )
    if top_k is not None and (not isinstance(top_k, int) or top_k < 0):
        raise ValueError(f"top_k is {top_k}; expected a whole number of tokens, or None for all.")
    if top_p is not None and not 0 <= top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected a probability from 0 to 1, or None for all tokens.")


def _leading(accepted: Tensor) -> Tensor:  # [h]
    """Return the number of true values before the first false one, [1]."""
    return accepted.long().cumprod(0).sum(0, keepdim=True)


def _cache_argument(base: Any) -> str:
    """Return the name of the cache in a model's forward, which transformers renames from past_key_values to cache."""
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


def _new_cache(causal: Any) -> DynamicCache:
    cache = DynamicCache(config=causal.config)
    # A sliding window then keeps the positions that rejected tokens push out of it, until it is cropped.
    getattr(cache, "activate_past_recording", lambda: None)()
    return cache


def _crop(layers: list[Any], positions: int) -> None:
    for layer in layers:
        # A layer that records its past has to be told also that nothing was rejected. One that holds nothing yet is
        # skipped: transformers before 5.22 fails to crop it.
        if layer.is_initialized and (positions or getattr(layer, "record_past", False)):
            layer.crop(-positions)


def _check_croppable(cache: DynamicCache, length: int, causal: Any) -> None:
    """Refuse a model whose state can't be rolled back: by the type of its cache, or because it has not used it."""
    croppable = (getattr(layer, "is_croppable", type(layer) is DynamicLayer) for layer in cache.layers)
    if not all(croppable) or cache.get_seq_length() != length:
        raise ValueError(
            f"model is {type(causal).__name__}, whose cache transformers {transformers.__version__} can't crop "
            "before a rejected token; generate without speculative=True."
        )


def _ends(requested: int | list[int] | None, causal: Any) -> set[int]:
    ends = causal.generation_config.eos_token_id if requested is None else requested
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
