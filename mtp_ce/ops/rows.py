"""The rule of a row in torch operations, for any device: kernels/rows.py states it.

Everything here is of size [B,T,H] at most, T tokens of the labels.
"""

from dataclasses import replace
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


def row_targets(inputs: LossInputs, options: LossOptions, S: int, H: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the target index [S,H], clamped to the labels, and label and valid [B,S,H] of every row."""
    labels, document_ids = inputs.labels, inputs.document_ids
    T, device = labels.shape[1], labels.device
    position = torch.arange(options.left_halo, options.left_halo + S, device=device)[:, None]
    target = position + torch.arange(options.shift, options.shift + H, device=device)
    target_index = target.clamp(max=T - 1)
    valid = (target < T).expand(len(labels), S, H)
    if inputs.seq_lens is not None:
        valid = valid & (target < inputs.seq_lens[:, None, None])
    label = labels[:, target_index].long()
    valid = valid & (label != options.ignore_index)
    if document_ids is not None:
        own = document_ids[:, options.left_halo : options.left_halo + S, None]
        valid = valid & (document_ids[:, target_index] == own)
    return target_index, label, valid


def _sum_over_heads(values: Tensor, valid: Tensor, inputs: LossInputs, options: LossOptions) -> Tensor:
    """Return [B,T]: the sum of values [H] over the heads that predict a token, from wherever they do.

    The positions of the halos count too, whose rows other calls compute.
    """
    T, H = inputs.labels.shape[1], valid.shape[2]
    if valid.shape[1] != T:
        _, _, valid = row_targets(inputs, replace(options, left_halo=0), T, H)
    return sum_by_token(torch.where(valid, values, 0), options.shift, T)


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
            total = _sum_over_heads(a, valid, inputs, options)[:, target_index]
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


def sum_by_token(values: Tensor, first: int, T: int) -> Tensor:
    """Return [B,T]: the sum of values [B,S,H] over the rows that predict a token.

    Args:
        values: of the rows.
        first: index of the token that head 0 predicts from position 0.
        T: number of tokens.
    """
    B, _, H = values.shape
    total = values.new_zeros(B, T)
    for h in range(min(H, T - first)):
        rows = values[:, : T - first - h, h]
        total[:, first + h : first + h + rows.shape[1]] += rows
    return total


def count_terms(valid: Tensor, options: LossOptions, slice_of: LossInputs | None = None) -> Tensor:
    """Return N of the mean, []: the positions with a valid head, or with "target" the tokens that a head predicts.

    Of labels longer than the positions, other slices predict tokens too: with "target" a token then counts by the part
    of its heads that is here, so that the slices' N add up to that of the whole.

    Args:
        valid: [B, S, H].
        options: of the call.
        slice_of: inputs of a call whose labels have a halo.
    """
    if options.head_reduction != "target":
        return valid.any(-1).sum()
    S, H = valid.shape[1:]
    T = S if slice_of is None else slice_of.labels.shape[1]
    if slice_of is None or T == S:
        return sum_by_token(valid.int(), options.shift, T).count_nonzero()
    of_all = _sum_over_heads(valid.new_ones(H, dtype=torch.int32), valid, slice_of, options)
    here = sum_by_token(valid.int(), options.left_halo + options.shift, T)
    return (here.double() / of_all.clamp(min=1)).sum()


def row_values(inputs: LossInputs, options: LossOptions, S: int, H: int, dtype: torch.dtype) -> RowValues:
    """Return everything that is known of the rows before any logit."""
    target_index, label, valid = row_targets(inputs, options, S, H)
    return RowValues(label, valid, *row_coefficients(target_index, valid, inputs, options, dtype))


def check_labels(inputs: LossInputs, options: LossOptions, S: int, H: int, V: int) -> None:
    """Raise an IndexError naming the first valid label outside [0, V); reads values, so it synchronises on a GPU."""
    labels, ignore_index = inputs.labels, options.ignore_index
    outside = ((labels < 0) | (labels >= V)) & (labels != ignore_index)
    if not bool(outside.any()):  # valid or not: a quick check, which costs a third of the rows' own
        return
    target_index, label, valid = row_targets(inputs, options, S, H)
    broken = valid & ((label < 0) | (label >= V))
    if not bool(broken.any()):
        return
    b, t, h = (int(i) for i in broken.nonzero()[0])
    i = int(target_index[t, h])
    raise IndexError(
        f"labels[{b}, {i}] is {int(labels[b, i])}; expected ignore_index ({ignore_index}) or a class in [0, V) = "
        f"[0, {V}). Mask it with ignore_index, or give logits as wide as the tokenizer's vocabulary."
    )
