"""How many rows of a batch's loss are not masked, counted where the batch still is: on the host.

The linear path leaves masked rows out of its products. How many are left is the size of a tensor, so that a GPU would
have to be waited for; labels and weights alone say it, and a trainer has those on the host before the trunk runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_ce.heads.protocol import Heads
from mtp_ce.hf.arguments import LOSS_ROWS, LossArguments
from mtp_ce.hf.documents import packed_documents
from mtp_ce.ops.rows import row_values
from mtp_ce.options import LossInputs, LossOptions


class RowCount(NamedTuple):
    """Counts rows as a wrapper's loss masks them. Holds no parameter, so that a data loader's workers can have it.

    Attributes:
        heads: class of the heads.
        horizon: H.
        options: of the loss.
        multiple: the count is rounded up to one: fewer sizes of products, and of the memory for them.
    """

    heads: type[Heads]
    horizon: int
    options: LossOptions
    multiple: int

    def __call__(self, arguments: Mapping[str, Any]) -> int | None:
        """Return an upper bound of the rows that the loss computes; None where nothing says it.

        Args:
            arguments: of the wrapper's forward by name. Waits for those that are on a GPU.
        """
        others = dict(arguments)
        call = LossArguments.take(others.pop("labels", None), others)
        labels, weights, documents = call.targets, others.get("token_weights"), others.get("document_ids")
        if labels is None or labels.dim() != 2:
            return None
        alignment = others.get("weight_alignment", "target")
        options = replace(self.options, shift=call.shift, weight_alignment=alignment, **call.options)
        S = positions_of(labels, options.left_halo, others)
        if documents is None:
            documents = packed_documents(labels.shape, S, others.get("position_ids"), others.get("cu_seq_lens_q"))
        if not isinstance(weights, Tensor):  # computed from the heads, in forward
            weights = None
        # Forward refuses other shapes, and reads rows of weight 0, too, where weights require a gradient.
        if documents is not None and documents.shape != labels.shape:
            return None
        if weights is not None:
            length = labels.shape[1] if alignment == "target" else S
            if weights.shape[:2] != (len(labels), length) or weights.requires_grad:
                return None
        inputs = LossInputs(labels, weights, seq_lens=call.tensors.get("seq_lens"), document_ids=documents)
        rows = row_values(inputs, options, S, self.horizon, torch.float32).coefficient != 0
        count = self.heads.count_rows(rows, options.shift)
        return None if count is None else -(-int(count) // self.multiple) * self.multiple


def positions_of(labels: Tensor, left_halo: int, arguments: Mapping[str, Any]) -> int:
    """Return S of a call: the length of its inputs, or else of the labels without `left_halo`."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(x := arguments.get(name), Tensor):
            return x.shape[1]
    return labels.shape[1] - left_halo


def own_labels(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the labels of a batch without halos, as Trainer counts them in `num_items_in_batch`.

    A token in the halo of one slice is a token of another: slices then count what the whole has, the tokens that head 0
    predicts from their positions.
    """
    others = dict(batch)
    call = LossArguments.take(others.pop("labels", None), others)
    if not isinstance(call.targets, Tensor) or call.targets.dim() != 2:
        return batch
    first = call.options.get("left_halo", 0)
    end = first + positions_of(call.targets, first, others) + call.shift  # Trainer skips the first of labels
    own = {"labels": call.targets[:, first:end]}
    return own if call.shift else {**own, "shift_labels": own["labels"]}


class CountingCollator(NamedTuple):
    """A data collator whose batches have their `drop_dead_rows` beside them."""

    collate: Callable[[Any], Any]
    count_rows: RowCount

    def __call__(self, features: Any) -> Any:
        """Collate and count."""
        batch = self.collate(features)
        if isinstance(batch, MutableMapping) and LOSS_ROWS not in batch:
            rows = self.count_rows(batch)
            if rows is not None:
                batch[LOSS_ROWS] = rows
        return batch
