"""The rule of a row in torch operations, for any device: kernels/rows.py says what it is.

Everything here is of size [B,S,H] at most.
"""

import torch
from torch import Tensor


def row_targets(
    labels: Tensor,  # [B, S]
    seq_lens: Tensor | None,  # [B]
    document_ids: Tensor | None,  # [B, S]
    *,
    H: int,
    shift: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Place [S,H] (the target's index, inside the sequence), label and live [B,S,H] of every row."""
    B, S = labels.shape
    device = labels.device
    target = torch.arange(S, device=device)[:, None] + shift + torch.arange(H, device=device)
    place = target.clamp(max=S - 1)
    live = (target < S).expand(B, S, H)
    if seq_lens is not None:
        live = live & (target < seq_lens[:, None, None])
    label = labels[:, place].long()
    live = live & (label != ignore_index)
    if document_ids is not None:
        live = live & (document_ids[:, place] == document_ids[:, :, None])
    return place, label, live


def row_coefficients(
    place: Tensor,  # [S, H]
    live: Tensor,  # [B, S, H]
    token_weights: Tensor | None,  # [B, S] or [B, S, H]
    head_weights: Tensor | None,  # [H]
    *,
    over_horizon: bool,
    target_weights: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Share and coefficient [B,S,H] of every row, as in kernels/rows.py."""
    H = live.shape[-1]
    a = torch.ones(H, dtype=dtype, device=live.device) if head_weights is None else head_weights.to(dtype)
    share = torch.where(live, a, 0.0)
    if over_horizon:
        share = share / H
    else:
        total = share.sum(-1, keepdim=True)
        share = share / torch.where(total == 0, 1.0, total)
    if token_weights is None:
        return share, share
    if token_weights.dim() == 3:
        w = token_weights
    elif target_weights:
        w = token_weights[:, place]
    else:
        w = token_weights[:, :, None]
    return share, torch.where(share != 0, w.to(dtype) * share, 0.0)


def check_labels(
    labels: Tensor,  # [B, S]
    seq_lens: Tensor | None,  # [B]
    document_ids: Tensor | None,  # [B, S]
    *,
    H: int,
    V: int,
    shift: int,
    ignore_index: int,
) -> None:
    """IndexError naming the first live label outside [0, V); reads values, so it synchronises on a GPU."""
    place, label, live = row_targets(labels, seq_lens, document_ids, H=H, shift=shift, ignore_index=ignore_index)
    broken = live & ((label < 0) | (label >= V))
    if not bool(broken.any()):
        return
    b, t, h = (int(i) for i in broken.nonzero()[0])
    i = int(place[t, h])
    raise IndexError(
        f"labels[{b}, {i}] is {int(labels[b, i])}; expected ignore_index ({ignore_index}) or a class in [0, V) = "
        f"[0, {V}). Mask it with ignore_index, or give logits as wide as the tokenizer's vocabulary."
    )
