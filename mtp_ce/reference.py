"""The oracle: the contract of weighted multi-token cross entropy in eager torch, slow and obvious.

Everything else in the project is tested against this file in float64. It shares no code with the fast paths, computes
in the dtype of the logits (float32 for half types), and lets autograd derive every gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _ZeroWeighted(torch.autograd.Function):
    """w * row_loss at w = 0: the value is 0 whatever the row's loss is, and d / d w is still row_loss."""

    @staticmethod
    def forward(w: Tensor, row_loss: Tensor) -> Tensor:
        return torch.zeros_like(w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


def reference_weighted_mtp_ce(
    heads: Sequence[Tensor],  # H x [B, S, V]
    labels: Tensor,  # [B, T], T = left_halo + S + halo
    token_weights: Tensor | None = None,  # [B, S], [B, S, H], or [B, T] where they are those of the targets
    *,
    shift: int = 1,
    left_halo: int = 0,
    weight_alignment: str = "position",
    head_reduction: str = "live",
    head_weights: Tensor | None = None,  # [H]
    seq_lens: Tensor | None = None,  # [B]
    document_ids: Tensor | None = None,  # [B, T]
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    loss_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, ce, valid, lse and top1 of the contract; all but the loss [B,S,H] and detached."""
    B, S, _V = heads[0].shape
    H, T = len(heads), labels.shape[1]
    dtype = heads[0].dtype if heads[0].dtype == torch.float64 else torch.float32
    device = heads[0].device
    labels = labels.long()
    ce, lse = (torch.zeros(B, S, H, dtype=dtype, device=device) for _ in range(2))
    top1 = torch.full((B, S, H), -1, dtype=torch.int32, device=device)
    # Of every token of labels as a position; those of the halos are other calls'.
    valid_of_all = torch.zeros(B, T, H, dtype=torch.bool, device=device)
    for h in range(H):
        for p in range(T):
            target = p + shift + h
            if target >= T:
                continue
            counts = labels[:, target] != ignore_index
            if seq_lens is not None:
                counts = counts & (target < seq_lens)
            if document_ids is not None:
                counts = counts & (document_ids[:, target] == document_ids[:, p])
            valid_of_all[:, p, h] = counts
    valid = valid_of_all[:, left_halo : left_halo + S]

    weights_need_gradient = token_weights is not None and token_weights.requires_grad
    losses: list[Tensor] = []  # one [B, S] a head: a_h * w * the row's loss, before the division
    a = torch.ones(H, dtype=dtype, device=device) if head_weights is None else head_weights.to(dtype)
    for h in range(H):
        w = torch.ones(B, S, dtype=dtype, device=device)
        if token_weights is not None:
            weights = token_weights.to(dtype) if token_weights.dim() == 2 else token_weights[:, :, h].to(dtype)
            first = left_halo + shift + h
            if weight_alignment == "target":
                w = torch.cat([weights[:, first : first + S], weights.new_zeros(B, S)], dim=1)[:, :S]
            else:
                w = weights
        row_mask = valid[:, :, h] & (a[h] != 0)
        if not weights_need_gradient:
            row_mask = row_mask & (w != 0)
        b, position = row_mask.nonzero(as_tuple=True)
        z = heads[h][b, position].to(dtype)  # [rows, V]: a masked row never enters the graph
        # Read only for the gradient of its weight: 0 * NaN must reach neither the loss nor the logits.
        zero = w[b, position] == 0
        z = torch.where(zero[:, None], z.detach(), z)
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        y = labels[b, left_halo + position + shift + h]
        logp = torch.log_softmax(z, dim=-1)
        row_ce = -logp.gather(1, y[:, None])[:, 0]
        row_lse = torch.logsumexp(z, dim=-1)
        row_loss = row_ce
        if label_smoothing != 0:
            row_loss = row_ce + label_smoothing * (-logp.mean(dim=-1) - row_ce)
        if z_loss != 0:
            row_loss = row_loss + z_loss * row_lse**2
        ce[b, position, h] = row_ce.detach()
        lse[b, position, h] = row_lse.detach()
        top1[b, position, h] = z.detach().argmax(dim=-1).int()
        weighted = torch.empty_like(row_loss)
        weighted[~zero] = w[b, position][~zero] * row_loss[~zero]
        weighted[zero] = _ZeroWeighted.apply(w[b, position][zero], row_loss[zero])
        weighted = a[h] * weighted
        losses.append(torch.zeros(B, S, dtype=dtype, device=device).index_put((b, position), weighted))

    count = valid.any(-1).sum()
    if head_reduction == "target":
        # By the token that is predicted: token j from position j - shift - h by head h.
        predictions, total = (torch.zeros(B, T + shift + H, dtype=dtype, device=device) for _ in range(2))
        for h in range(H):
            predictions[:, shift + h : shift + h + T] += valid_of_all[:, :, h]
            total[:, shift + h : shift + h + T] += valid_of_all[:, :, h] * a[h]
        first = left_halo + shift
        of_rows = torch.stack([predictions[:, first + h : first + h + S] for h in range(H)], dim=-1)
        count = (predictions > 0).sum() if T == S else (valid / of_rows.clamp(min=1)).sum()
        denominator = torch.stack([total[:, first + h : first + h + S] for h in range(H)], dim=-1)
    elif head_reduction == "horizon":
        denominator = torch.full((B, S, 1), float(H), dtype=dtype, device=device)
    else:
        denominator = (valid * a).sum(-1, keepdim=True)
    weighted = torch.stack(losses, dim=-1)
    average = (weighted / torch.where(denominator == 0, torch.ones_like(denominator), denominator)).sum(-1)

    if reduction == "none":
        loss = loss_scale * average
    elif count == 0:
        loss = 0.0 * average.sum()
    elif reduction == "sum":
        loss = loss_scale * average.sum()
    else:
        loss = loss_scale * average.sum() / (count if normalizer is None else normalizer)
    return loss.to(dtype), ce, valid, lse, top1
