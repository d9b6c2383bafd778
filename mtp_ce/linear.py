"""The public loss on hidden states, which never builds all logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from mtp_ce.checks import (
    check_chunking,
    check_flags,
    check_inputs,
    check_linear,
    check_values,
    choose_impl,
    number_of,
    pack_terms,
)
from mtp_ce.loss import MTPLoss, MTPStats, reference_loss
from mtp_ce.ops.chunks import COUNT, KEEP_ALL, LinearCall
from mtp_ce.ops.linear import linear_loss
from mtp_ce.ops.logits import split_heads
from mtp_ce.ops.shards import check_same_call
from mtp_ce.options import CallOptions, LossInputs, LossOptions, fold_normalizer
from mtp_ce.vocabulary import local_layer, whole

if TYPE_CHECKING:
    from typing import Unpack

    from jaxtyping import Float, Int


class LinearOptions(CallOptions, total=False):
    """Keyword arguments of `weighted_mtp_linear_ce`."""

    bias: Tensor | None
    chunk_bytes: int | None
    grad_dtype: torch.dtype
    logits_dtype: torch.dtype | None
    drop_dead_rows: bool | int | Literal["auto"]


@overload
def weighted_mtp_linear_ce(
    hidden: Tensor | Sequence[Tensor],
    unembed: Tensor,
    labels: Tensor,
    token_weights: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[LinearOptions],
) -> MTPLoss: ...


@overload
def weighted_mtp_linear_ce(
    hidden: Tensor | Sequence[Tensor],
    unembed: Tensor,
    labels: Tensor,
    token_weights: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> Tensor: ...


def weighted_mtp_linear_ce(
    hidden: Float[Tensor, "B S H D"] | Sequence[Float[Tensor, "B S D"]],
    unembed: Float[Tensor, "V D"],
    labels: Int[Tensor, "B T"],
    token_weights: Float[Tensor, "B S"] | Float[Tensor, "B S H"] | Float[Tensor, "B T"] | None = None,
    *,
    bias: Float[Tensor, " V"] | None = None,
    chunk_bytes: int | None = None,
    grad_dtype: torch.dtype = torch.float32,
    logits_dtype: torch.dtype | None = None,
    drop_dead_rows: bool | int | Literal["auto"] = "auto",
    shift: int = 1,
    left_halo: int = 0,
    weight_alignment: str = "position",
    head_reduction: str = "live",
    head_weights: Float[Tensor, " H"] | None = None,
    seq_lens: Int[Tensor, " B"] | None = None,
    document_ids: Int[Tensor, "B T"] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Float[Tensor, ""] | None = None,
    loss_scale: float | Float[Tensor, ""] = 1.0,
    softcap: float | Float[Tensor, ""] | None = None,
    z_loss: float | Float[Tensor, ""] = 0.0,
    label_smoothing: float | Float[Tensor, ""] = 0.0,
    validate: bool = False,
    return_stats: bool = False,
    impl: str = "auto",
) -> Tensor | MTPLoss:
    """`weighted_mtp_ce` of hidden @ unembed.T + bias, whose [B, S, H, V] logits are never built.

        logits[b,t,h] = unembed @ hidden[b,t,h] + bias
        loss          = loss_scale / N * sum_{b,t} w[b,t] * mean_{h valid} ce(b,t,h)

    Logits exist for one chunk of rows at a time. A scalar loss computes its gradients in forward, with three products
    a chunk and nothing computed twice; reduction="none" computes the logits again in backward.

    Args:
        hidden: [B, S, H, D], or H tensors [B, S, D], or [B, S, D] for H = 1; float32, bfloat16, float16 (float64 with
            impl "cpu" and "reference"). Head h predicts the token at t + shift + h. Beside a sharded unembed the same
            on every rank, or DTensors Replicate().
        unembed: [V, D], the weight of the output layer, of hidden's dtype (under torch.autocast both are cast). Or a
            DTensor Shard(0), the vocabulary over the ranks of one mesh dimension; its gradient is sharded alike.
        labels: [B, S] integers; with shift=1 the unshifted `input_ids`, as in transformers. [B, T] with T > S where
            the positions are a slice of a longer sequence, as in `weighted_mtp_ce`.
        token_weights: [B, S] or [B, S, H], any float dtype, or a mask of bools or integers; None means ones. With
            weight_alignment="target" [B, T], as labels. Differentiable.
        bias: [V], of hidden's dtype; sharded as unembed is.
        chunk_bytes: the most bytes of one chunk of logits. None: the rows of a chunk follow from D and the number of
            rows, as docs/loss.md explains.
        grad_dtype: dtype in which the gradients of unembed and bias are accumulated over chunks, before the cast to
            the dtype of unembed. One chunk of bf16 has no sum, and its product is rounded once.
        logits_dtype: torch.float32 keeps the logits of bf16 and fp16 inputs in fp32, which makes the gradients of large
            logits more exact, and a chunk three times as large. None: the dtype of hidden.
        drop_dead_rows: leave masked rows (not valid, or of weight 0) out of the products. True counts the others,
            which synchronises with a GPU. A number is an upper bound of the others and does not synchronise; too
            small a number raises a ValueError on a CPU and returns NaN on a GPU. "auto": True on a CPU, False on
            a GPU.
        shift: as in `weighted_mtp_ce`, like all that follow.
        left_halo: number of tokens of labels before position 0.
        weight_alignment: "position" or "target".
        head_reduction: "live", "horizon" or "target".
        head_weights: [H] constants.
        seq_lens: [B] integers, lengths of labels.
        document_ids: [B, S] integers, [B, T] as labels.
        ignore_index: the label of tokens that are not targets.
        reduction: "mean", "sum" or "none".
        normalizer: a number or a 0-d tensor that replaces N.
        loss_scale: factor on the loss; a number or a 0-d tensor, like the three below.
        softcap: c > 0: logits become c * tanh(logits / c).
        z_loss: factor >= 0 of logsumexp**2.
        label_smoothing: e in [0, 1).
        validate: also check values; synchronises with a GPU.
        return_stats: also return `MTPStats`.
        impl: "auto", "triton", "cpu", or "reference" (builds all logits).

    Returns:
        The loss, [] or [B, S] for "none", float32 (float64 for float64 hidden); or `MTPLoss(loss, stats)`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or value, before anything is computed.
        IndexError: on a CPU, or with `validate`, a valid label outside [0, V). On a GPU the loss of its row is NaN.

    Example:
        >>> import torch
        >>> from mtp_ce import weighted_mtp_linear_ce
        >>> hidden = torch.zeros(2, 8, 4, 16, requires_grad=True)  # [B, S, H, D]
        >>> unembed = torch.zeros(100, 16, requires_grad=True)  # [V, D]
        >>> loss = weighted_mtp_linear_ce(hidden, unembed, torch.arange(16).view(2, 8), torch.ones(2, 8))
        >>> round(loss.item(), 4)  # ln 100
        4.6052

    Source:
        Gradients in the forward of a chunked linear cross entropy: arXiv:2410.10989. Never building logits:
        arXiv:2411.09009.
    """
    options = LossOptions(
        shift=shift, left_halo=left_halo, weight_alignment=weight_alignment, head_reduction=head_reduction,
        ignore_index=ignore_index, reduction=reduction, loss_scale=number_of(loss_scale),
        softcap=number_of(softcap), z_loss=number_of(z_loss), label_smoothing=number_of(label_smoothing),
    )  # fmt: skip
    terms = pack_terms(hidden, loss_scale, softcap, z_loss, label_smoothing)
    inputs = LossInputs(labels, token_weights, head_weights, seq_lens, document_ids, terms, normalizer)
    check_flags(validate=validate, return_stats=return_stats)
    chunking = _Chunking(chunk_bytes, grad_dtype, logits_dtype, drop_dead_rows)
    loss, stats = _evaluate((hidden, unembed, bias), inputs, options, chunking, validate, return_stats, impl)
    return MTPLoss(loss, stats) if return_stats else loss


@torch.no_grad()
def token_ce(
    hidden: Float[Tensor, "B S H D"] | Sequence[Float[Tensor, "B S D"]],
    unembed: Float[Tensor, "V D"],
    labels: Int[Tensor, "B T"],
    *,
    shift: int = 1,
    bias: Float[Tensor, " V"] | None = None,
    softcap: float | Float[Tensor, ""] | None = None,
    seq_lens: Int[Tensor, " B"] | None = None,
    document_ids: Int[Tensor, "B T"] | None = None,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    drop_dead_rows: bool | int | Literal["auto"] = "auto",
    validate: bool = False,
    impl: str = "auto",
) -> Float[Tensor, "B S H"] | Float[Tensor, "B S"]:
    """Return the cross entropy of every row, without a gradient and without building all logits.

        out[b,t,h] = logsumexp_v logits[b,t,h,v] - logits[b,t,h,labels[b,t+shift+h]]            nats

    Args:
        hidden: [B, S, H, D], or H tensors [B, S, D], or [B, S, D], as in `weighted_mtp_linear_ce`.
        unembed: [V, D], or a DTensor Shard(0).
        labels: [B, S] integers, or [B, S + halo] where the positions are a slice of a longer sequence.
        shift: 1: labels are `input_ids`; 0: labels are already shifted.
        bias: [V].
        softcap: c > 0: logits become c * tanh(logits / c).
        seq_lens: [B] integers, lengths of labels.
        document_ids: integers, as long as labels.
        ignore_index: the label of tokens that are not targets.
        chunk_bytes: as in `weighted_mtp_linear_ce`.
        logits_dtype: as in `weighted_mtp_linear_ce`.
        drop_dead_rows: as in `weighted_mtp_linear_ce`.
        validate: also check values.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        [B, S, H], or [B, S] for hidden [B, S, D], of the positions that predict, however long labels are; float32
        (float64 for float64 hidden); 0 where a row has no target.

    Raises:
        TypeError, ValueError, IndexError: as in `weighted_mtp_linear_ce`.

    Example:
        >>> import torch
        >>> from mtp_ce import token_ce
        >>> ce = token_ce(torch.zeros(1, 3, 16), torch.zeros(100, 16), torch.tensor([[5, 6, 7]]))
        >>> [round(x, 4) for x in ce[0].tolist()]  # ln 100, and no target after the last token
        [4.6052, 4.6052, 0.0]
    """
    options = LossOptions(shift=shift, ignore_index=ignore_index, reduction="sum", softcap=number_of(softcap))
    terms = pack_terms(hidden, 1.0, softcap, 0.0, 0.0)
    inputs = LossInputs(labels, seq_lens=seq_lens, document_ids=document_ids, terms=terms)
    check_flags(validate=validate)
    chunking = _Chunking(chunk_bytes, torch.float32, logits_dtype, drop_dead_rows)
    _, stats = _evaluate((hidden, unembed, bias), inputs, options, chunking, validate, False, impl)
    single = isinstance(hidden, Tensor) and hidden.dim() == 3
    return stats.ce[:, :, 0] if single else stats.ce


class _Chunking(NamedTuple):
    """How the rows are divided into chunks, as the caller passed it."""

    chunk_bytes: int | None
    grad_dtype: torch.dtype
    logits_dtype: torch.dtype | None
    drop_dead_rows: bool | int | Literal["auto"]


def _evaluate(
    layer: tuple[Tensor | Sequence[Tensor], Tensor, Tensor | None],
    inputs: LossInputs,
    options: LossOptions,
    chunking: _Chunking,
    validate: bool,
    with_top1: bool,
    impl: str,
) -> MTPLoss:
    """Check everything and run; without `with_top1` the statistics' top1 is empty.

    Args:
        layer: hidden, unembed and bias, unchecked like all that follow but the options.
        inputs: of one call.
        options: checked.
        chunking: of the linear path.
        validate: also check values.
        with_top1: the statistics have top1.
        impl: the caller's.
    """
    hidden, unembed, bias = _autocast(*layer)
    heads, shape = check_linear(hidden, unembed, bias)
    first = heads[0]
    check_inputs(first, shape, inputs, options, "hidden")
    impl = choose_impl(impl, first, "hidden")
    local_heads, local_unembed, local_bias, shard = local_layer(heads, unembed, bias)
    logits_dtype = check_chunking(*chunking, first.dtype, shard.largest)
    if validate:
        check_values(inputs, options, shape, shard)
    if impl == "reference":
        if shard.ranks > 1:
            check_same_call([torch.Size(shape)], inputs, shard, (options, impl), wait=True)
        heads, unembed, bias = [whole(x) for x in heads], whole(unembed), whole(bias)
        unembed, bias = unembed.to(logits_dtype), None if bias is None else bias.to(logits_dtype)
        logits = [F.linear(head.to(logits_dtype), unembed, bias) for head in split_heads(heads)]
        return reference_loss(logits, inputs, options)

    heads, unembed, bias = local_heads, local_unembed, local_bias
    inputs, options = fold_normalizer(inputs, options)
    with_grad, token_weights = torch.is_grad_enabled(), inputs.token_weights
    call = LinearCall(
        with_top1=with_top1,
        with_d_weights=with_grad and token_weights is not None and token_weights.requires_grad,
        with_d_hidden=[with_grad and x.requires_grad for x in heads],
        with_d_unembed=with_grad and unembed.requires_grad,
        with_d_bias=with_grad and bias is not None and bias.requires_grad,
        chunk_bytes=None if chunking.chunk_bytes is None else int(chunking.chunk_bytes),
        drop=_drop(chunking.drop_dead_rows, first.device),
        grad_dtype=chunking.grad_dtype,
        logits_dtype=logits_dtype,
        impl=impl,
    )
    if first.dim() == 3 and len(heads) == 1:
        heads = [heads[0][:, :, None]]
    loss, ce, lse, live, top1 = linear_loss(heads, unembed, bias, inputs, options, call, shard)
    return MTPLoss(loss, MTPStats(ce, live, lse, top1))


def _autocast(
    hidden: Tensor | Sequence[Tensor], unembed: Tensor, bias: Tensor | None
) -> tuple[Tensor | Sequence[Tensor], Tensor, Tensor | None]:
    """Cast as torch.nn.Linear does under torch.autocast."""
    kind = unembed.device.type if isinstance(unembed, Tensor) else ""
    # torch.compile of torch 2.11 cannot trace is_autocast_available.
    if not kind or not (torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)):
        return hidden, unembed, bias
    if not torch.is_autocast_enabled(kind):
        return hidden, unembed, bias
    dtype = torch.get_autocast_dtype(kind)

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x

    if not isinstance(hidden, Tensor) and isinstance(hidden, Sequence):
        hidden = [cast(x) for x in hidden]
    else:
        hidden = cast(hidden)
    return hidden, cast(unembed), None if bias is None else cast(bias)


def _drop(drop_dead_rows: bool | int | Literal["auto"], device: torch.device) -> int:
    if drop_dead_rows == "auto":
        drop_dead_rows = device.type == "cpu"
    if isinstance(drop_dead_rows, bool):
        return COUNT if drop_dead_rows else KEEP_ALL
    return int(drop_dead_rows)
