"""The public loss on logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor, nn

from mtp_ce.checks import (
    check_flags,
    check_head_weights,
    check_inplace,
    check_inputs,
    check_logits,
    check_values,
    choose_impl,
    number_of,
    pack_terms,
)
from mtp_ce.ops.logits import LogitsCall, logits_loss, split_heads
from mtp_ce.ops.rows import check_labels
from mtp_ce.ops.shards import check_same_call
from mtp_ce.options import (
    OPTION_NAMES,
    CallOptions,
    CommonOptions,
    LossInputs,
    LossOptions,
    check_choice,
    fold_normalizer,
    read_terms,
)
from mtp_ce.reference import reference_weighted_mtp_ce
from mtp_ce.vocabulary import local_logits, whole

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class MTPStats(NamedTuple):
    """Statistics of one call, from the same read of the logits: detached, on their device, without a sync.

    A masked row (not valid, or of weight 0) has ce = lse = 0 and top1 = -1.
    """

    ce: Float[Tensor, "B S H"]  # cross entropy in nats, without label smoothing and z-loss
    live: Bool[Tensor, "B S H"]  # valid: the row has a target
    lse: Float[Tensor, "B S H"]  # logsumexp of the logits
    top1: Int[Tensor, "B S H"]  # argmax over the vocabulary, int32


class MTPLoss(NamedTuple):
    """A loss with its statistics."""

    loss: Float[Tensor, "*reduced"]
    stats: MTPStats


class _Options(CommonOptions, total=False):
    inplace_backward: bool


class _Call(CallOptions, total=False):
    inplace_backward: bool


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
    labels: Int[Tensor, "B T"],
    token_weights: Float[Tensor, "B S"] | Float[Tensor, "B S H"] | Float[Tensor, "B T"] | None = None,
    *,
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
    inplace_backward: bool = False,
    validate: bool = False,
    return_stats: bool = False,
    impl: str = "auto",
) -> Tensor | MTPLoss:
    """Weighted cross entropy of H heads that predict the next H tokens, fused.

        target(t,h) = left_halo + t + shift + h
        valid(b,t,h) = target < seq_lens[b], labels[b,target] != ignore_index, same document as t
        ce(b,t,h)    = logsumexp_v logits[b,t,h,v] - logits[b,t,h,labels[b,target]]            nats
        loss         = loss_scale / N * sum_{b,t} w[b,t] * mean_{h valid} ce(b,t,h)

    N is the number of positions with a valid head. With head_reduction="target" the mean is over the heads that predict
    the same token, and N the number of predicted tokens. Neither the probabilities nor shifted copies are ever built. A
    masked row (not valid, or of weight 0) is not read.

    Args:
        logits: [B, S, H, V], or H tensors [B, S, V], or [B, S, V] for H = 1; any strides; float32, bfloat16, float16
            (float64 with impl "cpu" and "reference"). Head h predicts the token at t + shift + h. Or DTensors
            Shard(-1), the vocabulary over the ranks of one mesh dimension.
        labels: [B, S] integers; with shift=1 the unshifted `input_ids`, as in transformers. [B, T] with T > S where
            the positions are a slice of a longer sequence: `left_halo` tokens before position 0, the tokens at the S
            positions, and a halo of tokens after them, which the last positions predict.
        token_weights: [B, S] or [B, S, H], any float dtype, or a mask of bools or integers; None means ones. With
            weight_alignment="target" [B, T], as labels. Differentiable.
        shift: 1: head 0 is the next-token head; 0: labels are already shifted; 2: extra heads only.
        left_halo: number of tokens of labels before position 0. For head_reduction="target" alone, which counts the
            heads that predict a token from there: H - 1, or as many as the sequence has.
        weight_alignment: "position": all heads at t use w[b,t]. "target": head h uses the weight of the token that
            it predicts, w[b,target]. For weights of tokens, as long as labels.
        head_reduction: "live": divide by the number of valid heads. "horizon": divide by H. "target": divide by the
            number of heads that predict the same token, so that every token counts once; N then equals the
            `num_items_in_batch` of transformers' Trainer. For masked prompts.
        head_weights: [H] constants a: the mean over heads becomes sum a ce / sum a over valid heads.
        seq_lens: [B] integers: tokens of labels from index seq_lens[b] on are padding.
        document_ids: [B, S] integers, [B, T] as labels: a head never predicts a token of another document.
        ignore_index: the label of tokens that are not targets.
        reduction: "mean"; "sum" (N = 1); "none": [B, S], loss_scale * w * mean over heads.
        normalizer: replaces N in "mean": a number, or a 0-d tensor on the logits' device. A global count here makes
            micro-batches and ranks add up to the loss of the whole batch. Under torch.compile a number that changes
            compiles again, a tensor does not, here and below.
        loss_scale: factor on the loss; a number or a constant 0-d tensor on the logits' device, like the three below.
        softcap: c > 0: logits become c * tanh(logits / c).
        z_loss: factor >= 0 of logsumexp**2, added to every row.
        label_smoothing: e in [0, 1): (1 - e) of the target's logit and e of the mean logit.
        inplace_backward: the gradient overwrites the logits, which are then unusable; saves B*S*H*V elements. Refused
            where torch cannot detect that they were saved, such as under non-reentrant checkpointing.
        validate: also check values (label range, lengths, finite weights); synchronises with a GPU.
        return_stats: also return `MTPStats`.
        impl: "auto" (Triton on a GPU, cache-sized blocks on a CPU), "triton", "cpu", or "reference" (slow, eager).

    Returns:
        The loss, [] or [B, S] for "none", float32 (float64 for float64 logits); or `MTPLoss(loss, stats)`. Exactly 0,
        and connected to the graph, where no row is valid.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or value, before anything is computed.
        IndexError: on a CPU, or with `validate`, a valid label outside [0, V). On a GPU the loss of its row is NaN.

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
    heads, shape = check_logits(logits)
    options = LossOptions(
        shift=shift, left_halo=left_halo, weight_alignment=weight_alignment, head_reduction=head_reduction,
        ignore_index=ignore_index, reduction=reduction, loss_scale=number_of(loss_scale),
        softcap=number_of(softcap), z_loss=number_of(z_loss), label_smoothing=number_of(label_smoothing),
    )  # fmt: skip
    terms = pack_terms(heads[0], loss_scale, softcap, z_loss, label_smoothing)
    inputs = LossInputs(labels, token_weights, head_weights, seq_lens, document_ids, terms, normalizer)
    check_flags(inplace_backward=inplace_backward, validate=validate, return_stats=return_stats)
    check_inputs(heads[0], shape, inputs, options)
    impl = choose_impl(impl, heads[0])
    entries, shard = local_logits(heads, inplace_backward)
    if inplace_backward:
        check_inplace(heads, entries, impl)
    if validate:
        check_values(inputs, options, shape, shard)

    if impl == "reference":
        if shard.ranks > 1:
            check_same_call([torch.Size(shape)], inputs, shard, (options, impl), wait=True)
        outcome = reference_loss(split_heads([whole(x) for x in heads]), inputs, options)
        return outcome if return_stats else outcome.loss

    inputs, options = fold_normalizer(inputs, options)
    with_d_weights = token_weights is not None and token_weights.requires_grad and torch.is_grad_enabled()
    call = LogitsCall(return_stats, with_d_weights, inplace_backward, impl)
    loss, *stats = logits_loss(entries, inputs, options, call, shard)
    if not return_stats:
        return loss
    ce, row_max, log_sum, live, top1 = stats
    return MTPLoss(loss, MTPStats(ce, live, row_max + log_sum, top1))


def reference_loss(heads: list[Tensor], inputs: LossInputs, options: LossOptions) -> MTPLoss:
    """Return the oracle's loss of H heads [B,S,V]; a broken label raises as in the other implementations."""
    B, S, V = heads[0].shape
    if inputs.labels.device.type == "cpu" and B * S:
        check_labels(inputs, options, S, len(heads), V)
    inputs, options = read_terms(inputs, options)
    loss, ce, live, lse, top1 = reference_weighted_mtp_ce(heads, **inputs.arguments(), **vars(options))
    return MTPLoss(loss, MTPStats(ce, live, lse, top1))


class WeightedMTPLoss(nn.Module):
    """`weighted_mtp_ce` as a module that stores the options; called with (logits, labels, token_weights, ...).

    Args:
        return_stats: return `MTPLoss(loss, stats)` instead of the loss.
        **options: the options of `weighted_mtp_ce`, checked here; `head_weights` becomes a buffer that moves with
            the module.

    Raises:
        TypeError, ValueError: an unknown option, or one of the wrong type or value.

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
        unknown = set(options) - _Options.__optional_keys__
        if unknown:
            raise TypeError(
                f"{min(unknown)} is no option of WeightedMTPLoss; expected {sorted(_Options.__optional_keys__)}"
            )
        named: dict[str, Any] = {**options}
        loss_options = LossOptions(**{name: number_of(named[name]) for name in OPTION_NAMES if name in named})
        check_head_weights(options.get("head_weights"), loss_options)
        flags = {name: named[name] for name in ("inplace_backward", "validate") if name in named}
        check_flags(return_stats=return_stats, **flags)
        check_choice("impl", options.get("impl", "auto"))
        self.return_stats = return_stats
        self.register_buffer("head_weights", options.pop("head_weights", None))
        self.options = options

    def forward(
        self,
        logits: Float[Tensor, "B S H V"] | Sequence[Float[Tensor, "B S V"]],
        labels: Int[Tensor, "B T"],
        token_weights: Float[Tensor, "B S"] | Float[Tensor, "B S H"] | Float[Tensor, "B T"] | None = None,
        *,
        seq_lens: Int[Tensor, " B"] | None = None,
        document_ids: Int[Tensor, "B T"] | None = None,
        normalizer: float | Float[Tensor, ""] | None = None,
    ) -> Tensor | MTPLoss:
        """Return the loss of one batch; arguments as in `weighted_mtp_ce`."""
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
        """Return the options, as they were passed."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
