"""The linear path as torch operators: what torch.compile, autograd and opcheck see.

`linear_forward` computes a scalar loss and its gradients together: they wait, without 1/N and the upstream gradient,
for backward, which takes them and scales them in place. A second backward through the same graph (retain_graph) and
reduction="none" compute them anew with `linear_backward`. Arguments arrive checked (mtp_ce/checks.py).
"""

from typing import Any

import torch
from torch import Tensor

from mtp_ce.ops.chunks import Products, Rows, find_rows, from_row_order, in_row_order, largest, run, scaled_down
from mtp_ce.ops.logits import device_guard, functions, weights_backward
from mtp_ce.ops.register import differentiable, once_differentiable, operator
from mtp_ce.ops.rows import check_labels

# Arguments of `linear_forward` after hidden that are tensors.
TENSORS = 8


@operator
def linear_forward(
    hidden: list[Tensor],  # one [B, S, H, D], or H x [B, S, D]
    unembed: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [B, S]
    token_weights: Tensor | None,  # [B, S] or [B, S, H]
    head_weights: Tensor | None,  # [H]
    seq_lens: Tensor | None,  # [B]
    document_ids: Tensor | None,  # [B, S]
    normalizer: Tensor | None,  # []
    shift: int,
    over_horizon: bool,
    target_weights: bool,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    reduction: str,
    scale: float,
    with_top1: bool,
    with_shares: bool,
    d_hidden_wanted: bool,
    d_unembed_wanted: bool,
    d_bias_wanted: bool,
    chunk_rows: int,
    drop: int,
    grad_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [] or [B,S]; ce, lse, live, top1, shares [B,S,H]; factor []; d_hidden, d_unembed, d_bias; power [].

    The gradients are those of the sum over positions, without the factor and, in fp16, divided by a power
    of two; none where reduction is "none". Empty: not wanted.
    """
    B, S = labels.shape
    if labels.device.type == "cpu":
        H = hidden[0].shape[2] if len(hidden) == 1 else len(hidden)
        check_labels(labels, seq_lens, document_ids, H=H, V=unembed.shape[0], shift=shift, ignore_index=ignore_index)
    with device_guard(labels.device):
        rows, live, share, coefficient = find_rows(
            hidden, unembed.shape[0], labels, token_weights, head_weights, seq_lens, document_ids,
            shift, over_horizon, target_weights, ignore_index, with_shares, impl,
        )  # fmt: skip
        later = reduction == "none"
        products = Products(d_hidden_wanted and not later, d_unembed_wanted and not later, d_bias_wanted and not later)
        power = unembed.new_empty(0, dtype=coefficient.dtype)
        if unembed.dtype == torch.float16 and any(products):
            by_row, power = scaled_down(rows.coefficient)
            rows = rows._replace(coefficient=by_row)
        results = run(
            hidden, unembed, bias, rows, products,
            drop=drop, softcap=softcap, z_loss=z_loss, label_smoothing=label_smoothing, with_top1=with_top1,
            chunk_rows=chunk_rows, grad_dtype=grad_dtype, impl=impl,
        )  # fmt: skip
        live = live.contiguous()
        ce, row_loss, lse = (from_row_order(x, hidden, B, S) for x in (results.ce, results.row_loss, results.lse))
        out = torch.where(coefficient != 0, coefficient * row_loss, 0.0).sum(-1)
        shares = torch.where(share != 0, share * row_loss, 0.0) if with_shares else ce.new_empty(0)
        if later:
            loss, factor = out.mul_(scale), out.new_full((), scale)
        else:
            _, mean, _ = functions(impl)
            loss, factor = mean(out, live, normalizer, scale=scale, count=reduction == "mean" and normalizer is None)
        if drop >= 0:
            # On a GPU nobody waits to say that rows were left out.
            missed = rows.read.sum() > drop
            loss, factor = (torch.where(missed, float("nan"), x) for x in (loss, factor))
    d_hidden, d_unembed, d_bias = (unembed.new_empty(0) if x is None else x for x in results.gradients)
    return (
        loss,
        ce,
        lse,
        live,
        live.new_empty(0, dtype=torch.int32) if results.top1 is None else from_row_order(results.top1, hidden, B, S),
        shares,
        factor,
        d_hidden,
        d_unembed,
        d_bias,
        power,
    )


@torch.library.register_fake("mtp_ce::linear_forward")
def _(
    hidden, unembed, bias, labels, token_weights, head_weights, seq_lens, document_ids, normalizer, shift,
    over_horizon, target_weights, ignore_index, softcap, z_loss, label_smoothing, reduction, scale, with_top1,
    with_shares, d_hidden_wanted, d_unembed_wanted, d_bias_wanted, chunk_rows, drop, grad_dtype, impl,
):  # fmt: skip
    B, S = labels.shape
    H = hidden[0].shape[2] if len(hidden) == 1 else len(hidden)
    V, D = unembed.shape
    dtype = torch.float64 if unembed.dtype == torch.float64 else torch.float32
    total = torch.promote_types(grad_dtype, unembed.dtype)

    def new(*shape: int, dtype: torch.dtype = dtype, wanted: bool = True) -> Tensor:
        return unembed.new_empty(shape if wanted else (0,), dtype=dtype if wanted or dtype == torch.int32 else None)

    now = reduction != "none"
    wanted = now and (d_hidden_wanted or d_unembed_wanted or d_bias_wanted)
    return (
        new() if now else new(B, S),
        new(B, S, H),
        new(B, S, H),
        new(B, S, H, dtype=torch.bool),
        new(B, S, H, dtype=torch.int32, wanted=with_top1),
        new(B, S, H) if with_shares else new(0),
        new(),
        new(B * S * H, D, dtype=unembed.dtype, wanted=now and d_hidden_wanted),
        new(V, D, dtype=total, wanted=now and d_unembed_wanted),
        new(V, dtype=total, wanted=now and d_bias_wanted),
        new() if wanted and unembed.dtype == torch.float16 else new(0),
    )


@operator
def linear_backward(
    d_loss: Tensor,  # [] or [B, S]
    hidden: list[Tensor],
    unembed: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weights: Tensor | None,
    head_weights: Tensor | None,
    seq_lens: Tensor | None,
    document_ids: Tensor | None,
    factor: Tensor,
    shift: int,
    over_horizon: bool,
    target_weights: bool,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    d_hidden_wanted: bool,
    d_unembed_wanted: bool,
    d_bias_wanted: bool,
    chunk_rows: int,
    drop: int,
    grad_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """D loss / d hidden [N,D], d unembed [V,D], d bias [V] in the dtypes of the inputs; empty: not wanted."""
    with device_guard(labels.device):
        rows, _, _, _ = find_rows(
            hidden, unembed.shape[0], labels, token_weights, head_weights, seq_lens, document_ids,
            shift, over_horizon, target_weights, ignore_index, False, impl,
        )  # fmt: skip
        upstream = d_loss.to(factor.dtype).expand(labels.shape) * factor
        H = rows.label.numel() // max(1, labels.numel())
        by_row = in_row_order(upstream[:, :, None].expand(*labels.shape, H), hidden)
        # That of a dead row may be Inf.
        by_row = torch.where(rows.coefficient == 0, 0.0, by_row)
        # The largest stays out of the products, as 1/N does in forward, and with a scalar upstream so do all.
        most = largest(by_row)
        coefficient, power = scaled_down(torch.where(by_row == 0, 0.0, rows.coefficient * (by_row / most)))
        rows = Rows(rows.label, coefficient, by_row != 0)
        results = run(
            hidden, unembed, bias, rows, Products(d_hidden_wanted, d_unembed_wanted, d_bias_wanted),
            drop=drop, softcap=softcap, z_loss=z_loss, label_smoothing=label_smoothing, with_top1=False,
            chunk_rows=chunk_rows, grad_dtype=grad_dtype, impl=impl,
        )  # fmt: skip
        d_hidden, d_unembed, d_bias = (
            unembed.new_empty(0) if x is None else scaled_(x, most * power, unembed.dtype) for x in results.gradients
        )
    return d_hidden, d_unembed, d_bias


@torch.library.register_fake("mtp_ce::linear_backward")
def _(
    d_loss, hidden, unembed, bias, labels, token_weights, head_weights, seq_lens, document_ids, factor, shift,
    over_horizon, target_weights, ignore_index, softcap, z_loss, label_smoothing, d_hidden_wanted, d_unembed_wanted,
    d_bias_wanted, chunk_rows, drop, grad_dtype, impl,
):  # fmt: skip
    V, D = unembed.shape
    N = sum(x.numel() for x in hidden) // max(1, D)
    shapes = ((N, D), (V, D), (V,))
    wanted = (d_hidden_wanted, d_unembed_wanted, d_bias_wanted)
    return tuple(unembed.new_empty(shape if w else (0,)) for shape, w in zip(shapes, wanted, strict=True))


def scaled_(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """X * factor in a dtype, rounded once, in x's own memory where that has the dtype."""
    out = x if x.dtype == dtype else x.new_empty(x.shape, dtype=dtype)
    # Of as many dimensions as x: a 0-d factor would be rounded to a half x's dtype first.
    return torch.mul(x, factor.reshape((1,) * x.dim()), out=out)


class _LinearLoss(torch.autograd.Function):
    """The first five results of `linear_forward`, with the gradients of the loss."""

    @staticmethod
    def forward(ctx: Any, given: int, options: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        hidden, others = tensors[:given], tensors[given:]
        loss, ce, lse, live, top1, shares, factor, *gradients = linear_forward(list(hidden), *others, *options)
        ctx.save_for_backward(*tensors[:-1], factor, shares)
        ctx.given = given
        ctx.rule = options[:7]
        reduction, _, _, ctx.with_shares = options[7:11]
        ctx.products, ctx.how = options[11:14], options[14:]
        # Not saved, but owned: the first backward takes them and leaves nothing to the next.
        ctx.gradients = gradients if reduction != "none" else None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(ce, lse, live, top1)
        return loss, ce, lse, live, top1

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if d_loss is None:
            return (None,) * (2 + ctx.given + TENSORS)
        d_unembed, d_bias, d_weights, *d_hidden = once_differentiable(
            _linear_gradients, ctx, d_loss, *ctx.saved_tensors
        )
        return None, None, *d_hidden, d_unembed, d_bias, None, d_weights, *[None] * (TENSORS - 4)


def _linear_gradients(ctx: Any, d_loss: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
    """Of unembed, bias and token weights, and of each tensor of hidden states."""
    hidden, (unembed, bias, *tensors), shares = list(saved[: ctx.given]), saved[ctx.given : -1], saved[-1]
    d_hidden: list[Tensor | None] = [None] * ctx.given
    d_unembed = d_bias = d_weights = None
    factor = tensors[-1]
    if ctx.with_shares:
        d_weights = weights_backward(d_loss, tensors[1], shares, factor, ctx.rule[0], ctx.rule[2])
    if any(ctx.products):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            given = linear_backward(d_loss, hidden, unembed, bias, *tensors, *ctx.rule, *ctx.products, *ctx.how)
        else:
            *owned, power = gradients
            upstream = d_loss.to(factor.dtype) * factor
            if power.numel():
                upstream = upstream * power
            given = [scaled_(x, upstream, unembed.dtype) for x in owned]
        if ctx.products[0]:
            d_hidden = split_rows(given[0], hidden)
        d_unembed = given[1] if ctx.products[1] else None
        d_bias = given[2] if ctx.products[2] else None
    return d_unembed, d_bias, d_weights, *d_hidden


def split_rows(d_rows: Tensor, hidden: list[Tensor]) -> list[Tensor | None]:
    """Gradients [N,D] in row order as the hidden states were given."""
    if len(hidden) == 1:
        return [d_rows.view(hidden[0].shape)]
    return [*d_rows.view(len(hidden), *hidden[0].shape).unbind(0)]


linear_loss = differentiable("linear_loss", _LinearLoss, linear_forward, tensors=TENSORS)
