"""A live label outside [0, V): an error on a CPU, NaN on a GPU, an illegal read nowhere."""

import re

import pytest
import torch
from torch import Tensor

from mtp_ce import token_ce, weighted_mtp_ce, weighted_mtp_linear_ce
from mtp_ce.options import LossInputs, LossOptions

V = 23
OUTSIDE = [V, V + 1000, -1, -101, 2**31 - 1, 2**40]


def batch(draw, label: int) -> tuple[Tensor, Tensor]:
    """Two sequences, the label at [1, 2]."""
    labels = draw.integers(V, 2, 5)
    labels[1, 2] = label
    return draw.normal(2, 5, 2, V), labels


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("label", OUTSIDE)
def test_on_a_cpu_the_error_names_the_index(impl, device, draw, label: int) -> None:
    """Which label, where, what was expected; GPU tensors say the same under validate=True."""
    message = f"labels[1, 2] is {label}; expected ignore_index (-100) or a class in [0, V) = [0, {V})"
    with pytest.raises(IndexError, match=re.escape(message)):
        weighted_mtp_ce(*batch(draw, label), impl=impl, validate=device.type != "cpu")


@pytest.mark.pairwise
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("function", [weighted_mtp_linear_ce, token_ce])
@pytest.mark.parametrize("label", OUTSIDE)
def test_on_hidden_states_the_error_is_the_same(impl, device, draw, function, label: int) -> None:
    """Before any product."""
    _, labels = batch(draw, label)
    hidden, unembed = draw.normal(2, 5, 2, 3), draw.normal(V, 3)
    message = f"labels[1, 2] is {label}; expected ignore_index (-100) or a class in [0, V) = [0, {V})"
    with pytest.raises(IndexError, match=re.escape(message)):
        function(hidden, unembed, labels, impl=impl, validate=device.type != "cpu")


@pytest.mark.parametrize("impl", ["triton"])  # a CPU always looks
@pytest.mark.parametrize("label", [V, -1, 2**40])
@pytest.mark.parametrize(("reduction", "drop"), [("mean", False), ("none", True), ("none", 25)])
def test_without_validation_its_rows_on_hidden_states_are_nan(
    impl, draw, monkeypatch, label: int, reduction: str, drop: bool | int
) -> None:
    """As on a GPU, which is not asked: here the check is taken away. NaN in loss and gradient, no illegal read."""
    monkeypatch.setattr("mtp_ce.ops.linear.check_labels", lambda *_, **__: None)
    _, labels = batch(draw, label)
    hidden, unembed = draw.normal(2, 5, 2, 3).requires_grad_(), draw.normal(V, 3).requires_grad_()
    loss, stats = weighted_mtp_linear_ce(
        hidden, unembed, labels, drop_dead_rows=drop, reduction=reduction, impl=impl, return_stats=True
    )
    broken = torch.zeros(2, 5, 2, dtype=torch.bool, device=labels.device)
    broken[1, 1, 0] = broken[1, 0, 1] = True
    assert torch.equal(loss.isnan(), broken.any(-1) if reduction == "none" else broken.any())
    assert torch.equal(stats.ce.isnan(), broken)
    d_hidden, d_unembed = torch.autograd.grad(loss.sum(), (hidden, unembed))
    if reduction == "none":
        assert torch.equal(d_hidden.isnan().all(-1), broken)
        assert torch.equal(d_hidden.isnan().any(-1), broken)
    assert bool(d_hidden.isnan().any())
    assert bool(d_unembed.isnan().any())


def run_kernels(logits: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, ce, d_row_weights and d_logits of the launchers, past the CPU's check of labels."""
    from mtp_ce.kernels.backward import launch_backward
    from mtp_ce.kernels.forward import launch_forward

    options, inputs = LossOptions(z_loss=0.1, label_smoothing=0.1), LossInputs(labels, weights)
    heads, d_logits = list(logits.unbind(2)), torch.empty_like(logits)
    results = launch_forward(heads, inputs, options, with_top1=True, with_d_weights=weights is not None)
    upstream, factor = torch.ones_like(results.out), torch.ones((), device=logits.device)
    launch_backward(
        upstream, heads, list(d_logits.unbind(2)), inputs, options, results.row_max, results.log_sum, factor
    )
    d_row_weights = results.ce if results.d_row_weights is None else results.d_row_weights
    return results.out, results.ce, d_row_weights, d_logits


@pytest.mark.parametrize("impl", ["triton"])
@pytest.mark.parametrize("label", OUTSIDE)
@pytest.mark.parametrize("weighted", [False, True])
def test_in_the_kernels_its_rows_are_nan_and_no_other(impl, draw, label: int, weighted: bool) -> None:
    """Rows (1, 1, 0) and (1, 0, 1) aim at [1, 2]: their loss and gradient are NaN, so that no step is taken on them."""
    logits, labels = batch(draw, label)
    out, ce, d_row_weights, d_logits = run_kernels(logits, labels, draw.uniform(2, 5) if weighted else None)
    wanted = torch.zeros(2, 5, 2, dtype=torch.bool, device=logits.device)
    wanted[1, 1, 0] = wanted[1, 0, 1] = True
    assert torch.equal(ce.isnan(), wanted)
    assert torch.equal(d_row_weights.isnan(), wanted)
    assert torch.equal(out.isnan(), wanted.any(-1))
    assert torch.equal(d_logits.isnan().all(-1), wanted)
    assert torch.equal(d_logits.isnan().any(-1), wanted)


@pytest.mark.parametrize("impl", ["triton"])
def test_in_the_kernels_a_weight_of_zero_excuses_a_broken_label(impl, draw) -> None:
    """The row is dead; only the gradient of its weight would tell."""
    logits, labels = batch(draw, V)
    weights = draw.uniform(2, 5)
    weights[1, :2] = 0.0
    out, _, d_row_weights, d_logits = run_kernels(logits, labels, weights)
    assert bool(out.isfinite().all())
    assert bool(d_logits.isfinite().all())
    assert d_row_weights.isnan().nonzero().tolist() == [[1, 0, 1], [1, 1, 0]]


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton"])
@pytest.mark.parametrize("label", OUTSIDE)
def test_on_a_gpu_the_loss_is_nan(impl, draw, label: int) -> None:
    """Through the public function, which must not read labels on the host."""
    logits, labels = batch(draw, label)
    loss = weighted_mtp_ce(logits.requires_grad_(), labels, impl=impl)
    loss.backward()
    assert bool(loss.isnan())
    assert bool(logits.grad[0].isfinite().all())
    assert bool(logits.grad[1, 1, 0].isnan().all())
    hidden, unembed = draw.normal(2, 5, 2, 3).requires_grad_(), draw.normal(V, 3).requires_grad_()
    loss = weighted_mtp_linear_ce(hidden, unembed, labels, impl=impl)
    loss.backward()
    assert bool(loss.isnan())
    assert bool(hidden.grad[1, 1, 0].isnan().all())
    assert bool(unembed.grad.isnan().any())
