"""The rule of a row in torch operations, for any device: kernels/rows.py states it.

Everything here is of size [B,S,H] at most.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mtp_ce.options import LossInputs, LossOptions


class RowValues(NamedTuple):
    """The rows of all positions, [B,S,H] each."""

    label: Tensor  # int64, arbitrary where the row is not valid
    valid: Tensor
    head_coefficient: Tensor
    coefficient: Tensor


def row_targets(
    labels: Tensor,  # [B, S]
    seq_lens: Tensor | None,  # [B]
    document_ids: Tensor | None,  # [B, S]
    *,
    H: int,
    shift: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the target index [S,H], clamped to the sequence, and label and valid [B,S,H] of every row."""
    B, S = labels.shape
    device = labels.device
    target = torch.arange(shift, shift + S, device=device)[:, None] + torch.arange(H, device=device)
    target_index = target.clamp(max=S - 1)
    valid = (target < S).expand(B, S, H)
    if seq_lens is not None:
        valid = valid & (target < seq_lens[:, None, None])
    label = labels[:, target_index].long()
    valid = valid & (label != ignore_index)
    if document_ids is not None:
        valid = valid & (document_ids[:, target_index] == document_ids[:, :, None])
    return target_index, label, valid


def row_coefficients(
    target_index: Tensor,  # [S, H]
    valid: Tensor,  # [B, S, H]
    inputs: LossInputs,
    options: LossOptions,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return head and row coefficient [B,S,H] of every row."""
    H, head_weights, token_weights = valid.shape[-1], inputs.head_weights, inputs.token_weights
    a = torch.ones(H, dtype=dtype, device=valid.device) if head_weights is None else head_weights.to(dtype)
    head_coefficient = torch.where(valid, a, 0.0)
    if options.head_reduction == "horizon":
        head_coefficient = head_coefficient / H
    else:
        if options.head_reduction == "target":
            total = sum_by_token(head_coefficient, options.shift)[:, target_index]
        else:
            total = head_coefficient.sum(-1, keepdim=True)
        head_coefficient = head_coefficient / torch.where(total == 0, 1.0, total)
    if token_weights is None:
        return head_coefficient, head_coefficient
    if token_weights.dim() == 3:
        w = token_weights
    elif options.weight_alignment == "target":
        w = token_weights[:, target_index]
    else:
        w = token_weights[:, :, None]
    # A NaN or Inf weight on a row whose head coefficient is 0 must not come back as NaN * 0.
    return head_coefficient, torch.where(head_coefficient != 0, w.to(dtype) * head_coefficient, 0.0)


def sum_by_token(values: Tensor, shift: int) -> Tensor:
    """Return [B,S]: the sum of values [B,S,H] over the heads that predict a token."""
    B, S, H = values.shape
    total = values.new_zeros(B, S)
    for h in range(min(H, S - shift)):
        total[:, shift + h :] += values[:, : S - shift - h, h]
    return total


def count_terms(valid: Tensor, options: LossOptions) -> Tensor:
    """Return N of the mean, []: the positions with a valid head, or with "target" the tokens that a head predicts."""
    if options.head_reduction == "target":
        return sum_by_token(valid.int(), options.shift).count_nonzero()
    return valid.any(-1).sum()


def row_values(inputs: LossInputs, options: LossOptions, H: int, dtype: torch.dtype) -> RowValues:
    """Return everything that is known of the rows before any logit."""
    target_index, label, valid = row_targets(
        inputs.labels, inputs.seq_lens, inputs.document_ids,
        H=H, shift=options.shift, ignore_index=options.ignore_index,
    )  # fmt: skip
    return RowValues(label, valid, *row_coefficients(target_index, valid, inputs, options, dtype))


def check_labels(inputs: LossInputs, options: LossOptions, H: int, V: int) -> None:
    """Raise an IndexError naming the first valid label outside [0, V); reads values, so it synchronises on a GPU."""
    labels, ignore_index = inputs.labels, options.ignore_index
    outside = ((labels < 0) | (labels >= V)) & (labels != ignore_index)
    if not bool(outside.any()):  # valid or not: a quick check, which costs a third of the rows' own
        return
    target_index, label, valid = row_targets(
        labels, inputs.seq_lens, inputs.document_ids, H=H, shift=options.shift, ignore_index=ignore_index
    )
    broken = valid & ((label < 0) | (label >= V))
    if not bool(broken.any()):
        return
    b, t, h = (int(i) for i in broken.nonzero()[0])
    i = int(target_index[t, h])
    raise IndexError(
        f"labels[{b}, {i}] is {int(labels[b, i])}; expected ignore_index ({ignore_index}) or a class in [0, V) = "
        f"[0, {V}). Mask it with ignore_index, or give logits as wide as the tokenizer's vocabulary."
    )
