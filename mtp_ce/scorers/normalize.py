"""From scores to weights: mean exactly 1 and every weight within its bounds, both at once.

    z = (s - mean) / std                   over the supervised tokens of the scope
    u = exp((z - max z) / temperature)
    w = clip(c u, eps, w_max)              with the c for which mean(w) = 1

Clipping and then rescaling breaks the upper bound, rescaling and then clipping breaks the mean. Here c is found
exactly: the mean of clip(c u) is piecewise linear and rising in c, with a corner where a token reaches either bound.
All corners of a scope are sorted, the value at each comes from counts and from sums of u over a suffix of the sorted
tokens (summed from the smallest up, so that nothing cancels), and the interval that holds the mean 1 is solved for c.

Everything is of the size of the scores, on their device, in float64 inside, and never waits for the device.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mtp_ce.scorers.weights import TokenWeights, WeightStatistics

# exp(-690) = 1e-300: beyond it u would be 0 and no c could lift it. Such a score counts as this low.
LOWEST_EXPONENT = -690.0


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
    """Turn a score for every token into a weight for every token.

    Args:
        scores: [B, S], any float dtype; higher means more weight. Of the token that stands there.
        supervised: [B, S] bool, the tokens that count; all others get weight 0.
        mode: "softmax": the soft form above. "topk": the `top_fraction` of the scope with the highest scores share
            the whole weight evenly, the rest get 0 (Rho-1's own rule); among equal scores the first ones.
        temperature: T > 0 of the soft form; small is sharp.
        eps: smallest weight of the soft form, 0 <= eps <= 1.
        w_max: largest weight of the soft form, at least 1.
        top_fraction: share of the tokens that "topk" keeps, 0 < q <= 1.
        scope: over which tokens the mean is 1. "sequence": each row, or each run of one id where `document_ids` are
            given, so that weights don't depend on what else is in the batch. "batch": all rows. "global": all rows
            of all ranks, which must call this together with scores of one shape.
        document_ids: [B, S] integers; borders of sequences in packed rows.
        group: the ranks of scope "global"; None means all.

    Returns:
        Weights [B, S] fp32, detached, and their statistics. In each scope with a supervised token the mean over them
        is 1. A score that is not finite gets the neutral weight 1 and is counted; equal scores give ones.

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
    return TokenWeights(weights, WeightStatistics.of(weights, supervised, clipped, supervised & ~finite))


class _Order:
    """The tokens [N] of all scopes, sorted by scope and by falling score; those that don't count come last."""

    def __init__(self, scores: Tensor, counts: Tensor, groups: Tensor) -> None:
        N = len(scores)
        self.size = N
        # One scope more than there can be: for the tokens that don't count.
        groups = torch.where(counts, groups, N)
        by_score = torch.argsort(scores, descending=True, stable=True)
        self.order = by_score[torch.argsort(groups[by_score], stable=True)]
        self.group = groups[self.order]
        self.score = scores[self.order]
        self.n = self.total(torch.ones_like(self.score))  # [N + 1] tokens of each scope
        self.start = self.n.cumsum(0) - self.n
        self.place = torch.arange(N, device=scores.device) - self.start[self.group]

    def total(self, values: Tensor) -> Tensor:
        """Sums [N + 1] of the scopes."""
        return values.new_zeros(self.size + 1).index_add_(0, self.group, values)

    def back(self, values: Tensor) -> Tensor:
        """Sorted values in the order in which the tokens came."""
        return torch.empty_like(values).index_copy_(0, self.order, values)

    def topk(self, fraction: float) -> Tensor:
        """N / k for the k highest of a scope, k = fraction of n, rounded up."""
        # Rounded up, but 0.3 * 10 is a little more than 3.
        k = (fraction * self.n * (1 - 1e-12)).ceil()
        w = torch.where(self.place < k[self.group], (self.n / k.clamp(min=1))[self.group], 0.0)
        return self.back(w)

    def soft(self, temperature: float, eps: float, w_max: float) -> Tensor:
        """clip(c u, eps, w_max) of mean 1."""
        exponent = self.standardised() / temperature
        highest = exponent.new_full((self.size + 1,), -math.inf).scatter_reduce_(0, self.group, exponent, "amax")
        u = (exponent - highest[self.group]).clamp(min=LOWEST_EXPONENT).exp()
        c = self.level(u, eps, w_max)
        return self.back((c[self.group] * u).clamp(eps, w_max))

    def standardised(self) -> Tensor:
        """(s - mean) / std within the scope; 0 where all scores are equal."""
        n = self.n.clamp(min=1)
        mean = self.total(self.score) / n
        # Twice, because the first mean of scores around 1e6 is off by their last bit.
        distance = self.score - mean[self.group]
        distance = distance - (self.total(distance) / n)[self.group]
        largest = self.n.new_zeros(self.size + 1).scatter_reduce_(0, self.group, distance.abs(), "amax")
        # float32 tells scores apart that differ by 6e-8 of themselves; anything closer is the mean's own error.
        equal = largest <= 1e-9 * mean.abs()
        scaled = distance / torch.where(equal, 1.0, largest)[self.group]
        std = (self.total(scaled.square()) / n).sqrt()
        return torch.where(equal[self.group], 0.0, scaled / torch.where(std == 0, 1.0, std)[self.group])

    def level(self, u: Tensor, eps: float, w_max: float) -> Tensor:
        """The c [N + 1] of every scope for which the mean of clip(c u, eps, w_max) is 1."""
        N = self.size
        if N == 0:
            return self.n
        # suffix[i]: sum of u from sorted place i to the end of the scope, the smallest added first. A running sum over
        # all scopes would drown small ones in large ones, so each scope is summed on its own, as a doubling scan.
        suffix = _suffix_sums(u, self.group)
        # Corners of a scope as c rises: a token leaves eps, a token reaches w_max. Both in the order of falling u.
        corner = torch.cat([eps / u, w_max / u])
        group = torch.cat([self.group, self.group])
        by_corner = torch.argsort(corner, stable=True)
        by_corner = by_corner[torch.argsort(group[by_corner], stable=True)]
        corner, group = corner[by_corner], group[by_corner]
        reaches = (by_corner >= N).double()
        first = 2 * self.start  # where a scope's corners begin
        before = torch.cat([reaches.new_zeros(1), reaches.cumsum(0)])
        at_most = before[1:] - before[first.long()][group]  # tokens at w_max
        seen = torch.arange(1, 2 * N + 1, device=u.device) - first[group]
        at_least = self.n[group] - (seen - at_most)  # tokens at eps
        value = self._sum(corner, group, suffix, at_most, at_least, eps, w_max)
        # The last corner whose sum is at most n opens the interval that holds the solution.
        passed = corner.new_zeros(N + 1).index_add_(0, group, (value <= self.n[group]).double())
        last = (first + passed - 1).clamp(min=0, max=2 * N - 1).long()
        none = passed == 0
        hi = torch.where(none, 0.0, at_most[last])
        lo = torch.where(none, self.n, at_least[last])
        middle = self._middle(torch.arange(N + 1, device=u.device), suffix, hi, lo)
        solved = (self.n - w_max * hi - eps * lo) / torch.where(middle == 0, 1.0, middle)
        # Where nobody is between the bounds, the sum is n at the corner itself.
        return torch.where(middle == 0, torch.where(none, 0.0, corner[last]), solved)

    def _middle(self, group: Tensor, suffix: Tensor, hi: Tensor, lo: Tensor) -> Tensor:
        """Sum of u over the tokens of a scope that are at neither bound."""
        end = torch.cat([suffix, suffix.new_zeros(1)])

        def from_place(place: Tensor) -> Tensor:
            inside = place < self.n[group]
            return torch.where(inside, end[torch.where(inside, self.start[group] + place, self.size).long()], 0.0)

        middle = from_place(hi) - from_place(self.n[group] - lo)
        return torch.where(hi + lo >= self.n[group], 0.0, middle)

    def _sum(
        self, c: Tensor, group: Tensor, suffix: Tensor, hi: Tensor, lo: Tensor, eps: float, w_max: float
    ) -> Tensor:
        return w_max * hi + eps * lo + c * self._middle(group, suffix, hi, lo)


def _suffix_sums(values: Tensor, group: Tensor) -> Tensor:
    """Sum from each place to the end of its group, of values sorted by group: log2(N) doubling steps."""
    sums, N, step = values.clone(), len(values), 1
    while step < N:
        same = group[step:] == group[:-step]
        sums = torch.cat([sums[:-step] + torch.where(same, sums[step:], 0.0), sums[-step:]])
        step *= 2
    return sums


def sequence_groups(shape: torch.Size, document_ids: Tensor | None, device: torch.device) -> Tensor:
    """The sequence [B * S] that every token belongs to, a row or a run of one document, as a number below B * S."""
    B, S = shape
    runs = torch.zeros(B, S, dtype=torch.int64, device=device)
    if document_ids is not None and S > 1:
        runs[:, 1:] = (document_ids[:, 1:] != document_ids[:, :-1]).long().cumsum(1)
    return (torch.arange(B, device=device)[:, None] * S + runs).flatten()


def _gather(
    scores: Tensor, supervised: Tensor, group: torch.distributed.ProcessGroup | None
) -> tuple[tuple[int, int], Tensor, Tensor]:
    """(This rank, number of ranks) and the rows of all ranks, one rank below the other."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return (0, 1), scores, supervised
    ranks = torch.distributed.get_world_size(group)
    # One message: NaN stands for a token that is not supervised, and a supervised NaN for the same as infinity.
    message = torch.where(supervised, scores.nan_to_num(math.inf, math.inf, -math.inf), math.nan).contiguous()
    parts = [torch.empty_like(message) for _ in range(ranks)]
    torch.distributed.all_gather(parts, message, group=group)
    whole = torch.cat(parts)
    return (torch.distributed.get_rank(group), ranks), whole, ~whole.isnan()


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
    """ValueError where an option of `normalize_weights` is out of its range."""
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
        raise ValueError(f"top_fraction is {top_fraction}; expected a share in (0, 1].")


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
