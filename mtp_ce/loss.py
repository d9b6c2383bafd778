"""The public loss: every input check, and the choice of implementation."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, Unpack, overload

import torch
from torch import Tensor, nn

from mtp_ce import cpu
from mtp_ce.ops import logits_forward
from mtp_ce.reference import reference_weighted_mtp_ce

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHOICES = {
    "weight_alignment": ("position", "target"),
    "head_reduction": ("live", "horizon"),
    "reduction": ("mean", "sum", "none"),
    "impl": ("auto", "triton", "cpu", "reference"),
}


class MTPStats(NamedTuple):
    """Statistics of one call, from the same read of the logits: detached, on their device, without a sync.

    A row that was not read (not live, or of weight 0) has ce = lse = 0 and top1 = -1.
    """

    ce: Float[Tensor, "B S H"]  # cross entropy in nats, without label smoothing and z-loss
    live: Bool[Tensor, "B S H"]  # the row has a target
    lse: Float[Tensor, "B S H"]  # log of the sum of exp of the logits
    top1: Int[Tensor, "B S H"]  # argmax over the vocabulary, int32


class MTPLoss(NamedTuple):
    """A loss with its statistics."""

    loss: Float[Tensor, "*reduced"]
    stats: MTPStats


class _Options(TypedDict, total=False):
    shift: int
    weight_alignment: str
    head_reduction: str
    head_weights: Tensor | None
    ignore_index: int
    reduction: str
    loss_scale: float
    softcap: float | None
    z_loss: float
    label_smoothing: float
    inplace_backward: bool
    validate: bool
    impl: str


class _Call(_Options, total=False):
    seq_lens: Tensor | None
    document_ids: Tensor | None
    normalizer: float | Tensor | None


@overload
def weighted_mtp_ce(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    token_weights: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[_Call],
) -> MTPLoss: ...


@overload
def weighted_mtp_ce(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    token_weights: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[_Call],
) -> Tensor: ...


def weighted_mtp_ce(
    logits: Float[Tensor, "B S H V"] | Sequence[Float[Tensor, "B S V"]],
    labels: Int[Tensor, "B S"],
    token_weights: Float[Tensor, "B S"] | Float[Tensor, "B S H"] | None = None,
    *,
    shift: int = 1,
    weight_alignment: str = "position",
    head_reduction: str = "live",
    head_weights: Float[Tensor, " H"] | None = None,
    seq_lens: Int[Tensor, " B"] | None = None,
    document_ids: Int[Tensor, "B S"] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Float[Tensor, ""] | None = None,
    loss_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    inplace_backward: bool = False,
    validate: bool = False,
    return_stats: bool = False,
    impl: str = "auto",
) -> Tensor | MTPLoss:
    """Weighted cross entropy of H heads that predict the next H tokens, fused.

        target(t,h) = t + shift + h
        live(b,t,h) = target < seq_lens[b], labels[b,target] != ignore_index, same document as t
        ce(b,t,h)   = logsumexp_v logits[b,t,h,v] - logits[b,t,h,labels[b,target]]            nats
        loss        = loss_scale / N * sum_{b,t} w[b,t] * mean_{h live} ce(b,t,h)

    N is the number of positions with a live head. Neither the probabilities nor shifted copies are ever built; a row
    that is not live, or of weight 0, is not read.

    Args:
        logits: [B, S, H, V], or H tensors [B, S, V], or [B, S, V] for H = 1; any strides; float32, bfloat16, float16
            (float64 with impl "cpu" and "reference"). Head h predicts the token at t + shift + h.
        labels: [B, S] integers; with shift=1 the unshifted `input_ids`, as in transformers.
        token_weights: [B, S] or [B, S, H], any float dtype; None means ones. Differentiable.
        shift: 1: head 0 is the next-token head; 0: labels are shifted already; 2: extra heads only.
        weight_alignment: "position": all heads at t use w[b,t]. "target": head h uses the weight of the token that
            it predicts, w[b,target]. For [B, S] weights.
        head_reduction: "live": divide by the number of live heads. "horizon": divide by H.
        head_weights: [H] constants a: the mean over heads becomes sum a ce / sum a over live heads.
        seq_lens: [B] integers: tokens from seq_lens[b] on are padding.
        document_ids: [B, S] integers: a head never predicts a token of another document.
        ignore_index: label of tokens that are no target.
        reduction: "mean"; "sum" (N = 1); "none": [B, S], loss_scale * w * mean over heads.
        normalizer: replaces N in "mean": a number, or a 0-d tensor on the logits' device. A global count here makes
            micro-batches and ranks add up to the loss of the whole batch. (Under torch.compile give a tensor: a number
            is a constant, and each new one compiles again.)
        loss_scale: factor on the loss.
        softcap: c > 0: logits become c * tanh(logits / c).
        z_loss: factor >= 0 of logsumexp**2, added to every row.
        label_smoothing: e in [0, 1): (1 - e) of the target's logit and e of the mean logit.
        inplace_backward: the gradient overwrites the logits, which are then unusable; saves B*S*H*V elements.
        validate: also check values (label range, lengths, finite weights); synchronises with a GPU.
        return_stats: also return `MTPStats`.
        impl: "auto" (Triton on a GPU, blocked on a CPU), "triton", "cpu", or "reference" (slow, eager).

    Returns:
        The loss, [] or [B, S] for "none", float32 (float64 for float64 logits); or `MTPLoss(loss, stats)`. Exactly 0,
        and connected to the graph, where no row is live.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or value, before anything is computed.
        IndexError: on a CPU, or with `validate`, a live label outside [0, V). On a GPU such a row's loss is NaN.

    Example:
        >>> import torch
        >>> from mtp_ce import weighted_mtp_ce
        >>> logits = torch.zeros(2, 8, 4, 100, requires_grad=True)  # [B, S, H, V]
        >>> input_ids = torch.arange(16).view(2, 8)
        >>> loss = weighted_mtp_ce(logits, input_ids, torch.ones(2, 8))
        >>> round(loss.item(), 4)  # ln 100
        4.6052

    Source:
        Multi-token prediction: arXiv:2404.19737. Token weights: arXiv:2404.07965. Online softmax: arXiv:1805.02867.
    """
    given, heads, shape = _check_logits(logits)
    _check_options(
        shift=shift, weight_alignment=weight_alignment, head_reduction=head_reduction, head_weights=head_weights,
        ignore_index=ignore_index, reduction=reduction, loss_scale=loss_scale, softcap=softcap, z_loss=z_loss,
        label_smoothing=label_smoothing, inplace_backward=inplace_backward, validate=validate,
        return_stats=return_stats, impl=impl,
    )  # fmt: skip
    _check_tensors(given[0], shape, labels, token_weights, weight_alignment, head_weights, seq_lens, document_ids)
    _check_normalizer(normalizer, reduction, given[0].device)
    impl = _choose(impl, given[0])
    if inplace_backward:
        _check_inplace(given, impl)
    if validate:
        _check_values(
            labels,
            token_weights,
            head_weights,
            seq_lens,
            document_ids,
            normalizer,
            shape,
            shift,
            ignore_index,
        )

    if impl == "reference":
        if labels.device.type == "cpu" and labels.numel():
            cpu.check_labels(
                labels, seq_lens, document_ids, H=shape[2], V=shape[3], shift=shift, ignore_index=ignore_index
            )
        loss, ce, live, lse, top1 = reference_weighted_mtp_ce(
            heads, labels, token_weights,
            shift=shift, weight_alignment=weight_alignment, head_reduction=head_reduction, head_weights=head_weights,
            seq_lens=seq_lens, document_ids=document_ids, ignore_index=ignore_index, reduction=reduction,
            normalizer=normalizer, loss_scale=loss_scale, softcap=softcap, z_loss=z_loss,
            label_smoothing=label_smoothing,
        )  # fmt: skip
        return MTPLoss(loss, MTPStats(ce, live, lse, top1)) if return_stats else loss

    scale, by = loss_scale, normalizer
    if isinstance(by, numbers.Real):
        scale, by, reduction = loss_scale / float(by), None, "sum"
    loss, ce, row_max, log_sum, live, top1, _, _ = logits_forward(
        given, labels, token_weights, head_weights, seq_lens, document_ids, by,
        shift, head_reduction == "horizon", weight_alignment == "target", ignore_index,
        None if softcap is None else float(softcap), float(z_loss), float(label_smoothing),
        reduction, float(scale), return_stats,
        token_weights is not None and token_weights.requires_grad and torch.is_grad_enabled(),
        inplace_backward, impl,
    )  # fmt: skip
    if not return_stats:
        return loss
    return MTPLoss(loss, MTPStats(ce.detach(), live, row_max.detach() + log_sum.detach(), top1))


class WeightedMTPLoss(nn.Module):
    """`weighted_mtp_ce` with its options held: called with (logits, labels, token_weights, ...).

    Args:
        return_stats: return `MTPLoss(loss, stats)` instead of the loss.
        **options: the options of `weighted_mtp_ce`, checked here; `head_weights` becomes a buffer that moves with
            the module.

    Raises:
        TypeError, ValueError: an option that does not exist, of the wrong type or value.

    Example:
        >>> import torch
        >>> from mtp_ce import WeightedMTPLoss
        >>> loss_fn = WeightedMTPLoss(softcap=30.0, z_loss=1e-4)
        >>> loss_fn(torch.zeros(1, 4, 2, 10), torch.tensor([[1, 2, 3, 4]])).ndim
        0
    """

    head_weights: Tensor | None

    def __init__(self, *, return_stats: bool = False, **options: Unpack[_Options]) -> None:
        super().__init__()
        unknown = set(options) - set(_Options.__annotations__)
        if unknown:
            raise TypeError(
                f"{min(unknown)} is no option of WeightedMTPLoss; expected {sorted(_Options.__annotations__)}"
            )
        _check_options(return_stats=return_stats, **options)
        self.return_stats = return_stats
        self.register_buffer("head_weights", options.pop("head_weights", None))
        self.options = options

    def forward(
        self,
        logits: Float[Tensor, "B S H V"] | Sequence[Float[Tensor, "B S V"]],
        labels: Int[Tensor, "B S"],
        token_weights: Float[Tensor, "B S"] | Float[Tensor, "B S H"] | None = None,
        *,
        seq_lens: Int[Tensor, " B"] | None = None,
        document_ids: Int[Tensor, "B S"] | None = None,
        normalizer: float | Float[Tensor, ""] | None = None,
    ) -> Tensor | MTPLoss:
        """The loss of one batch; arguments as in `weighted_mtp_ce`."""
        call: _Call = {
            **self.options,
            "seq_lens": seq_lens,
            "document_ids": document_ids,
            "normalizer": normalizer,
        }
        call["head_weights"] = self.head_weights
        if self.return_stats:
            return weighted_mtp_ce(logits, labels, token_weights, return_stats=True, **call)
        return weighted_mtp_ce(logits, labels, token_weights, **call)

    def extra_repr(self) -> str:
        """The options, as they were given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; expected a torch.Tensor.")
    # Told by its attributes: importing DTensor costs seconds that most callers never need.
    if hasattr(value, "device_mesh") and hasattr(value, "placements"):
        raise TypeError(
            f"{name} is a DTensor; expected a plain tensor. Call the loss inside the sharded module's forward, or "
            f"pass {name}.to_local() (a shard by batch) or {name}.full_tensor()."
        )


def _check_logits(logits: Any) -> tuple[list[Tensor], list[Tensor], tuple[int, int, int, int]]:
    """Logits as the operator takes them, its H heads [B,S,V], and (B, S, H, V)."""
    if isinstance(logits, Tensor):
        _require_tensor("logits", logits)
        if logits.dim() not in (3, 4):
            raise ValueError(f"logits is {_shape(logits)}; expected [B, S, H, V], [B, S, V], or H tensors [B, S, V].")
        given = [logits]
        heads = list(logits.unbind(2)) if logits.dim() == 4 else given
    elif isinstance(logits, Sequence) and not isinstance(logits, str):
        given = heads = list(logits)
        for h, head in enumerate(heads):
            _require_tensor(f"logits[{h}]", head)
            if head.dim() != 3:
                raise ValueError(f"logits[{h}] is {_shape(head)}; expected [B, S, V], one tensor a head.")
            if head.shape != heads[0].shape or head.dtype != heads[0].dtype or head.device != heads[0].device:
                raise ValueError(
                    f"logits[{h}] is {_shape(head)} {head.dtype} on {head.device}; expected "
                    f"{_shape(heads[0])} {heads[0].dtype} on {heads[0].device}, as logits[0]."
                )
    else:
        raise TypeError(f"logits is {type(logits).__name__}; expected a torch.Tensor or a sequence of them.")
    if not heads:
        raise ValueError("logits has H = 0 heads; expected at least one.")
    if heads[0].dtype not in (*TRITON_DTYPES, torch.float64):
        raise TypeError(f"logits is {heads[0].dtype}; expected float32, bfloat16, float16 or float64.")
    B, S, V = heads[0].shape
    if V == 0:
        raise ValueError(f"logits is {_shape(given[0])}: V = 0; expected at least one vocabulary entry.")
    return given, heads, (B, S, len(heads), V)


def _check_options(
    *,
    shift: int = 1,
    weight_alignment: str = "position",
    head_reduction: str = "live",
    head_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    loss_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    inplace_backward: bool = False,
    validate: bool = False,
    return_stats: bool = False,
    impl: str = "auto",
) -> None:
    chosen = {
        "weight_alignment": weight_alignment,
        "head_reduction": head_reduction,
        "reduction": reduction,
        "impl": impl,
    }
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, CHOICES[name]))}.")
    for name, integer in (("shift", shift), ("ignore_index", ignore_index)):
        if isinstance(integer, bool) or not isinstance(integer, int):
            raise TypeError(f"{name} is {type(integer).__name__}; expected an int.")
    flags = {"inplace_backward": inplace_backward, "validate": validate, "return_stats": return_stats}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is {type(flag).__name__}; expected a bool.")
    numbers_given = {"loss_scale": loss_scale, "z_loss": z_loss, "label_smoothing": label_smoothing}
    if softcap is not None:
        numbers_given["softcap"] = softcap
    for name, number in numbers_given.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name} is {type(number).__name__}; expected a float.")
        # Not math.isfinite: torch.compile traces comparisons of a float that changes between calls.
        if not -math.inf < number < math.inf:
            raise ValueError(f"{name} is {number}; expected a finite number.")
    if shift < 0:
        raise ValueError(f"shift is {shift}; expected 0 (labels shifted already), 1 (as in transformers) or more.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}; expected a number above 0, or None for no cap.")
    if z_loss < 0:
        raise ValueError(f"z_loss is {z_loss}; expected a factor of at least 0.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected a share in [0, 1).")
    if head_weights is not None:
        _require_tensor("head_weights", head_weights)
        if head_weights.dim() != 1:
            raise ValueError(f"head_weights is {_shape(head_weights)}; expected [H].")
        if not head_weights.is_floating_point():
            raise TypeError(f"head_weights is {head_weights.dtype}; expected a floating dtype.")
        if head_weights.requires_grad:
            raise ValueError("head_weights requires a gradient; they are constants here: pass head_weights.detach().")
        if head_reduction == "horizon":
            raise ValueError(
                "head_reduction is 'horizon' and head_weights is given; expected one of them: weights divide by their "
                "own sum over live heads."
            )


def _check_tensors(
    first: Tensor,
    shape: tuple[int, int, int, int],
    labels: Any,
    token_weights: Any,
    weight_alignment: str,
    head_weights: Tensor | None,
    seq_lens: Any,
    document_ids: Any,
) -> None:
    B, S, H, _ = shape
    integers = {"labels": (labels, [B, S]), "seq_lens": (seq_lens, [B]), "document_ids": (document_ids, [B, S])}
    for name, (tensor, wanted) in integers.items():
        if tensor is None and name != "labels":
            continue
        _require_tensor(name, tensor)
        if tensor.dtype not in INTEGERS:
            raise TypeError(f"{name} is {tensor.dtype}; expected an integer dtype, such as torch.int64.")
        if _shape(tensor) != wanted:
            # Words are made here only: a size in an f-string would pin it under torch.compile.
            letters = "[B, S]" if len(wanted) == 2 else "[B]"
            raise ValueError(f"{name} is {_shape(tensor)}; expected {letters} = {wanted} from logits.")
    if token_weights is not None:
        _require_tensor("token_weights", token_weights)
        if not token_weights.is_floating_point():
            raise TypeError(f"token_weights is {token_weights.dtype}; expected a floating dtype.")
        if _shape(token_weights) not in ([B, S], [B, S, H]):
            raise ValueError(
                f"token_weights is {_shape(token_weights)}; expected [B, S] = [{B}, {S}] or "
                f"[B, S, H] = [{B}, {S}, {H}] from logits."
            )
        if token_weights.dim() == 3 and weight_alignment == "target":
            raise ValueError(
                f"weight_alignment is 'target' and token_weights is {_shape(token_weights)}; expected [B, S], or "
                "weight_alignment='position': weights of one row each need no alignment."
            )
    if head_weights is not None and _shape(head_weights) != [H]:
        raise ValueError(f"head_weights is {_shape(head_weights)}; expected [H] = [{H}] from logits.")
    named = {
        "labels": labels,
        "token_weights": token_weights,
        "head_weights": head_weights,
        "seq_lens": seq_lens,
        "document_ids": document_ids,
    }
    for name, tensor in named.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {first.device}, where logits is.")


def _check_normalizer(normalizer: Any, reduction: str, device: torch.device) -> None:
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f"normalizer is given with reduction={reduction!r}; expected reduction='mean'.")
    if isinstance(normalizer, Tensor):
        _require_tensor("normalizer", normalizer)
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer is {_shape(normalizer)}; expected a 0-d tensor or a number.")
        if normalizer.requires_grad:
            raise ValueError("normalizer requires a gradient; it is a constant here: pass normalizer.detach().")
        if normalizer.device != device:
            raise ValueError(f"normalizer is on {normalizer.device}; expected {device}, where logits is, or a number.")
    elif isinstance(normalizer, bool) or not isinstance(normalizer, (int, float)):
        raise TypeError(f"normalizer is {type(normalizer).__name__}; expected a number or a 0-d tensor.")
    elif not 0 < normalizer < math.inf:
        raise ValueError(f"normalizer is {normalizer}; expected a finite number above 0.")


@torch.compiler.assume_constant_result
def _triton_missing(device_type: str) -> str | None:
    """Why Triton cannot run on tensors of this device; None where it can."""
    try:
        from triton.runtime.interpreter import InterpretedFunction

        from mtp_ce.kernels.forward import forward_kernel
    except ImportError as error:
        return f"triton is not importable ({error}); install it, or use impl='reference'."
    if device_type == "cuda" or isinstance(forward_kernel, InterpretedFunction):
        return None
    return (
        f"logits is on {device_type}; expected a GPU, or TRITON_INTERPRET=1 in the environment before triton is "
        "imported. Use impl='auto' or 'cpu' here."
    )


def _choose(impl: str, first: Tensor) -> str:
    """The implementation that runs, or ValueError where it cannot."""
    kind = first.device.type
    if impl == "auto":
        impl = "cpu" if kind == "cpu" else "triton"
    if impl == "cpu" and kind != "cpu":
        raise ValueError(f"impl is 'cpu' and logits is on {kind}; expected CPU tensors, or impl='auto'.")
    if impl == "triton":
        missing = _triton_missing(kind)
        if missing is not None:
            raise ValueError(f"impl is 'triton': {missing}")
        if first.dtype not in TRITON_DTYPES:
            raise TypeError(
                f"logits is {first.dtype}; expected float32, bfloat16 or float16 for Triton. Use impl='reference'."
            )
    return impl


def _check_inplace(given: list[Tensor], impl: str) -> None:
    if impl == "reference":
        raise ValueError("inplace_backward is True; expected False with impl='reference', which has no such path.")
    for x in given:
        leaf = x._base if x._base is not None else x
        if leaf.is_leaf and leaf.requires_grad:
            raise ValueError(
                "inplace_backward is True and logits is a leaf that requires a gradient, or a view of one; expected "
                "the output of a layer: the leaf's own values would be overwritten."
            )
        if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
            raise ValueError("inplace_backward is True and logits is expanded; expected memory of its own.")
    # Under torch.compile tensors have no addresses, and each graph input is known to be separate.
    if not torch.compiler.is_compiling() and _overlap(given):
        raise ValueError("inplace_backward is True and two heads of logits share memory; expected separate memory.")


def _overlap(heads: list[Tensor]) -> bool:
    """Two heads of one shape share memory; where their strides differ this errs towards yes."""
    return any(not _apart(head, other) for i, head in enumerate(heads) for other in heads[:i])


def _apart(head: Tensor, other: Tensor) -> bool:
    distance = abs(head.data_ptr() - other.data_ptr()) // head.element_size()
    steps = sorted((step, n) for step, n in zip(head.stride(), head.shape, strict=True) if n > 1)
    extent = 1  # elements that the dimensions of smaller steps span
    for step, n in steps:
        # One head lies in the gaps that the other's steps leave, as heads of one tensor do.
        if head.stride() == other.stride() and extent <= distance % step <= step - extent:
            return True
        extent += (n - 1) * step
    return distance >= extent


def _check_values(
    labels: Tensor,
    token_weights: Tensor | None,
    head_weights: Tensor | None,
    seq_lens: Tensor | None,
    document_ids: Tensor | None,
    normalizer: float | Tensor | None,
    shape: tuple[int, int, int, int],
    shift: int,
    ignore_index: int,
) -> None:
    """What only a look at the values can tell; synchronises."""
    _, S, H, V = shape
    if seq_lens is not None and bool(((seq_lens < 0) | (seq_lens > S)).any()):
        b = int(((seq_lens < 0) | (seq_lens > S)).nonzero()[0])
        raise ValueError(f"seq_lens[{b}] is {int(seq_lens[b])}; expected a length in [0, S] = [0, {S}].")
    for name, values in (("token_weights", token_weights), ("head_weights", head_weights)):
        if values is not None and not bool(values.isfinite().all()):
            place = (~values.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{name}{place} is {float(values[tuple(place)])}; expected finite values.")
    if isinstance(normalizer, Tensor) and not bool(normalizer > 0):
        raise ValueError(f"normalizer is {normalizer.item()}; expected a number above 0.")
    if labels.numel():
        cpu.check_labels(labels, seq_lens, document_ids, H=H, V=V, shift=shift, ignore_index=ignore_index)
