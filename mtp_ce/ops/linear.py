"""The linear path as torch operators: what torch.compile, autograd and opcheck see.

`linear_forward` computes a scalar loss and its gradients together: these wait for backward, which takes them and
multiplies them in place by the upstream gradient, or under retain_graph a copy. 1/N is in the rows' coefficients, so
that nothing is left to round under an upstream gradient of 1; but in fp16, whose range is too short, it is left to
backward, too. So hidden states are saved for reduction="none" alone, whose gradients `linear_backward` computes.
Arguments arrive checked (mtp_ce/checks.py).
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from mtp_ce.ops.chunks import (
    COUNT,
    KEEP_ALL,
    LinearCall,
    Rows,
    compute_rows,
    fold_factor,
    from_row_order,
    gradient_dtype,
    in_row_order,
    largest,
    positions,
    run_chunks,
    wanted_rows,
)
from mtp_ce.ops.logits import device_guard, functions, input_gradients, reduce, weights_backward
from mtp_ce.ops.register import Loss, differentiable, once_differentiable, operator
from mtp_ce.ops.rows import check_labels
from mtp_ce.ops.shards import check_same_call
from mtp_ce.options import LossInputs, LossOptions, VocabShard, read_terms


def _allocate_forward(
    hidden: list[Tensor],
    unembed: Tensor,
    bias: Tensor | None,
    inputs: LossInputs,
    options: LossOptions,
    call: LinearCall,
    shard: VocabShard,
) -> tuple[Tensor, ...]:
    B, S, H = positions(hidden)
    V, D = unembed.shape
    dtype = torch.float64 if unembed.dtype == torch.float64 else torch.float32
    last = gradient_dtype(unembed.dtype, call.grad_dtype)

    def new(*shape: int, dtype: torch.dtype = dtype, wanted: bool = True) -> Tensor:
        return unembed.new_empty(shape if wanted else (0,), dtype=dtype if wanted or dtype == torch.int32 else None)

    now = options.reduction != "none"
    return (
        new() if now else new(B, S),
        new(B, S, H),
        new(B, S, H),
        new(B, S, H, dtype=torch.bool),
        new(B, S, H, dtype=torch.int32, wanted=call.with_top1),
        new(B, S, H) if call.with_d_weights else new(0),
        new(),
        new(B * S * H, D, dtype=unembed.dtype, wanted=now and any(call.with_d_hidden)),
        new(V, D, dtype=last, wanted=now and call.with_d_unembed),
        new(V, dtype=last, wanted=now and call.with_d_bias),
        new() if now and call.with_gradient else new(0),
    )


def _computed_rows(
    hidden: list[Tensor], inputs: LossInputs, options: LossOptions, call: LinearCall, shard: VocabShard
) -> tuple[int, int]:
    """Return the rows that the products take, and those of d_hidden.

    All of them where only the values of tensors that have none tell.
    """
    B, S, H = positions(hidden)
    M = N = B * S * H
    row_mask = inputs.labels  # of the device; its values are read where rows are dropped
    if isinstance(inputs.labels, FakeTensor):
        M = N if call.drop < 0 else min(call.drop, N)
        call = call._replace(drop=KEEP_ALL)
    elif call.drop != KEEP_ALL:
        row_mask = compute_rows(hidden, shard.vocab_size, inputs, options, call).rows.row_mask
        M = int(row_mask.sum()) if call.drop == COUNT else min(call.drop, N)
    return M, sum(end - start for start, end in wanted_rows(row_mask, M, call))


def _count_forward(
    hidden: list[Tensor],
    unembed: Tensor,
    bias: Tensor | None,
    inputs: LossInputs,
    options: LossOptions,
    call: LinearCall,
    shard: VocabShard,
) -> int:
    """Return 2 M V D for each product of M rows."""
    if options.reduction == "none":
        call = call.without_gradient()
    M, wanted = _computed_rows(hidden, inputs, options, call, shard)
    return 2 * unembed.numel() * (M * (1 + call.with_d_unembed) + wanted)


@operator(fake=_allocate_forward, flops=_count_forward)
def linear_forward(
    hidden: list[Tensor],  # one [B, S, H, D], or H x [B, S, D]
    unembed: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    inputs: LossInputs,
    options: LossOptions,
    call: LinearCall,
    shard: VocabShard,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [] or [B,S]; ce, lse, valid, top1, d_row_weights [B,S,H]; factor []; d_hidden, d_unembed, d_bias; scale [].

    The gradients times `scale` are those of the loss; none where reduction is "none". Empty: not wanted.
    """
    labels, V, same = inputs.labels, shard.vocab_size, None
    B, S, H = positions(hidden)
    if shard.ranks > 1:
        same = check_same_call([x.shape for x in hidden], inputs, shard, (options, call))
    if call.impl == "cpu":
        inputs, options = read_terms(inputs, options)
    if labels.device.type == "cpu":
        check_labels(inputs, options, S, H, V)
    with device_guard(labels.device):
        rows, valid, head_coefficient, coefficient = compute_rows(hidden, V, inputs, options, call)
        if options.reduction == "none":
            call = call.without_gradient()
        valid = valid.contiguous()
        mean, scale = functions(call.impl)[1], coefficient.new_empty(0)
        if call.with_gradient:
            # The factor follows from the labels alone.
            _, factor = reduce(mean, coefficient.new_zeros(B, S), valid, inputs, options)
            small, scale = fold_factor(rows.coefficient, factor, unembed.dtype)
            rows = rows._replace(coefficient=small)
        results, gradients = run_chunks(hidden, unembed, bias, rows, inputs.terms, options, call, shard)
        ce, row_loss, lse = (from_row_order(x, hidden, B, S) for x in results[:3])
        out = torch.where(coefficient != 0, coefficient * row_loss, 0.0).sum(-1)
        d_row_weights = ce.new_empty(0)
        if call.with_d_weights:
            d_row_weights = torch.where(head_coefficient != 0, head_coefficient * row_loss, 0.0)
        loss, factor = reduce(mean, out, valid, inputs, options)
        if call.drop >= 0:
            # Too small a number of rows is NaN: on a GPU an error would wait for the device.
            missed = rows.row_mask.sum() > call.drop
            loss, factor, scale = (torch.where(missed, float("nan"), x) for x in (loss, factor, scale))
        if same is not None:
            loss, factor, scale = (torch.where(same, x, float("nan")) for x in (loss, factor, scale))
    top1 = valid.new_empty(0, dtype=torch.int32)
    if results.top1 is not None:
        top1 = from_row_order(results.top1, hidden, B, S)
    d_hidden, d_unembed, d_bias = (unembed.new_empty(0) if x is None else x for x in gradients)
    return loss, ce, lse, valid, top1, d_row_weights, factor, d_hidden, d_unembed, d_bias, scale


def _allocate_backward(
    d_loss: Tensor,
    hidden: list[Tensor],
    unembed: Tensor,
    bias: Tensor | None,
    inputs: LossInputs,
    options: LossOptions,
    factor: Tensor,
    call: LinearCall,
    shard: VocabShard,
) -> tuple[Tensor, ...]:
    V, D = unembed.shape
    N = sum(x.numel() for x in hidden) // max(1, D)
    shapes = ((N, D), (V, D), (V,))
    wanted = (any(call.with_d_hidden), call.with_d_unembed, call.with_d_bias)
    return tuple(unembed.new_empty(shape if w else (0,)) for shape, w in zip(shapes, wanted, strict=True))


def _count_backward(
    d_loss: Tensor,
    hidden: list[Tensor],
    unembed: Tensor,
    bias: Tensor | None,
    inputs: LossInputs,
    options: LossOptions,
    factor: Tensor,
    call: LinearCall,
    shard: VocabShard,
) -> int:
    """Return 2 M V D for each product of M rows: the logits again, and the gradients."""
    call = call._replace(with_d_weights=False)
    M, wanted = _computed_rows(hidden, inputs, options, call, shard)
    return 2 * unembed.numel() * (M * (1 + call.with_d_unembed) + wanted)


@operator(fake=_allocate_backward, flops=_count_backward)
def linear_backward(
    d_loss: Tensor,  # [] or [B, S]
    hidden: list[Tensor],
    unembed: Tensor,
    bias: Tensor | None,
    inputs: LossInputs,
    options: LossOptions,
    factor: Tensor,
    call: LinearCall,
    shard: VocabShard,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d loss / d hidden [N,D], d unembed [V,D], d bias [V] in the dtypes of the inputs; empty: not wanted."""
    labels = inputs.labels
    if call.impl == "cpu":
        inputs, options = read_terms(inputs, options)
    call = call._replace(with_top1=False, with_d_weights=False)
    with device_guard(labels.device):
        rows = compute_rows(hidden, shard.vocab_size, inputs, options, call).rows
        B, S, H = positions(hidden)
        upstream = d_loss.to(factor.dtype).expand(B, S)
        by_row = in_row_order(upstream[:, :, None].expand(B, S, H), hidden)
        # The upstream gradient of a masked row may be Inf.
        by_row = torch.where(rows.coefficient == 0, 0.0, by_row)
        # The largest upstream gradient stays out of the products, as a scalar one does in forward.
        most = largest(by_row)
        coefficient = torch.where(by_row == 0, 0.0, rows.coefficient * (by_row / most))
        coefficient, scale = fold_factor(coefficient, factor, unembed.dtype)
        rows = Rows(rows.label, coefficient, by_row != 0)
        _, gradients = run_chunks(hidden, unembed, bias, rows, inputs.terms, options, call, shard)
        d_hidden, d_unembed, d_bias = (
            unembed.new_empty(0) if x is None else scaled_(x, scale * most, unembed.dtype) for x in gradients
        )
    return d_hidden, d_unembed, d_bias


def scaled_(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x * factor in a dtype, rounded once, in x's own memory where that has the dtype."""
    # The upstream gradient of most losses is 1, which costs nothing. A tensor that is traced has no value.
    if type(factor) is Tensor and x.dtype == dtype and not torch.compiler.is_compiling():
        if factor.device.type == "cpu" and factor.item() == 1:
            return x
        if factor.is_cuda:
            from mtp_ce.kernels.scale import launch_scale

            with device_guard(x.device):
                launch_scale(x, factor)
            return x
    out = x if x.dtype == dtype else x.new_empty(x.shape, dtype=dtype)
    # Of as many dimensions as x: a 0-d factor would be rounded to a half x's dtype first.
    return torch.mul(x, factor.reshape((1,) * x.dim()), out=out)


class _LinearLoss(Loss):
    """The first five results of `linear_forward`, with the gradients of the loss, and an empty tensor."""

    @staticmethod
    def forward(ctx: Any, options: LossOptions, call: LinearCall, shard: VocabShard, n: int, *tensors: Any) -> Any:
        hidden, (unembed, bias, *others) = tensors[:n], tensors[n:]
        inputs = LossInputs(*others)
        loss, ce, lse, valid, top1, d_row_weights, factor, *gradients = linear_forward(
            list(hidden), unembed, bias, *inputs, *options.values(), *call, *shard
        )
        ctx.options, ctx.call, ctx.shard = options, call, shard
        ctx.shapes, ctx.dtype = [x.shape for x in hidden], unembed.dtype
        # Not saved, but owned: the last backward takes them.
        ctx.gradients = gradients if options.reduction != "none" else None
        # Where they wait, nothing else is read again. An output that nobody sees, and so nobody changes, stands for all
        # that the loss depends on: a second derivative finds the way there and is refused.
        anchor = loss.new_empty(0)
        layer = (*hidden, unembed, bias) if ctx.gradients is None else (anchor,)
        # The normalizer is in the factor.
        ctx.save_for_backward(*others[:-1], factor, d_row_weights, *layer)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(ce, lse, valid, top1)
        return loss, ce, lse, valid, top1, anchor

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if d_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        d_unembed, d_bias, d_weights, *d_hidden = once_differentiable(
            _linear_gradients, ctx, d_loss, *ctx.saved_tensors
        )
        return None, None, None, None, *d_hidden, d_unembed, d_bias, *input_gradients(d_weights)


def _linear_gradients(ctx: Any, d_loss: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of unembed, bias and token weights, and of each tensor of hidden states."""
    *others, factor, d_row_weights = saved[: len(LossInputs._fields) + 1]
    layer = saved[len(LossInputs._fields) + 1 :]
    inputs, options, call = LossInputs(*others), ctx.options, ctx.call
    d_hidden: list[Tensor | None] = [None] * len(ctx.shapes)
    d_unembed = d_bias = d_weights = None
    if call.with_d_weights:
        d_weights = weights_backward(
            d_loss, inputs.token_weights, d_row_weights, factor,
            options.left_halo + options.shift, options.weight_alignment,
        )  # fmt: skip
    if call.with_gradient:
        if ctx.gradients is None:
            *hidden, unembed, bias = layer
            gradients = linear_backward(
                d_loss, hidden, unembed, bias, *inputs, *options.values(), factor, *call, *ctx.shard
            )
        else:
            *unscaled, scale = ctx.gradients
            upstream = d_loss.to(scale.dtype) * scale
            if torch._C._autograd._get_current_graph_task_keep_graph():  # another backward may follow
                unscaled = [x.clone() for x in unscaled]
            else:
                ctx.gradients = ()
            gradients = [scaled_(x, upstream, ctx.dtype) for x in unscaled]
        if any(call.with_d_hidden):
            of_tensors = split_rows(gradients[0], ctx.shapes)
            d_hidden = [x if wanted else None for x, wanted in zip(of_tensors, call.with_d_hidden, strict=True)]
        d_unembed = gradients[1] if call.with_d_unembed else None
        d_bias = gradients[2] if call.with_d_bias else None
    return d_unembed, d_bias, d_weights, *d_hidden


def split_rows(d_rows: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """Return gradients [N,D] in row order as tensors shaped like the hidden states."""
    if len(shapes) == 1:
        return [d_rows.view(shapes[0])]
    return [*d_rows.view(len(shapes), *shapes[0]).unbind(0)]


@differentiable
def linear_loss(
    hidden: list[Tensor],
    unembed: Tensor,
    bias: Tensor | None,
    inputs: LossInputs,
    options: LossOptions,
    call: LinearCall,
    shard: VocabShard,
) -> list[Tensor]:
    """Return loss, ce, lse, valid and top1 with the gradients of the loss; arguments as `linear_forward`."""
    return [*_LinearLoss.apply(options, call, shard, len(hidden), *hidden, unembed, bias, *inputs)[:5]]
