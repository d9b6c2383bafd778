"""Masked rows: never read, gradient exactly 0, whatever lies in their memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_ce import weighted_mtp_ce, weighted_mtp_linear_ce

B, S, H, V = 2, 6, 3, 45


def _ignored(labels: Tensor) -> dict[str, Any]:
    labels[0, 2:4] = labels[1, 0] = labels[1, 5] = -100
    return {}


def _lengths(labels: Tensor) -> dict[str, Any]:
    return {"seq_lens": torch.tensor([4, 1], device=labels.device)}


def _documents(labels: Tensor) -> dict[str, Any]:
    return {"document_ids": torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 0, 0]], device=labels.device)}


def _zero_weights(labels: Tensor) -> dict[str, Any]:
    return {"token_weights": torch.tensor([[1, 0, 2, -0.0, 3, 1], [0, 0, 0, 1, 1, 0.5]], device=labels.device)}


def _zero_target_weights(labels: Tensor) -> dict[str, Any]:
    return _zero_weights(labels) | {"weight_alignment": "target"}


def _zero_row_weights(labels: Tensor) -> dict[str, Any]:
    pattern = torch.arange(B * S * H, device=labels.device).view(B, S, H) % 3
    return {"token_weights": pattern.to(torch.bfloat16)}


def _zero_head_weights(labels: Tensor) -> dict[str, Any]:
    return {"head_weights": torch.tensor([1.0, 0.0, 2.0], device=labels.device)}


REASONS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "labels_ignored": _ignored,
    "beyond_sequence": lambda labels: {"shift": 3},
    "beyond_length": _lengths,
    "other_document": _documents,
    "zero_weight": _zero_weights,
    "zero_target_weight": _zero_target_weights,
    "zero_row_weight": _zero_row_weights,
    "zero_head_weight": _zero_head_weights,
}


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("reason", REASONS)
def test_masked_rows_are_never_read(impl, draw, reason: str) -> None:
    """NaN and Inf planted in every masked row reach neither loss nor gradients nor statistics, not by one bit."""
    labels, logits = draw.integers(V, B, S), draw.normal(B, S, H, V)
    options = REASONS[reason](labels)
    _, stats = weighted_mtp_ce(logits, labels, impl="reference", return_stats=True, **options)
    dead = stats.top1 < 0
    assert int(dead.sum()) >= 3
    assert not bool(dead.all())

    # Masked rows take the three in turn.
    poison = torch.tensor([torch.nan, torch.inf, -torch.inf], device=logits.device)[dead.flatten().cumsum(0) % 3]
    results = []
    for planted in (torch.zeros(B, S, H, 1, device=logits.device), poison.view(B, S, H, 1)):
        leaf = torch.where(dead[..., None], planted, logits).requires_grad_()
        loss, stats = weighted_mtp_ce(
            leaf, labels, softcap=9.0, z_loss=0.1, label_smoothing=0.1, impl=impl, return_stats=True, **options
        )
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert bool((gradient[dead] == 0).all())
        assert bool((gradient[~dead] != 0).any())
        assert bool((stats.ce[dead] == 0).all())
        assert bool((stats.lse[dead] == 0).all())
        assert bool((stats.top1[dead] == -1).all())
        results.append((loss.detach(), gradient, *stats))
    for clean, *poisoned in zip(*results, strict=True):
        assert all(torch.equal(clean, x) for x in poisoned)


D = 9


@pytest.mark.pairwise
@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize(("drop", "poison"), [(True, torch.nan), (False, torch.inf), (B * S * H, torch.nan)])
def test_hidden_states_of_masked_rows_reach_no_result(impl, draw, reason: str, drop: bool | int, poison: float) -> None:
    """Left out or not: no bit of the loss, of any gradient, of the statistics."""
    labels, hidden, unembed, bias = draw.integers(V, B, S), draw.normal(B, S, H, D), draw.normal(V, D), draw.normal(V)
    options = REASONS[reason](labels)
    _, stats = weighted_mtp_linear_ce(hidden, unembed, labels, impl="reference", return_stats=True, **options)
    dead = stats.top1 < 0
    assert bool(dead.any())
    assert not bool(dead.all())

    results = []
    for planted in (0.0, poison):
        leaf = torch.where(dead[..., None], planted, hidden).requires_grad_()
        leaves = (leaf, unembed.requires_grad_(), bias.requires_grad_())
        loss, stats = weighted_mtp_linear_ce(
            leaf, unembed, labels, bias=bias, softcap=9.0, z_loss=0.1, label_smoothing=0.1, drop_dead_rows=drop,
            impl=impl, return_stats=True, **options,
        )  # fmt: skip
        gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
        again = torch.autograd.grad(loss, leaves) if drop is False else ()  # computed anew
        assert bool((gradients[0][dead] == 0).all())
        assert bool((gradients[0][~dead] != 0).any())
        assert bool((stats.ce[dead] == 0).all())
        assert bool((stats.lse[dead] == 0).all())
        assert bool((stats.top1[dead] == -1).all())
        results.append((loss.detach(), *gradients, *again, *stats))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.pairwise
@pytest.mark.parametrize("reason", ["zero_weight", "zero_target_weight", "zero_row_weight"])
@pytest.mark.parametrize(
    ("path", "drop"), [("logits", None), ("linear", True), ("linear", False), ("linear", B * S * H)]
)
def test_a_row_that_is_read_for_its_weight_alone_changes_no_other_row(impl, draw, reason: str, drop, path: str) -> None:
    """Where weights of 0 want a gradient, NaN in their rows is in that gradient, and nowhere else."""
    labels, hidden, unembed = draw.integers(V, B, S), draw.normal(B, S, H, D), draw.normal(V, D)
    options = REASONS[reason](labels)
    weights = options.pop("token_weights").float()
    _, stats = weighted_mtp_linear_ce(hidden, unembed, labels, weights, impl="reference", return_stats=True, **options)
    unweighted = stats.live & (stats.top1 < 0)
    assert bool(unweighted.any())
    results = []
    for planted in (0.0, torch.nan):
        x = torch.where(unweighted[..., None], planted, hidden).requires_grad_()
        u, w = unembed.clone().requires_grad_(), weights.clone().requires_grad_()
        if path == "linear":
            loss = weighted_mtp_linear_ce(x, u, labels, w, drop_dead_rows=drop, impl=impl, **options)
            leaves = [x, u, w]
        else:
            logits = (x @ u.T).detach().requires_grad_()
            loss = weighted_mtp_ce(logits, labels, w, impl=impl, **options)
            leaves = [logits, w]
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    (*clean, d_clean), (*poisoned, d_poisoned) = results
    for one, other in zip(clean, poisoned, strict=True):
        assert torch.equal(one, other)
    assert bool((d_poisoned.isnan() <= (weights == 0)).all())
    assert bool(d_poisoned.isnan().any())
    kept = ~d_poisoned.isnan()
    assert torch.equal(d_clean[kept], d_poisoned[kept])


@pytest.mark.pairwise
@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("path", ["logits", "linear"])
def test_an_infinite_upstream_of_a_masked_row_reaches_no_result(impl, draw, reason: str, path: str) -> None:
    """The square root of losses, for one: its slope at the 0 of a position without a valid row is infinite."""
    labels, hidden, unembed = draw.integers(V, B, S), draw.normal(B, S, H, D), draw.normal(V, D)
    options = REASONS[reason](labels)
    weights = options.pop("token_weights", draw.uniform(B, S)).float()

    def gradients(impl: str) -> tuple[Tensor, ...]:
        x, u, w = (value.clone().requires_grad_() for value in (hidden, unembed, weights))
        if path == "linear":
            losses = weighted_mtp_linear_ce(x, u, labels, w, reduction="none", impl=impl, **options)
        else:
            losses = weighted_mtp_ce(x @ u.T, labels, w, reduction="none", impl=impl, **options)
        assert bool((losses == 0).any())
        return torch.autograd.grad(losses.sqrt().sum(), (x, u, w))

    *ours, d_weights = gradients(impl)
    *expected, _ = gradients("reference")
    for gradient, true in zip(ours, expected, strict=True):
        assert bool(gradient.isfinite().all())
        torch.testing.assert_close(gradient, true)
    # A weight of 0 has a slope even so, which the square root makes infinite.
    assert bool(d_weights[weights != 0].isfinite().all())


@pytest.mark.parametrize("reason", REASONS)
def test_masked_rows_are_overwritten_with_zeros_in_place(impl, draw, reason: str) -> None:
    """NaN there must not survive as a gradient."""
    labels = draw.integers(V, B, S)
    options = REASONS[reason](labels)
    logits = draw.normal(B, S, H, V)
    _, stats = weighted_mtp_ce(logits, labels, impl="reference", return_stats=True, **options)
    dead = stats.top1 < 0
    layer = torch.zeros((), device=logits.device, requires_grad=True)
    output = torch.where(dead[..., None], torch.nan, logits) + layer
    weighted_mtp_ce(output, labels, inplace_backward=True, impl=impl, **options).backward()
    assert bool((output.detach()[dead] == 0).all())
    assert bool(layer.grad.isfinite())


def test_a_masked_row_does_not_need_a_label_that_is_a_class(impl, draw, device) -> None:
    """Labels behind the length, of the first `shift` tokens, or that nothing can reach, may be anything."""
    labels = draw.integers(V, 1, S)
    labels[0, 0] = V + 3  # no head predicts the first token
    labels[0, 5] = -7  # padding
    loss = weighted_mtp_ce(
        draw.normal(1, S, H, V), labels, seq_lens=torch.tensor([5], device=device), validate=True, impl=impl
    )
    assert bool(loss.isfinite())
    loss = weighted_mtp_linear_ce(
        draw.normal(1, S, H, D), draw.normal(V, D), labels, seq_lens=torch.tensor([5], device=device), validate=True,
        impl=impl,
    )  # fmt: skip
    assert bool(loss.isfinite())


def test_an_ignored_label_may_be_a_class(impl, draw, device) -> None:
    """ignore_index inside [0, V): padding with token 0 is common."""
    labels, logits = draw.integers(V, 1, S, low=1), draw.normal(1, S, H, V)
    by_default = labels.clone()
    labels[0, 2:4], by_default[0, 2:4] = 0, -100
    with_class = weighted_mtp_ce(logits, labels, ignore_index=0, impl=impl)
    assert torch.equal(with_class, weighted_mtp_ce(logits, by_default, impl=impl))
    hidden, unembed = draw.normal(1, S, H, D), draw.normal(V, D)
    with_class = weighted_mtp_linear_ce(hidden, unembed, labels, ignore_index=0, impl=impl)
    assert torch.equal(with_class, weighted_mtp_linear_ce(hidden, unembed, by_default, impl=impl))
