"""The loss of a wrapper's heads, from their hidden states: on the linear path or over logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_ce.checks import check_head_weights, saved_tensors_are_hooked
from mtp_ce.heads.protocol import FusedLoss, Heads, HeadsLoss
from mtp_ce.linear import weighted_mtp_linear_ce
from mtp_ce.loss import MTPLoss, weighted_mtp_ce
from mtp_ce.options import LossInputs, LossOptions
from mtp_ce.unembedding import Unembedding
from mtp_ce.vocabulary import linear


class LossCall(NamedTuple):
    """How one call computes the loss, and whether it returns statistics."""

    linear: bool  # without building the logits
    with_stats: bool
    drop_dead_rows: Any = None  # as in `weighted_mtp_linear_ce`; None means its default


def fused_loss(output: Unembedding, call: LossCall) -> FusedLoss:
    """Return the loss as a function of hidden states, inputs and options.

    Args:
        output: the model's output layer.
        call: how it is computed.

    Raises:
        ValueError: drop_dead_rows with logits that are built, where nothing reads it.
    """
    if not call.linear and call.drop_dead_rows is not None:
        raise ValueError(
            f"drop_dead_rows is {call.drop_dead_rows} with loss='logits', which builds masked rows of logits and does "
            "not read them; expected none, or loss='linear'."
        )
    return partial(_linear if call.linear else _logits, output, call)


def _linear(
    output: Unembedding, call: LossCall, hidden: list[Tensor], inputs: LossInputs, options: LossOptions
) -> HeadsLoss:
    drop = "auto" if call.drop_dead_rows is None else call.drop_dead_rows
    compute: Any = weighted_mtp_linear_ce  # its overloads want a literal
    result = compute(
        [output.scaled(x) for x in hidden], output.weight, bias=output.bias, drop_dead_rows=drop,
        return_stats=call.with_stats, **inputs.arguments(), **asdict(options),
    )  # fmt: skip
    return HeadsLoss(*result) if isinstance(result, MTPLoss) else HeadsLoss(result, None)


def _logits(
    output: Unembedding, call: LossCall, hidden: list[Tensor], inputs: LossInputs, options: LossOptions
) -> HeadsLoss:
    logits = [linear(output.scaled(x), output.weight, output.bias) for x in hidden]
    # Nothing else reads these logits, so the gradient may overwrite them, unless a surrounding activation checkpoint
    # keeps them.
    inplace = any(x.requires_grad for x in logits) and not saved_tensors_are_hooked()
    compute: Any = weighted_mtp_ce
    result = compute(
        logits, inplace_backward=inplace, return_stats=call.with_stats, **inputs.arguments(), **asdict(options)
    )
    return HeadsLoss(*result) if isinstance(result, MTPLoss) else HeadsLoss(result, None)


@torch.no_grad()
def trunk_targets(hidden: Tensor, output: Unembedding, inputs: LossInputs, options: LossOptions) -> Tensor:
    """Return labels [B, T] with head 0's most likely token in the place of every target.

    A head then learns what the trunk would write after the text up to there: hard distillation of its own output. What
    it would write in places that none of these positions predicts with head 0 is not known: they are no targets.

    Args:
        hidden: [B, S, D], of head 0.
        output: the model's output layer.
        inputs: of the call, with the labels of the text.
        options: of the call; labels are unshifted with shift 1, and shifted by one already with shift 0.
    """
    rows = LossInputs(inputs.labels, seq_lens=inputs.seq_lens, document_ids=inputs.document_ids)
    plain = LossOptions(
        shift=options.shift,
        left_halo=options.left_halo,
        ignore_index=options.ignore_index,
        softcap=options.softcap,
        reduction="sum",
    )
    stats = _linear(output, LossCall(linear=True, with_stats=True), [hidden], rows, plain).stats
    assert stats is not None
    top1 = stats.top1[:, :, 0]
    labels = inputs.labels.clone()
    first = options.left_halo + options.shift
    of_target = labels[:, first : first + hidden.shape[1]]  # what head 0 predicts at positions 0, 1, ...
    predicted = top1[:, : of_target.shape[1]]
    of_target.copy_(torch.where(predicted >= 0, predicted.to(labels.dtype), of_target))
    labels[:, first + hidden.shape[1] :] = options.ignore_index
    return labels


def loss_normalizer(num_items: Tensor | float | None, targets: Tensor | None) -> Tensor | float | None:
    """Return what the sum over positions is divided by, from the `num_items_in_batch` that a trainer passes.

    Raises:
        ValueError: it comes without labels, or is not above 0.
    """
    if num_items is None:
        return None
    if targets is None:
        raise ValueError(
            "num_items_in_batch is given without labels; expected labels. Trainer removes them for "
            "label_smoothing_factor and compute_loss_func, with which no head would be trained: "
            "MTPWrapper(label_smoothing=...) smooths the loss of all heads."
        )
    if isinstance(num_items, Tensor):
        return num_items.float()
    if not num_items > 0:
        raise ValueError(f"num_items_in_batch is {num_items}; expected a number of targets above 0, or None.")
    return num_items


def fixed_head_weights(given: Sequence[float] | Tensor | None, heads: Heads, options: LossOptions) -> Tensor | None:
    """Return the head weights [H] of a wrapper, fp32.

    Raises:
        TypeError, ValueError: they are no constants of H heads, or `head_reduction` takes none.
    """
    if given is None:
        return None
    weights = given if isinstance(given, Tensor) else torch.tensor(list(given), dtype=torch.float32)
    check_head_weights(weights, options)
    if weights.shape != (heads.horizon,):
        raise ValueError(f"head_weights is {list(weights.shape)}; expected [H] = [{heads.horizon}] from horizon.")
    return weights
