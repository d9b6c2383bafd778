"""The losses of the critic on pairs of an intact and a corrupted function.

    V = critic(ids)                     [2P, T]         P intact functions, then the same P corrupted

    ranking      loss = mean_{p,i} -log sigmoid(V[p, i] - V[P + p, i]) + c/n sum_{r,i} V[r, i]^2
                 the mean over i from the first difference to the end of the shorter one, pairs whose rewards differ,
                 n such terms; the sum over every token of those pairs
    regression   loss = mean_{r,i} (V[r, i] - reward[r])^2
                 over every token of every function; the minimum is at V[i] = P(compiles | tokens up to i)

Both are means over the whole batch of an optimizer step, counted before the first forward, so micro-batches accumulate
to the gradient of the batch. Rows are padded on the right: attention is causal, so no token sees padding, and values
there enter no loss.

Ranking alone does not constrain values before the first difference, but the scorer uses differences between any two
tokens. The small squared term keeps all values near 0.

Source: the reward model of arXiv:2203.02155, equation 1, at every token from the difference on; the square is that of
arXiv:2312.09244, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from mtp_ce.training.critic.functions import PairRows


@dataclass(frozen=True)
class Objective:
    """A loss as a sum over tokens.

    Attributes:
        total: maps values [2P, T] and their rows to the sum, 0-d; values at padding are ignored.
        tokens: maps the rows to the mask of tokens that have a term in the sum.
    """

    total: Callable[[Tensor, PairRows], Tensor]
    tokens: Callable[[PairRows], Tensor]


# c of the ranking loss.
CENTRE = 0.001


def ranking_loss(values: Tensor, rows: PairRows) -> Tensor:  # [2P, T]
    """Sum -log sigmoid(V[p, i] - V[P + p, i]) over the compared tokens, and c V^2 over all of their pairs: 0-d."""
    compared = rows.compared()
    intact, corrupted = values.chunk(2)
    # The inner where keeps padding's NaN out of the gradient, the outer one its log 2 out of the sum.
    margin = torch.where(compared, intact - corrupted, 0.0)
    held = rows.real() & rows.differ().repeat(2)[:, None]
    centre = torch.where(held, values, 0.0).square().sum()
    return torch.where(compared, F.softplus(-margin), 0.0).sum() + CENTRE * centre


def regression_loss(values: Tensor, rows: PairRows) -> Tensor:  # [2P, T]
    """Sum (V[r, i] - reward[r])^2 over the tokens that are not padding: 0-d."""
    return torch.where(rows.real(), values - rows.rewards[:, None], 0.0).square().sum()


OBJECTIVES = {
    "ranking": Objective(ranking_loss, PairRows.compared),
    "regression": Objective(regression_loss, PairRows.real),
}


@dataclass(frozen=True)
class PairSums:
    """Sums over pairs for loss and accuracy."""

    loss: float = 0.0
    tokens: int = 0
    ranked: int = 0
    differing: int = 0

    def __add__(self, other: PairSums) -> PairSums:
        return PairSums(
            self.loss + other.loss,
            self.tokens + other.tokens,
            self.ranked + other.ranked,
            self.differing + other.differing,
        )

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the mean loss and the accuracy by name.

        The accuracy is the ratio of pairs with differing rewards whose intact function has the higher value at the last
        token; chance is 0.5. NaN where there is no token to compare, or no such pair.
        """
        return {
            f"{prefix}loss": self.loss / self.tokens if self.tokens else math.nan,
            f"{prefix}accuracy": self.ranked / self.differing if self.differing else math.nan,
        }


def score_pairs(critic: PreTrainedModel, micro_batches: Sequence[PairRows], objective: Objective) -> PairSums:
    """Sum losses and accuracy over micro-batches; with gradients enabled, accumulate the gradient of the mean loss.

    Args:
        critic: returns values as logits [2P, T, 1].
        micro_batches: the batch of one optimizer step, or pairs to score.
        objective: the loss.
    """
    counts = [int(objective.tokens(rows).sum()) for rows in micro_batches]
    normalizer = max(sum(counts), 1)
    sums = PairSums()
    for rows, count in zip(micro_batches, counts, strict=True):
        positions = torch.arange(rows.input_ids.shape[1], device=rows.input_ids.device).expand_as(rows.input_ids)
        values = critic(rows.input_ids, position_ids=positions).logits[:, :, 0]
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        total = objective.total(values, rows)
        if torch.is_grad_enabled():
            (total / normalizer).backward()
        sums += PairSums(float(total.detach()), count, int(rows.ranked(values).sum()), int(rows.differ().sum()))
    return sums
