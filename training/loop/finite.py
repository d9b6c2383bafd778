"""Whether all numbers of some tensors are finite: one pass over each tensor, one synchronisation for all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mtp_ce.training.errors import StateRefusedError
from mtp_ce.training.loop.ranks import ALONE, Ranks


@torch.no_grad()
def first_not_finite(tensors: Mapping[str, Tensor]) -> tuple[str, float] | None:
    """Return name and value of the first tensor with a NaN or infinity, None if there is none.

    Of a sharded tensor only this rank's shard is read.
    """
    here = {name: x.to_local() if isinstance(x, DTensor) else x for name, x in tensors.items()}
    here = {name: x for name, x in here.items() if x.is_floating_point() and x.numel()}
    if not here:
        return None
    # NaN is both the smallest and the largest value. A sum or a norm could overflow where every value is finite.
    device = next(iter(here.values())).device
    extremes = torch.stack([torch.stack(torch.aminmax(x)).float().to(device) for x in here.values()]).tolist()
    for name, values in zip(here, extremes, strict=True):
        for value in values:
            if not math.isfinite(value):
                return name, value
    return None


def refuse_not_finite(step: int, tensors: Mapping[str, Tensor], ranks: Ranks = ALONE) -> None:
    """Refuse to keep tensors with a NaN or infinity on any rank; all ranks call this together.

    Args:
        step: number of steps done.
        tensors: by the name that the refusal shows.
        ranks: the ranks that agree.

    Raises:
        StateRefusedError: on all ranks.
    """
    for found in ranks.collect(first_not_finite(tensors)):
        if found:
            raise StateRefusedError(step, *found)
