"""A vocabulary that is sharded over ranks: a rank is one more part of a row, as a program of split-V is.

Math       of the entries of rank r:  m_r = max z,  s_r = sum exp(z - m_r),  t_r = sum (z - b_r),  n_r = their number
           of the row:  m = max_r m_r,  s = sum_r s_r exp(m_r - m),  t = sum_r (t_r + n_r (b_r - m)),
                        label logit = sum_r (z[label] on the rank that holds the label, 0 elsewhere)
           the gradient of a rank's logits needs m and s of the row, and nothing else of the other ranks

Shapes     partials [7, N] of a rank, in the order of `Partials` -> [7, N, ranks]

Algorithm  Every rank has the same rows (hidden states, labels, weights) and its own entries. It computes the partial
           results of its entries, gathers those of all ranks, and combines them: the same numbers in the same order,
           hence the same bits on every rank. Then a second pass writes the gradient of its own logits. Its product with
           unembed is one rank's term of d_hidden; the sum over ranks runs while the next product does. What follows
           from the rows alone (counts, normalizer, coefficients) is computed on every rank.

Traffic    Sent for a row and rank: 3 numbers, 3 more with label smoothing, 1 more with top1; and D for d_hidden. Sent
           for a call: 3 numbers, by which the ranks notice that their rows differ.

Numerics   In the dtype of the statistics. d_hidden is summed in its own dtype, as a column-parallel layer sums it.

Source     Vocabulary-parallel cross entropy: arXiv:1909.08053. Its partial results: arXiv:1805.02867.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_ce.kernels.results import Partials
from mtp_ce.options import LossInputs, VocabShard


def _group(shard: VocabShard) -> Any:
    # An operator takes no process group, only its name.
    return dist.distributed_c10d._resolve_process_group(shard.group)  # type: ignore[arg-type]


def _gather(x: Tensor, shard: VocabShard) -> Tensor:
    """Return [ranks, ...]: x of every rank."""
    gathered = x.new_empty(shard.ranks * x.numel())  # flat, as gloo wants it
    dist.all_gather_into_tensor(gathered, x.reshape(-1), group=_group(shard))
    return gathered.view(shard.ranks, *x.shape)


def gather_partials(partials: Tensor, shard: VocabShard, *, smooth: bool, with_top1: bool) -> Tensor:
    """Return the partial results of all ranks, [fields, N, ranks], from those of this one, [fields, N].

    Args:
        partials: in the order of `Partials`; fields that are not wanted are neither sent nor set.
        shard: of this rank.
        smooth: entries, base and total are wanted.
        with_top1: argmax is wanted.
    """
    # As runs of neighbouring fields.
    wanted = [slice(0, 6 if smooth else 3), *([slice(6, 7)] if with_top1 else [])]
    gathered = _gather(torch.cat([partials[fields] for fields in wanted]), shard)
    whole = partials.new_empty(*partials.shape, shard.ranks)
    start = 0
    for fields in wanted:
        end = start + fields.stop - fields.start
        whole[fields] = gathered[:, start:end].permute(1, 2, 0)
        start = end
    return whole


def merge(parts: Partials, *, smooth: bool, with_top1: bool) -> Partials:
    """Return the results of rows [N, 1] from those of their parts [N, ranks]; the base is the maximum."""
    maximum = parts.maximum.amax(1, keepdim=True)
    scale = torch.where(parts.maximum == float("-inf"), 0.0, torch.exp(parts.maximum - maximum))
    row_sum = (parts.row_sum * scale).sum(1, keepdim=True)
    entries = total = argmax = None
    if smooth:
        entries = parts.entries.sum(1, keepdim=True)
        total = (parts.total + parts.entries * (parts.base - maximum)).sum(1, keepdim=True)
    if with_top1:
        index = parts.argmax.view(torch.int32 if parts.argmax.itemsize == 4 else torch.int64)
        last = torch.iinfo(index.dtype).max
        argmax = torch.where(parts.maximum == maximum, index, last).amin(1, keepdim=True)
        argmax = torch.where(argmax == last, 0, argmax)  # a row of NaN
    return Partials(maximum, row_sum, parts.label_logit.sum(1, keepdim=True), entries, maximum, total, argmax)


class PendingSums:
    """Sums over ranks that run beside the products of the next chunk."""

    def __init__(self, shard: VocabShard) -> None:
        self.shard = shard
        self.pending: list[tuple[Any, Tensor, Tensor | None, Tensor]] = []

    def add(self, product: Tensor, total: Tensor, index: Tensor | None = None) -> None:
        """Start the sum of a product [rows, D]; it is in `total`, or is copied there, to the rows of `index`."""
        self.finish()
        work = dist.all_reduce(product, group=_group(self.shard), async_op=True)
        self.pending.append((work, product, index, total))

    def finish(self) -> None:
        """Wait for what runs."""
        for work, product, index, total in self.pending:
            work.wait()
            if index is not None:
                total.index_copy_(0, index, product)
        self.pending.clear()


def check_same_rows(inputs: LossInputs, shard: VocabShard) -> Tensor | None:
    """Compare the rows of all ranks, by a checksum.

    Returns:
        On a GPU, [] bool: whether they are the same, since an error would wait for the device. None on a CPU.

    Raises:
        ValueError: they differ, on a CPU.
    """
    tensors = [inputs.labels, inputs.token_weights, inputs.seq_lens, inputs.document_ids]
    numbers = [
        x.detach().reshape(-1).double().view(torch.int64) if x.is_floating_point() else x.reshape(-1).long()
        for x in tensors
        if x is not None
    ]
    values = torch.cat(numbers)
    place = torch.arange(1, len(values) + 1, device=values.device)
    sizes = (place.new_full((), size) for size in (inputs.labels.numel(), shard.vocab_size))
    mine = torch.stack([(values * place).sum(), *sizes])
    same = (_gather(mine, shard) == mine).all()
    if mine.is_cuda:
        return same
    if not bool(same):
        raise ValueError(
            "labels, token_weights, seq_lens, document_ids or V differ between the ranks that share the vocabulary; "
            "expected the same on all of them. Parameters that FSDP shards are whole inside the forward of their "
            "module: call the loss there."
        )
    return None
