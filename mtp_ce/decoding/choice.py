"""How tokens are chosen: greedily or by sampling, from logits that the processors of `generate` have changed.

    scores_i = processors(text y_0 .. y_{i-1}, logits_i)     each position with the draft before it
    p_i      = softmax(scores_i)                             of the model; q_i likewise of the head that drafted y_i

A draft y_i is accepted with probability min(1, p_i(y_i) / q_i(y_i)), else replaced by a sample of max(0, p_i - q_i);
greedily, it is accepted if it is the argmax of scores_i. In a batch all rows keep the same number of tokens, the least
that any of them accepted plus one: a row that accepted more keeps its draft there. What follows is drafted again, so
that each token still has the distribution p whatever the other rows do.

Source: arXiv:2302.01318, algorithm 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Choice:
    """Greedy choice or sampling, under the logits processors of one call of `generate`.

    Args:
        processors: the LogitsProcessorList that `generate` has built, warpers included.
        do_sample: whether to sample.
        ends: [E], tokens that end a text; None for none.
        generator: source of random numbers; None means torch's own.
    """

    def __init__(
        self, processors: Any, do_sample: bool, ends: Tensor | None, generator: torch.Generator | None
    ) -> None:
        self.processors, self.do_sample, self.ends, self.generator = processors, do_sample, ends, generator

    def scores(self, text: Tensor, logits: Tensor) -> Tensor:  # [B, L], [B, V] -> [B, V]
        """Return the processed logits of the token after `text`, in fp32 as `generate` processes them."""
        processed: Tensor = self.processors(text, logits.to(torch.float32, copy=True))
        return processed

    def pick(self, scores: Tensor) -> tuple[Tensor, Tensor]:  # [B, V]
        """Return tokens [B], and what they were chosen from, [B, V]: probabilities, or the scores if greedily."""
        if not self.do_sample:
            return scores.argmax(-1), scores
        probabilities = scores.softmax(-1)
        return self._sample(probabilities), probabilities

    def verify(
        self, text: Tensor, draft: Tensor, drawn_from: Tensor, logits: Tensor, active: Tensor
    ) -> tuple[Tensor, list[int]]:
        """Return the tokens [B, n] that follow a text, and how many tokens of its draft each row accepted.

        Args:
            text: [B, L], the tokens before the draft.
            draft: [B, h], tokens.
            drawn_from: [B, h, V], what they were chosen from.
            logits: [B, h + 1, V] of the model, at the positions before, in and after the draft.
            active: [B], the rows whose acceptance counts; others are finished.
        """
        h, scores = draft.shape[1], logits.float()
        if self.processors:
            whole = torch.cat([text, draft], 1)
            steps = [self.scores(whole[:, : text.shape[1] + i], logits[:, i]) for i in range(h + 1)]
            scores = torch.stack(steps, 1)
        if self.do_sample:
            p, q = scores.softmax(-1), F.pad(drawn_from, (0, 0, 0, 1))  # nothing was drafted after the draft
            ratio = (p[:, :h].gather(2, draft[..., None]) / q[:, :h].gather(2, draft[..., None]))[..., 0]
            accepted = torch.rand(ratio.shape, device=p.device, generator=self.generator) < ratio
        else:
            argmax = scores.argmax(-1)
            accepted = draft == argmax[:, :h]
        counts = accepted.long().cumprod(1).sum(1).where(active, h)
        # The one synchronisation with the device per round, where there are neither processors nor stopping criteria.
        kept = min(found := counts.tolist())
        if self.do_sample:
            rest = (p[:, kept] - q[:, kept]).clamp(min=0)
            # Where p and q differ by rounding alone, the rest may be 0 everywhere.
            follows = self._sample(torch.where(rest.any(-1, keepdim=True), rest, p[:, kept]))
        else:
            follows = argmax[:, kept]
        tokens = F.pad(draft, (0, 1))[:, : kept + 1]
        tokens[:, kept] = tokens[:, kept].where(counts > kept, follows)
        return tokens, found

    def _sample(self, weights: Tensor) -> Tensor:  # [B, V], need not sum to 1
        # As in torch.multinomial, without its validity check, which would synchronise with the device.
        return (weights / torch.empty_like(weights).exponential_(generator=self.generator)).argmax(-1)


class Draft:
    """Chooses the tokens of one draft one after the other, under the same processors as the model's own.

    A drafter calls it with the logits of its heads, of all at once or of one after the other.
    """

    def __init__(self, choice: Choice, text: Tensor, active: Tensor) -> None:
        self.choice, self.text, self.active = choice, text, active
        self.length, self.ended = 0, False

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:  # [B, N, V]
        """Return tokens [B, N], and what they were chosen from, [B, N, V]."""
        chosen = [self._one(logits[:, i]) for i in range(logits.shape[1])]
        tokens, drawn_from = (torch.stack(parts, 1) for parts in zip(*chosen, strict=True))
        return tokens, drawn_from

    def _one(self, logits: Tensor) -> tuple[Tensor, Tensor]:  # [B, V]
        # Processors need not know what follows the end of a text. So the draft ends before a token that ends one, which
        # the model then chooses itself, and what is drafted after it is not processed.
        processes = bool(self.choice.processors) and not self.ended
        scores = self.choice.scores(self.text, logits) if processes else logits.float()
        token, drawn_from = self.choice.pick(scores)
        if processes and self.choice.ends is not None:
            self.ended = bool((torch.isin(token, self.choice.ends) & self.active).any())
        self.length += not self.ended
        self.text = torch.cat([self.text, token[:, None]], 1)
        return token, drawn_from
