"""Self-speculative decoding: the heads draft, the model checks all of it in one forward, the text stays the model's.

    y_0 ~ p(. | prefix)                  head 0 is the model itself: y_0 needs no check
    y_h ~ q_h(. | prefix)                h = 1..H-1, drafted by head h
    p_h = p(. | prefix, y_0 .. y_{h-1})  all from one forward over y_0 .. y_{H-1}, with the cache of the prefix
    y_h is kept with probability min(1, p_h(y_h) / q_h(y_h)); at the first that is not, y_h ~ max(0, p_h - q_h) instead,
    and where all are kept, y_H ~ p_H: either is the next round's y_0

Every token kept or replaced so has the distribution p, whatever q is. Greedy decoding is the case in which p and q are
0 and 1: what is kept is what the model would have chosen. A round costs one forward and gives at least one token.

Source: arXiv:2302.01318, algorithm 2, with drafts from heads as in arXiv:2401.10774.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer

from mtp_ce.decoding.drafting import KINDS, drafter
from mtp_ce.unembedding import Unembedding

if TYPE_CHECKING:
    from mtp_ce.hf.wrapper import MTPWrapper


@dataclass
class Speculation:
    """How well the heads drafted. Those of several prompts add up: `sum(found, Speculation())`.

    Attributes:
        forwards: forwards of the model, that of the prompt included.
        rounds: forwards that checked a draft, or gave the last token: all but the prompt's.
        tokens: new tokens.
        offered: for each extra head, how often its token was looked at: all before it were kept.
        kept: for each extra head, how often it was kept.
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
        """New tokens per forward, that of the prompt included; plain decoding gives 1."""
        return self.tokens / max(self.forwards, 1)

    @property
    def acceptance(self) -> list[float]:
        """For each extra head, the share of its tokens that were kept, of those looked at."""
        return [kept / max(offered, 1) for kept, offered in zip(self.kept, self.offered, strict=True)]

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per round, the drafts kept and the model's own one: tau of arXiv:2401.15077, from 1 to H."""
        return 1 + sum(self.kept) / max(self.rounds, 1)


class SpeculativeOutput(NamedTuple):
    """Tokens and how they came about."""

    sequences: Tensor  # [1, S + new], the prompt included
    speculation: Speculation


@torch.no_grad()
def generate_speculatively(
    wrapper: MTPWrapper,
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

    Of the model's generation settings the length and the end of text count: no penalty or other change of logits is
    applied.

    Args:
        wrapper: its heads are "residual", "layer" or "sequential".
        input_ids: one prompt, not padded.
        attention_mask: ones, as a tokenizer gives them.
        max_new_tokens: new tokens at most; None takes the model's own generation settings, and where they say nothing
            goes by max_length.
        max_length: tokens at most, the prompt's included; None takes the model's own generation settings, and where
            they say nothing 20 new tokens.
        do_sample: whether to sample; else greedy.
        temperature: of sampling, above 0.
        top_k: sample among so many; None or 0 means all.
        top_p: sample among the likeliest that have this much probability, from 0 to 1; None means all.
        eos_token_id: decoding ends with it; None takes the model's own generation settings.
        generator: where samples come from; None means torch's own.

    Returns:
        The tokens that the model alone would give (greedy), or of its distribution (sampling), and statistics. A
        forward over several tokens rounds otherwise than over one: where two tokens tie but for that, so may these.

    Raises:
        ValueError: more than one prompt, a padded one, heads that can't draft, a model whose cache can't forget
            rejected tokens, or a setting out of its range.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids is {list(input_ids.shape)}; expected one prompt, [1, S].")
    if attention_mask is not None and (attention_mask.shape != input_ids.shape or not attention_mask.all()):
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)} with {int(attention_mask.sum())} ones; expected ones of "
            f"{list(input_ids.shape)}: no head drafts for a padded prompt. Give the prompt without its padding."
        )
    if wrapper.kind not in KINDS or wrapper.horizon == 1:
        raise ValueError(
            f"heads are {wrapper.kind!r} with horizon {wrapper.horizon}; speculative decoding needs heads of one of "
            f"the kinds {', '.join(map(repr, KINDS))} and a horizon above 1."
        )
    max_new_tokens = _new_tokens(max_new_tokens, max_length, input_ids.shape[1], wrapper.causal)
    _check_sampling(temperature, top_k, top_p)
    choice = _Sampling(temperature, top_k, top_p, generator) if do_sample else _Greedy()
    causal, H = wrapper.causal, wrapper.horizon
    output, base = Unembedding.of(causal), causal.base_model
    ends = _ends(eos_token_id, causal)
    cache = _new_cache(causal)
    found = Speculation(forwards=1, offered=[0] * (H - 1), kept=[0] * (H - 1))

    with drafter(wrapper, lambda: _new_cache(causal)) as heads:
        hidden = base(input_ids=input_ids, past_key_values=cache, use_cache=True).last_hidden_state  # [1, S, D]
        _check_croppable(cache, input_ids.shape[1], causal)
        token, drawn_from = choice.draw(output.logits(hidden[0, -1:]))
        text, begin = torch.cat([input_ids[0], token]), 0  # what is decided; where the last forward began
        new = token.tolist()
        while len(new) < max_new_tokens and new[-1] not in ends:
            # Every position is in the cache but the newest token's. Cut off: what was rejected, what begins again.
            cached = len(text) - 1
            width = min(H - 1, max_new_tokens - len(new) - 1)
            draft = token[:0]  # the last token is the model's own
            if width:
                draft, drawn_from = heads.draft(hidden, cached - begin - 1, text[begin:], width, choice.draw)
            cut = begin + hidden.shape[1]
            begin = max(cached - heads.repeats, 0)
            _crop([*cache.layers, *heads.layers], cut - begin)
            fed = torch.cat([text[begin:], draft])
            hidden = base(input_ids=fed[None], past_key_values=cache, use_cache=True).last_hidden_state
            found.forwards, found.rounds = found.forwards + 1, found.rounds + 1
            count, token = choice.check(draft, drawn_from, output.logits(hidden[0, -1 - width :]))
            # The host waits here, once a round.
            *drafted, follows, kept = torch.cat([draft, token, count]).tolist()
            for h in range(min(kept + 1, width)):
                found.offered[h] += 1
                found.kept[h] += h < kept
            text = torch.cat([text, draft[:kept], token])
            end = next((i for i, one in enumerate(drafted[:kept]) if one in ends), kept)
            new += [*drafted[:kept], follows][: end + 1]
    found.tokens = len(new)
    return SpeculativeOutput(text[None, : input_ids.shape[1] + len(new)], found)


class _Greedy:
    """The likeliest token: p and q are 0 and 1."""

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:  # [N, V]
        """Tokens [N], and what they were drawn from."""
        return logits.argmax(-1), logits

    def check(self, draft: Tensor, drawn_from: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """How many of a draft [h] are kept, [1], and the token [1] after them, of the model's logits [h + 1, V]."""
        best = logits.argmax(-1)
        count = _leading(draft == best[:-1])
        return count, best.gather(0, count)


class _Sampling:
    """A sample of the distribution that temperature, top-k and top-p make of the logits."""

    def __init__(
        self, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
    ) -> None:
        self.steps: list[Any] = [TemperatureLogitsWarper(float(temperature))]
        self.steps += [TopKLogitsWarper(top_k)] if top_k else []
        self.steps += [TopPLogitsWarper(top_p)] if top_p is not None and top_p < 1 else []
        self.generator = generator

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities [N, V]."""
        logits = logits.float()
        for step in self.steps:
            logits = step(None, logits)
        return logits.softmax(-1)

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N], and what they were drawn from."""
        probabilities = self.distribution(logits)
        return self._sample(probabilities), probabilities

    def check(self, draft: Tensor, drawn_from: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """How many of a draft [h] are kept, [1], and the token [1] after them, of the model's logits [h + 1, V]."""
        p, h = self.distribution(logits), len(draft)
        q = F.pad(drawn_from[:h], (0, 0, 0, 1))  # after the last of the draft nothing was drafted
        ratio = (p[:h].gather(1, draft[:, None]) / q[:h].gather(1, draft[:, None]))[:, 0]
        count = _leading(torch.rand(h, device=p.device, generator=self.generator) < ratio)
        p, q = p.index_select(0, count), q.index_select(0, count)
        rest = (p - q).clamp(min=0)
        # Where p and q differ by rounding alone, nothing may be left.
        return count, self._sample(torch.where(rest.any(), rest, p))

    def _sample(self, weights: Tensor) -> Tensor:  # [N, V], need not add up to 1
        # As torch.multinomial does it, which also asks the host whether they are probabilities.
        return (weights / torch.empty_like(weights).exponential_(generator=self.generator)).argmax(-1)


def _new_tokens(given: int | None, max_length: int | None, prompt: int, causal: Any) -> int:
    """How many tokens at most, by the rule of transformers."""
    settings = causal.generation_config
    given = settings.max_new_tokens if given is None else given
    said = settings.max_length if max_length is None else max_length
    for name, value in (("max_new_tokens", given), ("max_length", said)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{name} is {value!r}; expected an integer.")
    if given is not None:
        if given < 1:
            raise ValueError(f"max_new_tokens is {given}; expected at least 1.")
        return given
    if said is None:
        positions = getattr(causal.config.get_text_config(decoder=True), "max_position_embeddings", None)
        said = prompt + 20 if positions is None else min(prompt + 20, positions)
    if said <= prompt:
        raise ValueError(
            f"max_length is {said} and the prompt has {prompt} tokens; expected more. Or set max_new_tokens."
        )
    return said - prompt


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature}; expected a number above 0. do_sample=False takes the likeliest."
        )
    if top_k is not None and (not isinstance(top_k, int) or top_k < 0):
        raise ValueError(f"top_k is {top_k}; expected a whole number of tokens, or None for all.")
    if top_p is not None and not 0 <= top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected a probability from 0 to 1, or None for all tokens.")


def _leading(kept: Tensor) -> Tensor:  # [h]
    """How many are true before the first that is not, [1]."""
    return kept.long().cumprod(0).sum(0, keepdim=True)


def _new_cache(causal: Any) -> DynamicCache:
    cache = DynamicCache(config=causal.config)
    # A sliding window then keeps what rejected tokens push out of it, until it is cropped.
    getattr(cache, "activate_past_recording", lambda: None)()
    return cache


def _crop(layers: list[Any], positions: int) -> None:
    for layer in layers:
        # A layer that records its past has to be told also that nothing was rejected. One that holds nothing yet is
        # skipped: transformers before 5.22 fails to crop it.
        if layer.is_initialized and (positions or getattr(layer, "record_past", False)):
            layer.crop(-positions)


def _check_croppable(cache: DynamicCache, length: int, causal: Any) -> None:
    """Refuse a model whose state can't go back. Some are known by their cache, some by not having used it."""
    croppable = (getattr(layer, "is_croppable", type(layer) is DynamicLayer) for layer in cache.layers)
    if not all(croppable) or cache.get_seq_length() != length:
        raise ValueError(
            f"model is {type(causal).__name__}, whose cache transformers {transformers.__version__} can't cut back to "
            "before a rejected token; generate without speculative=True."
        )


def _ends(given: int | list[int] | None, causal: Any) -> set[int]:
    ends = causal.generation_config.eos_token_id if given is None else given
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
