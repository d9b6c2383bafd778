"""The loss as torch operators: what torch.compile, autograd and opcheck see.

`logits_forward` returns the loss and what its gradient needs; `logits_backward` returns the gradients;
`logits_backward_` writes the gradient of the logits over them. `logits_loss` is the differentiable function of them.
A gradient has no derivative: differentiating twice raises. Arguments arrive checked (mtp_ce/checks.py).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mtp_ce.ops import cpu
from mtp_ce.ops.register import differentiable, once_differentiable, operator
from mtp_ce.ops.rows import check_labels

Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
# Arguments of `logits_forward` after the logits that are tensors.
TENSORS = 6


def split_heads(logits: list[Tensor]) -> list[Tensor]:
    """H views [B,S,V] of one [B,S,H,V], or the H tensors themselves."""
    return list(logits[0].unbind(2)) if logits[0].dim() == 4 else logits


def horizon(logits: list[Tensor]) -> int:
    """H of one [B,S,H,V], or of H tensors [B,S,V]."""
    return logits[0].shape[2] if logits[0].dim() == 4 else len(logits)


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current device: make it the tensors', where it is not."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def functions(impl: str) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Forward, mean and backward of an implementation; kernels are imported where they are wanted."""
    if impl == "cpu":
        return cpu.forward, cpu.mean, cpu.backward
    from mtp_ce.kernels.backward import launch_backward
    from mtp_ce.kernels.forward import launch_forward
    from mtp_ce.kernels.mean import launch_mean

    return launch_forward, launch_mean, launch_backward


@operator
def logits_forward(
    logits: list[Tensor],  # one [B, S, H, V], or H x [B, S, V]
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
    inplace_backward: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [] or [B,S]; ce, row_max, log_sum, live, top1, shares [B,S,H] (empty if not wanted); factor []."""
    heads = split_heads(logits) if impl == "cpu" else logits
    if labels.numel() == 0:
        results = _allocate(logits, reduction, with_top1, with_shares)
        results[0].zero_()
        results[-1].zero_()
        return results
    forward, mean, _ = functions(impl)
    if labels.device.type == "cpu":
        check_labels(
            labels, seq_lens, document_ids,
            H=horizon(logits), V=logits[0].shape[-1], shift=shift, ignore_index=ignore_index,
        )  # fmt: skip
    with device_guard(labels.device):
        out, ce, row_max, log_sum, live, top1, shares = forward(
            heads, labels, token_weights, head_weights, seq_lens, document_ids,
            shift=shift, over_horizon=over_horizon, target_weights=target_weights, ignore_index=ignore_index,
            softcap=softcap, z_loss=z_loss, label_smoothing=label_smoothing,
            with_top1=with_top1, with_shares=with_shares,
        )  # fmt: skip
        if reduction == "none":
            loss, factor = out.mul_(scale), out.new_full((), scale)
        else:
            count = reduction == "mean" and normalizer is None
            loss, factor = mean(out, live, normalizer, scale=scale, count=count)
    top1 = live.new_empty(0, dtype=torch.int32) if top1 is None else top1
    shares = ce.new_empty(0) if shares is None else shares
    return loss, ce, row_max, log_sum, live, top1, shares, factor


def _allocate(logits: list[Tensor], reduction: str, with_top1: bool, with_shares: bool) -> Forward:
    B, S = logits[0].shape[:2]
    H = horizon(logits)
    dtype = torch.float64 if logits[0].dtype == torch.float64 else torch.float32

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return logits[0].new_empty(shape, dtype=dtype)

    return (
        new(B, S) if reduction == "none" else new(),
        new(B, S, H),
        new(B, S, H),
        new(B, S, H),
        new(B, S, H, dtype=torch.bool),
        new(B, S, H, dtype=torch.int32) if with_top1 else new(0, dtype=torch.int32),
        new(B, S, H) if with_shares else new(0),
        new(),
    )


@torch.library.register_fake("mtp_ce::logits_forward")
def _(
    logits, labels, token_weights, head_weights, seq_lens, document_ids, normalizer, shift, over_horizon,
    target_weights, ignore_index, softcap, z_loss, label_smoothing, reduction, scale, with_top1, with_shares,
    inplace_backward, impl,
):  # fmt: skip
    return _allocate(logits, reduction, with_top1, with_shares)


@operator
def logits_backward(
    d_loss: Tensor,  # [] or [B, S]
    logits: list[Tensor],
    labels: Tensor,
    token_weights: Tensor | None,
    head_weights: Tensor | None,
    seq_lens: Tensor | None,
    document_ids: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    factor: Tensor,
    shift: int,
    over_horizon: bool,
    target_weights: bool,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    impl: str,
) -> list[Tensor]:
    """D loss / d logits, shaped as the logits were given."""
    d_logits = [torch.empty_like(x) for x in logits]
    _write_gradient(
        d_loss, logits, d_logits, labels, token_weights, head_weights, seq_lens, document_ids, row_max, log_sum,
        factor, shift, over_horizon, target_weights, ignore_index, softcap, z_loss, label_smoothing, impl,
    )  # fmt: skip
    return d_logits


@torch.library.register_fake("mtp_ce::logits_backward")
def _(
    d_loss, logits, labels, token_weights, head_weights, seq_lens, document_ids, row_max, log_sum, factor, shift,
    over_horizon, target_weights, ignore_index, softcap, z_loss, label_smoothing, impl,
):  # fmt: skip
    return [torch.empty_like(x) for x in logits]


# Not an `operator`: this also moves on the version of what it overwrites.
@torch.library.custom_op("mtp_ce::logits_backward_", mutates_args=("logits",))
def logits_backward_(
    d_loss: Tensor,
    logits: list[Tensor],
    labels: Tensor,
    token_weights: Tensor | None,
    head_weights: Tensor | None,
    seq_lens: Tensor | None,
    document_ids: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    factor: Tensor,
    shift: int,
    over_horizon: bool,
    target_weights: bool,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    impl: str,
) -> None:
    """Overwrite the logits with d loss / d logits."""
    _write_gradient(
        d_loss, logits, logits, labels, token_weights, head_weights, seq_lens, document_ids, row_max, log_sum,
        factor, shift, over_horizon, target_weights, ignore_index, softcap, z_loss, label_smoothing, impl,
    )  # fmt: skip


def _write_gradient(
    d_loss, logits, d_logits, labels, token_weights, head_weights, seq_lens, document_ids, row_max, log_sum, factor,
    shift, over_horizon, target_weights, ignore_index, softcap, z_loss, label_smoothing, impl,
) -> None:  # fmt: skip
    if labels.numel() == 0:
        return
    heads, d_heads = logits, d_logits
    if impl == "cpu":
        heads, d_heads = split_heads(logits), split_heads(d_logits)
    _, _, backward = functions(impl)
    with device_guard(labels.device):
        backward(
            d_loss.expand(labels.shape), heads, d_heads, labels, token_weights, head_weights, seq_lens, document_ids,
            row_max, log_sum, factor,
            shift=shift, over_horizon=over_horizon, target_weights=target_weights, ignore_index=ignore_index,
            softcap=softcap, z_loss=z_loss, label_smoothing=label_smoothing,
        )  # fmt: skip


@operator
def weights_backward(
    d_loss: Tensor,  # [] or [B, S]
    token_weights: Tensor,  # [B, S] or [B, S, H]
    shares: Tensor,  # [B, S, H]
    factor: Tensor,  # []
    shift: int,
    target_weights: bool,
) -> Tensor:
    """D loss / d token_weights: the shares of a weight's rows, summed."""
    B, S, H = shares.shape
    upstream = (d_loss.expand(B, S).to(shares.dtype) * factor)[:, :, None]
    # A dead row's share is 0, and its weight counts for nothing; also where one of the two is Inf or NaN.
    by_row = torch.where((shares == 0) | (upstream == 0), 0.0, upstream * shares)
    if token_weights.dim() == 3:
        d_weights = by_row
    elif target_weights:
        d_weights = by_row.new_zeros(B, S)
        for h in range(min(H, S - shift)):
            d_weights[:, shift + h :] += by_row[:, : S - shift - h, h]
    else:
        d_weights = by_row.sum(-1)
    return d_weights.to(token_weights.dtype, copy=True)


@torch.library.register_fake("mtp_ce::weights_backward")
def _(d_loss, token_weights, shares, factor, shift, target_weights):
    return token_weights.new_empty(token_weights.shape)


class _LogitsLoss(torch.autograd.Function):
    """The loss of `logits_forward`, and where top1 is wanted also ce, row_max, log_sum, live and top1."""

    @staticmethod
    def forward(ctx: Any, given: int, options: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        logits, others = tensors[:given], tensors[given:]
        *results, shares, factor = logits_forward(list(logits), *others, *options)
        loss, _, row_max, log_sum, _, _ = results
        ctx.save_for_backward(*tensors[:-1], row_max, log_sum, factor, shares)
        ctx.given = given
        ctx.rule = options[:7]
        with_top1, ctx.with_shares, ctx.inplace, ctx.impl = options[9:]
        ctx.set_materialize_grads(False)
        if not with_top1:
            return (loss,)
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if d_loss is None:
            return (None,) * (2 + ctx.given + TENSORS)
        if ctx.inplace and torch.is_grad_enabled():
            raise RuntimeError("inplace_backward has no second derivative; use inplace_backward=False.")
        d_weights, *d_logits = once_differentiable(_logits_gradients, ctx, d_loss, *ctx.saved_tensors)
        return None, None, *d_logits, None, d_weights, *[None] * (TENSORS - 2)


def _logits_gradients(ctx: Any, d_loss: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
    """Of the token weights, and of each tensor of logits."""
    logits, tensors, shares = list(saved[: ctx.given]), saved[ctx.given : -1], saved[-1]
    d_weights = None
    if ctx.with_shares:
        shift, _, target_weights = ctx.rule[:3]
        d_weights = weights_backward(d_loss, tensors[1], shares, tensors[-1], shift, target_weights)
    if not any(ctx.needs_input_grad[2 : 2 + ctx.given]):
        return d_weights, *[None] * ctx.given
    if not ctx.inplace:
        return d_weights, *logits_backward(d_loss, logits, *tensors, *ctx.rule, ctx.impl)
    logits = [x.detach() for x in logits]
    logits_backward_(d_loss, logits, *tensors, *ctx.rule, ctx.impl)
    return d_weights, *logits


logits_loss = differentiable("logits_loss", _LogitsLoss, logits_forward, tensors=TENSORS)
