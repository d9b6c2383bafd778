"""Normalise scores to weights of mean exactly 1 that stay within their bounds.

    z = (s - mean) / std                   over the supervised tokens of the scope
    u = exp((z - max z) / temperature)
    w = clip(c u, eps, w_max)              with the c for which mean(w) = 1

Clipping and then rescaling breaks the upper bound, rescaling and then clipping breaks the mean. Here c is found
exactly: the mean of clip(c u) is piecewise linear and increasing in c, with a breakpoint where a token reaches either
bound. All breakpoints of a scope are sorted; the mean at each follows from counts and from sums of u over a suffix of
the sorted tokens (summed from the smallest up, so that nothing cancels); the interval that contains the mean 1 is then
solved for c.

All tensors have the size of the scores and stay on their device, in float64; there is no host synchronisation.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mtp_ce.scorers.weights import TokenWeights, WeightStatistics

# exp(-690) = 1e-300: below it u would be 0, which no c could scale up. Lower exponents are clamped to it.
LOWEST_EXPONENT = -690.0
# The most that a token at w_max for certain may exceed, as an exponent, the first one that is not; see `_Order.soft`.
HIGHEST_DISTANCE = 300.0


def normalize_weights(
    scores: Tensor,  # [B, S]
    supervised: Tensor,  # [B, S] bool
    *,
    mode: Literal["softmax", "topk"] = "softmax",
    temperature: float = 0.7,
    eps: float = 0.05,
    w_max: float = 3.0,
    top_fraction: float = 0.6,
    scope: Literal["sequence", "batch", "global"] = "sequence",
    document_ids: Tensor | None = None,  # [B, S]
    group: torch.distributed.ProcessGroup | None = None,
) -> TokenWeights:
    """Compute a weight for every token from its score.

    Args:
        scores: [B, S], any float dtype, of the token at each position; higher means more weight.
        supervised: [B, S] bool; all other tokens get weight 0.
        mode: "softmax": the soft form above. "topk": the `top_fraction` of the scope with the highest scores get equal
            weights, the rest 0 (Rho-1's own rule); among equal scores the first ones win.
        temperature: T > 0 of the soft form; small values give sharp weights.
        eps: smallest weight of the soft form, 0 <= eps <= 1.
        w_max: largest weight of the soft form, at least 1.
        top_fraction: fraction q of the tokens that "topk" keeps, 0 < q <= 1.
        scope: the tokens over which the mean is 1. "sequence": each row, or each run of one id where `document_ids` are
            passed, so that weights don't depend on the rest of the batch. "batch": all rows. "global": all rows
            of all ranks, which must call this together with scores of one shape.
        document_ids: [B, S] integers; borders of sequences in packed rows.
        group: the ranks of scope "global"; None means all.

    Returns:
        Weights [B, S] fp32, detached, and their statistics. In each scope with a supervised token the mean over them
        is 1. A score that is not finite gets the neutral weight 1 and is counted as such, except that of the first
        token of a row or document, which nothing predicts; equal scores get weight 1.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.

    Example:
        >>> scores = torch.tensor([[0.0, 1.0, 2.0, 9.0]])
        >>> weights, statistics = normalize_weights(scores, torch.tensor([[False, True, True, True]]))
        >>> [round(w, 3) for w in weights[0].tolist()]
        [0.0, 0.11, 0.164, 2.726]
        >>> round(statistics.mean.item(), 5)
        1.0

    Source: the rule of mode "topk" is arXiv:2404.07965, section 2.2.
    """
    _check_tensors(scores, supervised, document_ids)
    check_normalization(
        mode=mode, temperature=temperature, eps=eps, w_max=w_max, top_fraction=top_fraction, scope=scope, group=group
    )
    s, counted = scores.detach().double(), supervised
    if scope == "global":
        rank, s, counted = _gather(s, counted, group)
    finite = counted & s.isfinite()
    if scope == "sequence":
        groups = sequence_groups(s.shape, document_ids, s.device)
    else:
        groups = torch.zeros(s.numel(), dtype=torch.int64, device=s.device)
    order = _Order(torch.where(finite, s, 0.0).flatten(), finite.flatten(), groups)
    w = order.topk(top_fraction) if mode == "topk" else order.soft(temperature, eps, w_max)
    weights = torch.where(counted, torch.where(finite, w.view(s.shape), 1.0), 0.0).float()
    if scope == "global":
        weights, finite = weights.chunk(rank[1])[rank[0]], finite.chunk(rank[1])[rank[0]]
    clipped = finite & ((weights <= eps) | (weights >= w_max)) if mode == "softmax" else torch.zeros_like(finite)
    predicted = torch.ones_like(supervised)
    predicted[:, :1] = False
    if document_ids is not None:
        predicted[:, 1:] = document_ids[:, 1:] == document_ids[:, :-1]
    return TokenWeights(weights, WeightStatistics.of(weights, supervised, clipped, predicted & ~finite))


class _Order:
    """The tokens [N] of all scopes, sorted by scope and by descending score; excluded ones come last."""

    def __init__(self, scores: Tensor, counts: Tensor, groups: Tensor) -> None:
        N = len(scores)
        self.size = N
        # Scope N collects the excluded tokens; there are at most N others.
        groups = torch.where(counts, groups, N)
        by_score = torch.argsort(scores, descending=True, stable=True)
        self.order = by_score[torch.argsort(groups[by_score], stable=True)]
        self.group = groups[self.order]
        self.score = scores[self.order]
        self.n = self.total(torch.ones_like(self.score))  # [N + 1] tokens of each scope
        self.start = self.n.cumsum(0) - self.n
        self.rank = torch.arange(N, device=scores.device) - self.start[self.group]

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over each scope, [N + 1]."""
        return values.new_zeros(self.size + 1).index_add_(0, self.group, values)

    def unsort(self, values: Tensor) -> Tensor:
        """Return sorted values in the original order of the tokens."""
        return torch.empty_like(values).index_copy_(0, self.order, values)

    def topk(self, fraction: float) -> Tensor:
        """Return n / k for the k highest scores of a scope, k = fraction of n, rounded up."""
        # In floating point 0.3 * 10 is a little more than 3, and must not be rounded up to 4.
        k = (fraction * self.n * (1 - 1e-12)).ceil()
        w = torch.where(self.rank < k[self.group], (self.n / k.clamp(min=1))[self.group], 0.0)
        return self.unsort(w)

    def soft(self, temperature: float, eps: float, w_max: float) -> Tensor:
        """Return clip(c u, eps, w_max) with mean 1."""
        exponent = self.standardised() / temperature
        reference = exponent.new_full((self.size + 1,), -math.inf).scatter_reduce_(0, self.group, exponent, "amax")
        if self.size and w_max > 1:
            # No more than k tokens fit at w_max, so that the token of rank k shares what they leave. Small temperatures
            # put it so far below the highest that its u would be clamped, and equal to that of all tokens after it.
            k = torch.minimum((self.n * (1 - eps) / (w_max - eps)).floor(), (self.n - 1).clamp(min=0))
            first_below = exponent[(self.start + k).clamp(max=self.size - 1).long()]
            reference = torch.minimum(reference, first_below + HIGHEST_DISTANCE)
        u = (exponent - reference[self.group]).clamp(min=LOWEST_EXPONENT, max=0.0).exp()
        c = self.solve(u, eps, w_max)
        return self.unsort((c[self.group] * u).clamp(eps, w_max))

    def standardised(self) -> Tensor:
        """Return (s - mean) / std within the scope; 0 where all scores are equal."""
        n = self.n.clamp(min=1)
        mean = self.total(self.score) / n
        # Centered twice, because the first mean of scores around 1e6 is off by their last bit.
        distance = self.score - mean[self.group]
        distance = distance - (self.total(distance) / n)[self.group]
        largest = self.n.new_zeros(self.size + 1).scatter_reduce_(0, self.group, distance.abs(), "amax")
        # Distinct float32 scores differ by 6e-8 of their size; smaller distances are the error of the mean.
        equal = largest <= 1e-9 * mean.abs()
        scaled = distance / torch.where(equal, 1.0, largest)[self.group]
        std = (self.total(scaled.square()) / n).sqrt()
        return torch.where(equal[self.group], 0.0, scaled / torch.where(std == 0, 1.0, std)[self.group])

    def solve(self, u: Tensor, eps: float, w_max: float) -> Tensor:
        """Return the c [N + 1] of every scope for which the mean of clip(c u, eps, w_max) is 1."""
        N = self.size
        if N == 0:
            return self.n
        # suffix[i]: sum of u from sorted index i to the end of the scope, the smallest added first. One running sum
        # over all scopes would lose small values beside large ones, so each scope is summed separately, by a doubling
        # scan.
        suffix = _suffix_sums(u, self.group)
        # Breakpoints of a scope as c increases: a token leaves eps, a token reaches w_max. Both by descending u.
        breakpoint_c = torch.cat([eps / u, w_max / u])
        group = torch.cat([self.group, self.group])
        order = torch.argsort(breakpoint_c, stable=True)
        order = order[torch.argsort(group[order], stable=True)]
        breakpoint_c, group = breakpoint_c[order], group[order]
        reaches = (order >= N).double()
        first = 2 * self.start  # index of a scope's first breakpoint
        before = torch.cat([reaches.new_zeros(1), reaches.cumsum(0)])
        at_most = before[1:] - before[first.long()][group]  # tokens at w_max
        seen = torch.arange(1, 2 * N + 1, device=u.device) - first[group]
        at_least = self.n[group] - (seen - at_most)  # tokens at eps
        value = self._sum(breakpoint_c, group, suffix, at_most, at_least, eps, w_max)
        # The last breakpoint whose sum is at most n opens the interval that contains the solution.
        passed = breakpoint_c.new_zeros(N + 1).index_add_(0, group, (value <= self.n[group]).double())
        last = (first + passed - 1).clamp(min=0, max=2 * N - 1).long()
        none = passed == 0
        hi = torch.where(none, 0.0, at_most[last])
        lo = torch.where(none, self.n, at_least[last])
        middle = self._middle(torch.arange(N + 1, device=u.device), suffix, hi, lo)
        solved = (self.n - w_max * hi - eps * lo) / torch.where(middle == 0, 1.0, middle)
        # Where no token is between the bounds, the sum is n at the breakpoint itself. Where those between them are
        # negligible, their share is lost in the last bit of n: the solution stays in the interval.
        opens = torch.where(none, 0.0, breakpoint_c[last])
        follows = (last + 1).clamp(max=2 * N - 1)
        closes = torch.where(none, breakpoint_c[first.long().clamp(max=2 * N - 1)], breakpoint_c[follows])
        closes = torch.where(none | (passed < 2 * self.n), closes, math.inf)
        return torch.where(middle == 0, opens, torch.maximum(opens, torch.minimum(solved, closes)))

    def _middle(self, group: Tensor, suffix: Tensor, hi: Tensor, lo: Tensor) -> Tensor:
        """Return the sum of u over the tokens of a scope that are at neither bound."""
        end = torch.cat([suffix, suffix.new_zeros(1)])

        def sum_from(rank: Tensor) -> Tensor:
            inside = rank < self.n[group]
            return torch.where(inside, end[torch.where(inside, self.start[group] + rank, self.size).long()], 0.0)

        middle = sum_from(hi) - sum_from(self.n[group] - lo)
        return torch.where(hi + lo >= self.n[group], 0.0, middle)

    def _sum(
        self, c: Tensor, group: Tensor, suffix: Tensor, hi: Tensor, lo: Tensor, eps: float, w_max: float
    ) -> Tensor:
        return w_max * hi + eps * lo + c * self._middle(group, suffix, hi, lo)


def _suffix_sums(values: Tensor, group: Tensor) -> Tensor:
    """Return sums from each index to the end of its group, of values sorted by group, in log2(N) doubling steps."""
    sums, N, step = values.clone(), len(values), 1
    while step < N:
        same = group[step:] == group[:-step]
        sums = torch.cat([sums[:-step] + torch.where(same, sums[step:], 0.0), sums[-step:]])
        step *= 2
    return sums


def sequence_groups(shape: torch.Size, document_ids: Tensor | None, device: torch.device) -> Tensor:
    """Return the sequence [B * S] of every token, a row or a run of one document, as a number below B * S."""
    B, S = shape
    runs = torch.zeros(B, S, dtype=torch.int64, device=device)
    if document_ids is not None and S > 1:
        runs[:, 1:] = (document_ids[:, 1:] != document_ids[:, :-1]).long().cumsum(1)
    return (torch.arange(B, device=device)[:, None] * S + runs).flatten()


def _gather(
    scores: Tensor, supervised: Tensor, group: torch.distributed.ProcessGroup | None
) -> tuple[tuple[int, int], Tensor, Tensor]:
    """Return (this rank, number of ranks), and scores and mask of all ranks, concatenated along the rows."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return (0, 1), scores, supervised
    ranks = torch.distributed.get_world_size(group)
    # Both in one message: NaN encodes an unsupervised token, and a supervised NaN is sent as infinity.
    message = torch.where(supervised, scores.nan_to_num(math.inf, math.inf, -math.inf), math.nan).contiguous()
    messages = [torch.empty_like(message) for _ in range(ranks)]
    torch.distributed.all_gather(messages, message, group=group)
    gathered = torch.cat(messages)
    return (torch.distributed.get_rank(group), ranks), gathered, ~gathered.isnan()


def check_normalization(
    *,
    mode: str = "softmax",
    temperature: float = 0.7,
    eps: float = 0.05,
    w_max: float = 3.0,
    top_fraction: float = 0.6,
    scope: str = "sequence",
    group: torch.distributed.ProcessGroup | None = None,
) -> None:
    """Check the options of `normalize_weights`.

    Raises:
        ValueError: one is out of its range.
    """
    if mode not in ("softmax", "topk"):
        raise ValueError(f"mode is {mode!r}; expected 'softmax' or 'topk'.")
    if scope not in ("sequence", "batch", "global"):
        raise ValueError(f"scope is {scope!r}; expected 'sequence', 'batch' or 'global'.")
    if group is not None and scope != "global":
        raise ValueError(f"group is given with scope={scope!r}; expected scope='global'.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a number above 0.")
    if not 0 <= eps <= 1:
        raise ValueError(f"eps is {eps}; expected a smallest weight in [0, 1], or the mean can't be 1.")
    if not 1 <= w_max < math.inf:
        raise ValueError(f"w_max is {w_max}; expected a largest weight of at least 1, or the mean can't be 1.")
    if not 0 < top_fraction <= 1:
        raise ValueError(f"top_fraction is {top_fraction}; expected a fraction in (0, 1].")


def _check_tensors(scores: Tensor, supervised: Tensor, document_ids: Tensor | None) -> None:
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores is {kind}; expected a tensor [B, S] of a floating dtype.")
    if scores.dim() != 2:
        raise ValueError(f"scores is {list(scores.shape)}; expected [B, S].")
    if not isinstance(supervised, Tensor) or supervised.dtype != torch.bool:
        kind = supervised.dtype if isinstance(supervised, Tensor) else type(supervised).__name__
        raise TypeError(f"supervised is {kind}; expected a tensor [B, S] of torch.bool.")
    for name, tensor in (("supervised", supervised), ("document_ids", document_ids)):
        if tensor is not None and tensor.shape != scores.shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; expected {list(scores.shape)}, as scores.")
