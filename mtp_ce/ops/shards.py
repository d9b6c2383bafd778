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
           for a call: 2 numbers, by which the ranks notice that their rows or options differ.

Numerics   In the dtype of the statistics. d_hidden is summed in its own dtype, as a column-parallel layer sums it.

Source     Vocabulary-parallel cross entropy: arXiv:1909.08053. Its partial results: arXiv:1805.02867.
"""

from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_ce.kernels.results import Partials
from mtp_ce.options import LossInputs, VocabShard

GOLDEN = -7046029254386353131  # 2^64 divided by the golden ratio, as an int64: its multiples are spread evenly


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


def _checksum(tensors: list[Tensor]) -> Tensor:
    """Return one number [] int64 of all values of tensors, in their order."""
    numbers = []
    for x in tensors:
        if x.is_floating_point():
            bits = x.detach().reshape(-1).double().view(torch.int64)
            # The bits that differ between simple numbers, such as 0 and 1, are the highest: a product would lose them.
            numbers.append(bits ^ (bits >> 32))
        else:
            numbers.append(x.reshape(-1).long())
    values = torch.cat(numbers)
    # A factor for each index, without a pattern: with the index itself, the masks 1001 and 0110 have the same sum.
    factor = torch.arange(1, len(values) + 1, device=values.device) * GOLDEN
    return (values * (factor ^ (factor >> 32))).sum()


def check_same_call(
    rows: list[torch.Size], inputs: LossInputs, shard: VocabShard, call: tuple[Any, ...], *, wait: bool = False
) -> Tensor | None:
    """Compare what all ranks compute: the values of the inputs, by a checksum, shapes and options.

    Where these differ, so do the numbers that the ranks exchange. Whatever may fail on the values of one rank alone
    comes after this: the other ranks would wait for that one.

    Args:
        rows: shapes of the logits without the vocabulary, or of the hidden states.
        inputs: of this rank.
        shard: of this rank.
        call: options, and results that are wanted.
        wait: raise on a GPU too, which waits for it.

    Returns:
        On a GPU, [] bool: whether they are the same, since an error would wait for the device. None on a CPU.

    Raises:
        ValueError: they differ, on a CPU.
    """
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    checksum = _checksum(tensors)
    description = repr(([tuple(shape) for shape in rows], [tuple(x.shape) for x in tensors], shard.vocab_size, call))
    mine = torch.stack([checksum, checksum.new_full((), crc32(description.encode()))])
    same = (_gather(mine, shard) == mine).all()
    if mine.is_cuda and not wait:
        return same
    if not bool(same):
        raise ValueError(
            "labels, token_weights, another input, an option or V differ between the ranks that share the vocabulary, "
            "or one of them raised an error of its own; expected the same on all of them. Parameters that FSDP shards "
            "are whole inside the forward of their module: call the loss there."
        )
    return None


def fail_on_all_ranks(shard: VocabShard, device: torch.device) -> None:
    """Make `check_same_call` of the other ranks fail, before this one raises an error of its own."""
    _gather(torch.full((2,), -1, device=device), shard)
