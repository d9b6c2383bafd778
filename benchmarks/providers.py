"""Who computes the loss: mtp_ce, and what people use in its place.

Every provider is a function of (logits [B,S,H,V], labels [B,S], token_weights [B,S]) -> loss [], the weighted loss of
the mean over live heads, in the best form that its library allows. bf16 logits are raised to fp32 by every provider in
torch, as transformers does: torch's cross entropy of bf16 returns bf16, wrong in the third digit of every row.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import IGNORED
from mtp_ce import weighted_mtp_ce

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def mtp_ce(logits: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    """This project."""
    return weighted_mtp_ce(logits, labels, token_weights)


def mtp_ce_inplace(logits: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    """This project; the gradient overwrites the logits."""
    return weighted_mtp_ce(logits, labels, token_weights, inplace_backward=True)


def weighted_mean(total: Tensor, live_heads: Tensor, token_weights: Tensor) -> Tensor:
    """The loss [] from the sum of ce over live heads [B, S] and their number [B, S]."""
    return (token_weights * total / live_heads.clamp(min=1)).sum() / (live_heads > 0).sum()


def head_loop(logits: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    """What people write: for every head, its rows sliced from the logits, against the labels moved along.

    No copy that could be left out: a slice stays a view, `float` copies bf16 only, and the losses are padded rather
    than written into a buffer (torch.compile makes three times as much of it). The slices cost in backward: autograd
    adds up one gradient of the size of all logits for each head.
    """
    S, H = logits.shape[1:3]
    total = live_heads = torch.zeros_like(token_weights)
    for h in range(H):
        k = h + 1
        target = labels[:, k:]
        rows = logits[:, : S - k, h].float()
        ce = F.cross_entropy(rows.flatten(0, 1), target.flatten(), reduction="none", ignore_index=IGNORED)
        total = total + F.pad(ce.view(target.shape), (0, k))
        live_heads = live_heads + F.pad((target != IGNORED).float(), (0, k))
    return weighted_mean(total, live_heads, token_weights)


def head_targets(labels: Tensor, H: int) -> Tensor:
    """[B, S, H]: the label of every row, IGNORED past the end."""
    return torch.stack([F.pad(labels[:, k:], (0, k), value=IGNORED) for k in range(1, H + 1)], dim=2)


def all_rows(logits: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    """The best that eager torch can do: no loop and no slice, one cross entropy of all rows with padded labels."""
    target = head_targets(labels, logits.shape[2])
    rows = logits.flatten(0, 2).float()
    ce = F.cross_entropy(rows, target.flatten(), reduction="none", ignore_index=IGNORED).view(target.shape)
    return weighted_mean(ce.sum(-1), (target != IGNORED).sum(-1), token_weights)


@cache
def compiled(loss: Loss) -> Loss:
    """torch.compile of a loss; static shapes, which suit it best."""
    return torch.compile(loss, dynamic=False)


def compiled_head_loop(logits: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    """torch.compile of the head loop."""
    return compiled(head_loop)(logits, labels, token_weights)


def compiled_all_rows(logits: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    """torch.compile of the form without a loop."""
    return compiled(all_rows)(logits, labels, token_weights)


def _liger_rows(rows: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy  # type: ignore[import-untyped]

    return liger_cross_entropy(rows, target.flatten(), ignore_index=IGNORED, reduction="none").float()


def liger(logits: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    """Liger's cross entropy per head, on whole heads with padded labels, so that nothing is sliced."""
    total = live_heads = torch.zeros_like(token_weights)
    for h, head in enumerate(logits.unbind(2)):
        target = F.pad(labels[:, h + 1 :], (0, h + 1), value=IGNORED)
        total = total + _liger_rows(head.flatten(0, 1), target).view(target.shape)
        live_heads = live_heads + (target != IGNORED)
    return weighted_mean(total, live_heads, token_weights)


def liger_all_rows(logits: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    """Liger's cross entropy of all rows in one call. It writes the gradient over the logits in its forward."""
    target = head_targets(labels, logits.shape[2])
    ce = _liger_rows(logits.flatten(0, 2), target).view(target.shape)
    return weighted_mean(ce.sum(-1), (target != IGNORED).sum(-1), token_weights)


def never_missing(device: torch.device) -> str | None:
    """Nothing keeps torch and mtp_ce from running."""
    return None


def liger_missing(device: torch.device) -> str | None:
    """Why Liger cannot run here."""
    if find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    return None if device.type == "cuda" else "liger_kernel's kernels are Triton's, and need a GPU"


class Provider(NamedTuple):
    """A loss with its name in the results."""

    name: str
    loss: Loss
    missing: Callable[[torch.device], str | None] = never_missing
    # Liger returns each row's loss in the dtype of the logits; the others keep fp32 to the end.
    rounds_rows: bool = False

    @property
    def ours(self) -> bool:
        """It is this project, whose failure is a failure; a peer that cannot run is absent."""
        return self.name.startswith("mtp_ce")


PROVIDERS = (
    Provider("mtp_ce", mtp_ce),
    Provider("mtp_ce_inplace", mtp_ce_inplace),
    Provider("eager_loop", head_loop),
    Provider("eager_rows", all_rows),
    Provider("compiled_loop", compiled_head_loop),
    Provider("compiled_rows", compiled_all_rows),
    Provider("liger_heads", liger, liger_missing, rounds_rows=True),
    Provider("liger_rows", liger_all_rows, liger_missing, rounds_rows=True),
)
BY_NAME = {provider.name: provider for provider in PROVIDERS}
