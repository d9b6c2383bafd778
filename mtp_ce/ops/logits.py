"""The loss as torch operators: what torch.compile, autograd and opcheck see.

`logits_forward` returns the loss and what its gradient needs; `logits_backward` returns the gradients;
`logits_backward_` writes the gradient of the logits over them. `logits_loss` is the differentiable function of them.
A gradient has no derivative: differentiating twice raises. Arguments arrive checked (mtp_ce/checks.py).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_ce.kernels.tiles import VECTOR_BYTES
from mtp_ce.ops import cpu
from mtp_ce.ops.memory import check_memory
from mtp_ce.ops.register import Loss, differentiable, mutating_operator, once_differentiable, operator
from mtp_ce.ops.rows import check_labels, count_terms, sum_by_token
from mtp_ce.ops.shards import check_same_call, gather_partials
from mtp_ce.options import LossInputs, LossOptions, VocabShard, read_terms

Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class LogitsCall(NamedTuple):
    """How one call runs, and which results it wants."""

    with_top1: bool
    with_d_weights: bool
    inplace_backward: bool
    impl: str  # "triton" or "cpu"


def split_heads(logits: list[Tensor]) -> list[Tensor]:
    """Return H views [B,S,V] of one [B,S,H,V], or the H tensors themselves."""
    return list(logits[0].unbind(2)) if logits[0].dim() == 4 else logits


def horizon(logits: list[Tensor]) -> int:
    """Return H of one [B,S,H,V], or of H tensors [B,S,V]."""
    return logits[0].shape[2] if logits[0].dim() == 4 else len(logits)


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current device, which launches go to, where it is not."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def functions(
    impl: str, shard: VocabShard | None = None
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Return forward, mean and backward of an implementation; Triton is imported only where it runs."""
    if shard is not None and shard.ranks == 1:
        shard = None
    if impl == "cpu":
        if shard is None:
            return cpu.forward, cpu.mean, cpu.backward
        return partial(cpu.forward, shard=shard), cpu.mean, partial(cpu.backward, shard=shard)
    forward, mean, backward = _triton_modules()
    if shard is None:
        return forward.launch_forward, mean.launch_mean, backward.launch_backward
    gather = partial(gather_partials, shard=shard)
    return (
        partial(forward.launch_forward, shard=shard, gather=gather),
        mean.launch_mean,
        partial(backward.launch_backward, shard=shard),
    )


@cache
def _triton_modules() -> tuple[ModuleType, ModuleType, ModuleType]:
    # Three import statements cost a call 2 microseconds, also where the modules are loaded.
    from mtp_ce.kernels import backward, forward, mean

    return forward, mean, backward


def _allocate(
    logits: list[Tensor], inputs: LossInputs, options: LossOptions, call: LogitsCall, shard: VocabShard
) -> Forward:
    B, S = logits[0].shape[:2]
    H = horizon(logits)
    dtype = torch.float64 if logits[0].dtype == torch.float64 else torch.float32

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return logits[0].new_empty(shape, dtype=dtype)

    return (
        new(B, S) if options.reduction == "none" else new(),
        new(B, S, H),
        new(B, S, H),
        new(B, S, H),
        new(B, S, H, dtype=torch.bool),
        new(B, S, H, dtype=torch.int32) if call.with_top1 else new(0, dtype=torch.int32),
        new(B, S, H) if call.with_d_weights else new(0),
        new(),
    )


def _trace_forward(
    logits: list[Tensor], inputs: LossInputs, options: LossOptions, call: LogitsCall, shard: VocabShard
) -> Forward:
    if call.inplace_backward:
        check_memory(logits)
    return _allocate(logits, inputs, options, call, shard)


@operator(fake=_trace_forward)
def logits_forward(
    logits: list[Tensor],  # one [B, S, H, V], or H x [B, S, V]
    inputs: LossInputs,
    options: LossOptions,
    call: LogitsCall,
    shard: VocabShard,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss [] or [B,S]; ce, row_max, log_sum, valid, top1, d_row_weights [B,S,H]; factor []. Empty: not wanted.

    The factor is what the gradient of every position's term takes: scale / N.
    """
    heads = logits
    same = None
    if shard.ranks > 1:
        same = check_same_call([x.shape[:-1] for x in logits], inputs, shard, (options, call))
    if call.impl == "cpu":
        heads = split_heads(logits)
        inputs, options = read_terms(inputs, options)
    device = inputs.labels.device
    B, S = logits[0].shape[:2]
    if B * S == 0:
        results = _allocate(logits, inputs, options, call, shard)
        results[0].zero_()
        results[-1].zero_()
        return results
    forward, mean, _ = functions(call.impl, shard)
    if device.type == "cpu":
        check_labels(inputs, options, S, horizon(logits), shard.vocab_size)
    with device_guard(device):
        out, ce, row_max, log_sum, valid, top1, d_row_weights = forward(
            heads, inputs, options, with_top1=call.with_top1, with_d_weights=call.with_d_weights
        )
        loss, factor = reduce(mean, out, valid, inputs, options)
        if same is not None:
            loss, factor = (torch.where(same, x, float("nan")) for x in (loss, factor))
    top1 = valid.new_empty(0, dtype=torch.int32) if top1 is None else top1
    d_row_weights = ce.new_empty(0) if d_row_weights is None else d_row_weights
    return loss, ce, row_max, log_sum, valid, top1, d_row_weights, factor


def reduce(
    mean: Callable[..., tuple[Tensor, Tensor]], out: Tensor, valid: Tensor, inputs: LossInputs, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Return the loss of the positions' terms `out`, and the factor of their gradients."""
    if options.reduction == "none":
        if inputs.terms is None:
            return out.mul_(options.loss_scale), out.new_full((), options.loss_scale)
        return out.mul_(inputs.terms[0]), inputs.terms[0].to(out.dtype)
    normalizer = inputs.normalizer
    counts_tokens = options.reduction == "mean" and options.head_reduction == "target"
    if normalizer is None and counts_tokens and inputs.labels.shape != out.shape:
        normalizer = count_terms(valid, options, inputs)
    if inputs.terms is None:
        return mean(out, valid, normalizer, options)
    return mean(out, valid, normalizer, options, inputs.terms)


def empty_gradient(x: Tensor) -> Tensor:
    """Return memory for a gradient whose rows stand against 16-byte boundaries as those of the logits do.

    Kernels then load and store whole vectors at the same offsets. torch.empty_like packs the rows of a sliced
    vocabulary (`logits[..., :50257]` of 50304), so that each of them would stand differently.
    """
    unit = VECTOR_BYTES // x.element_size()
    lead = x.storage_offset() % unit
    if x.stride(-1) != 1 or (lead == 0 and x.is_contiguous()):
        return torch.empty_like(x)
    strides, extent = list(x.stride()), x.shape[-1]
    # The order of the dimensions in memory is kept; between rows stand fewer elements than a vector has.
    for d in sorted(range(x.dim() - 1), key=strides.__getitem__):
        strides[d] = extent + (strides[d] - extent) % unit
        extent = strides[d] * x.shape[d]
    return x.new_empty(lead + extent).as_strided(x.shape, strides, lead)


@operator(fake=lambda d_loss, logits, *_: [empty_gradient(x) for x in logits])
def logits_backward(
    d_loss: Tensor,  # [] or [B, S]
    logits: list[Tensor],
    inputs: LossInputs,
    options: LossOptions,
    row_max: Tensor,
    log_sum: Tensor,
    factor: Tensor,
    impl: str,
    shard: VocabShard,
) -> list[Tensor]:
    """Return d loss / d logits, shaped and aligned like the logits."""
    d_logits = [empty_gradient(x) for x in logits]
    _write_gradient(d_loss, logits, d_logits, inputs, options, (row_max, log_sum, factor), impl, shard)
    return d_logits


@mutating_operator("logits")
def logits_backward_(
    d_loss: Tensor,
    logits: list[Tensor],
    inputs: LossInputs,
    options: LossOptions,
    row_max: Tensor,
    log_sum: Tensor,
    factor: Tensor,
    impl: str,
    shard: VocabShard,
) -> None:
    """Overwrite the logits with d loss / d logits."""
    _write_gradient(d_loss, logits, logits, inputs, options, (row_max, log_sum, factor), impl, shard)


def _write_gradient(
    d_loss: Tensor,
    logits: list[Tensor],
    d_logits: list[Tensor],
    inputs: LossInputs,
    options: LossOptions,
    statistics: tuple[Tensor, Tensor, Tensor],  # row_max, log_sum, factor
    impl: str,
    shard: VocabShard,
) -> None:
    B, S = logits[0].shape[:2]
    if B * S == 0:
        return
    if impl == "cpu":
        logits, d_logits = split_heads(logits), split_heads(d_logits)
        inputs, options = read_terms(inputs, options)
    _, _, backward = functions(impl, shard)
    with device_guard(inputs.labels.device):
        backward(d_loss.expand(B, S), logits, d_logits, inputs, options, *statistics)


@operator(fake=lambda d_loss, token_weights, *_: token_weights.new_empty(token_weights.shape))
def weights_backward(
    d_loss: Tensor,  # [] or [B, S]
    token_weights: Tensor,  # [B, S] or [B, S, H]; [B, T] where they are those of the targets
    d_row_weights: Tensor,  # [B, S, H]
    factor: Tensor,  # []
    first: int,  # index of the token that head 0 predicts from position 0
    weight_alignment: str,
) -> Tensor:
    """Return d loss / d token_weights: the gradients of a weight's rows, summed."""
    B, S, _ = d_row_weights.shape
    upstream = (d_loss.expand(B, S).to(d_row_weights.dtype) * factor)[:, :, None]
    # Exactly 0 for a masked row and for an upstream gradient of 0, also where the other is Inf or NaN.
    by_row = torch.where((d_row_weights == 0) | (upstream == 0), 0.0, upstream * d_row_weights)
    if token_weights.dim() == 3:
        d_weights = by_row
    elif weight_alignment == "target":
        d_weights = sum_by_token(by_row, first, token_weights.shape[1])
    else:
        d_weights = by_row.sum(-1)
    return d_weights.to(token_weights.dtype, copy=True)


def input_gradients(d_weights: Tensor | None) -> Iterator[Tensor | None]:
    """Return a gradient for each of `LossInputs`, of which only the token weights have one."""
    return (d_weights if name == "token_weights" else None for name in LossInputs._fields)


class _LogitsLoss(Loss):
    """The loss of `logits_forward`, and where top1 is wanted also ce, row_max, log_sum, valid and top1."""

    @staticmethod
    def forward(ctx: Any, options: LossOptions, call: LogitsCall, shard: VocabShard, H: int, *tensors: Any) -> Any:
        logits, inputs = tensors[:H], LossInputs(*tensors[H:])
        *results, d_row_weights, factor = logits_forward(list(logits), *inputs, *options.values(), *call, *shard)
        loss, _, row_max, log_sum, _, _ = results
        # The normalizer is in the factor.
        ctx.save_for_backward(*logits, *inputs[:-1], row_max, log_sum, factor, d_row_weights)
        ctx.options, ctx.call, ctx.shard, ctx.H = options, call, shard, H
        ctx.set_materialize_grads(False)
        if not call.with_top1:
            return (loss,)
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if d_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        if ctx.call.inplace_backward and torch.is_grad_enabled():
            raise RuntimeError("inplace_backward has no second derivative; use inplace_backward=False.")
        d_weights, *d_logits = once_differentiable(_logits_gradients, ctx, d_loss, *ctx.saved_tensors)
        return None, None, None, None, *d_logits, *input_gradients(d_weights)


def _logits_gradients(ctx: Any, d_loss: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
    """Return the gradient of the token weights, and of each tensor of logits."""
    logits, inputs = list(saved[: ctx.H]), LossInputs(*saved[ctx.H : -4])
    *statistics, d_row_weights = saved[-4:]
    options, call, shard, d_weights = ctx.options, ctx.call, ctx.shard, None
    if call.with_d_weights:
        d_weights = weights_backward(
            d_loss, inputs.token_weights, d_row_weights, statistics[-1],
            options.left_halo + options.shift, options.weight_alignment,
        )  # fmt: skip
    if not any(ctx.needs_input_grad[4 : 4 + ctx.H]):
        return d_weights, *[None] * ctx.H
    if not call.inplace_backward:
        d_logits = logits_backward(d_loss, logits, *inputs, *options.values(), *statistics, call.impl, *shard)
        return d_weights, *d_logits
    logits = [x.detach() for x in logits]
    logits_backward_(d_loss, logits, *inputs, *options.values(), *statistics, call.impl, *shard)
    return d_weights, *logits


@differentiable
def logits_loss(
    logits: list[Tensor], inputs: LossInputs, options: LossOptions, call: LogitsCall, shard: VocabShard
) -> list[Tensor]:
    """Return the loss, and where top1 is wanted ce, row_max, log_sum, valid and top1; arguments as `logits_forward`."""
    return [*_LogitsLoss.apply(options, call, shard, len(logits), *logits, *inputs)]
