"""Gradients: every upstream, twice, never a second derivative, and against finite differences in float64."""

import pytest
import torch
from torch import Tensor

from mtp_ce import weighted_mtp_ce

B, S, H, V = 2, 4, 2, 37


def batch(draw, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels with a hole, weights of both signs."""
    labels = draw.integers(V, B, S)
    labels[0, 2] = -100
    return draw.normal(B, S, H, V, scale=2, dtype=dtype), labels, draw.normal(B, S)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("upstream", [2.5, -1e-3])
def test_a_scalar_upstream_other_than_one(compare, draw, dtype, reduction: str, upstream: float) -> None:
    """The loss is one term of several, scaled by whoever adds them."""
    compare(*batch(draw, dtype), reduction=reduction, upstream=upstream)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alignment", ["position", "target"])
def test_an_upstream_for_every_token(compare, draw, dtype, alignment: str) -> None:
    """reduction="none" under signed upstream gradients, some of them 0, of any strides."""
    upstreams = [draw.normal(B, S), draw.normal(S, B).T, draw.normal(B, 2 * S)[:, 1::2], draw.normal(B, S).relu()]
    for upstream in upstreams:
        compare(*batch(draw, dtype), reduction="none", upstream=upstream, weight_alignment=alignment, loss_scale=0.5)


def test_the_square_of_the_loss(impl, draw) -> None:
    """An upstream that is only known in backward: 2 * loss."""
    logits, labels, weights = batch(draw)
    results = {}
    for name, dtype in ((impl, torch.float32), ("reference", torch.float32), ("exact", torch.float64)):
        x, w = logits.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()
        loss = weighted_mtp_ce(x, labels, w, impl="reference" if name == "exact" else name) ** 2
        results[name] = (loss.detach(), *torch.autograd.grad(loss, (x, w)))
    for ours, peer, exact in zip(*results.values(), strict=True):
        error, allowed = (float((value.double() - exact).abs().max()) for value in (ours, peer))
        assert error <= 3 * allowed + 4 * torch.finfo(torch.float32).eps * float(exact.abs().max())


def test_an_expanded_upstream_is_read_by_its_strides(impl, draw) -> None:
    """`.sum()` and `.mean()` send one number with stride 0."""
    logits, labels, weights = batch(draw)
    seen: list[tuple[int, ...]] = []
    results = []
    for expanded in (True, False):
        x = logits.clone().requires_grad_()
        losses = weighted_mtp_ce(x, labels, weights, reduction="none", impl=impl)
        if expanded:
            losses.register_hook(lambda gradient: seen.append(gradient.stride()))
            (losses.sum() * 3).backward()
        else:
            losses.backward(torch.full_like(losses, 3.0))
        results.append(x.grad)
    assert seen == [(0, 0)]
    assert torch.equal(*results)


def test_an_upstream_of_zero_kills_its_rows(impl, device, draw) -> None:
    """0 times the gradient of a row whose loss is Inf or NaN is 0, as for every masked row."""
    logits, labels, _ = batch(draw)
    labels[:] = 5
    logits[0, 1, :, 5] = -torch.inf
    logits[1, 0] = torch.nan
    x = logits.requires_grad_()
    losses = weighted_mtp_ce(x, labels, reduction="none", impl=impl)
    upstream = torch.ones_like(losses)
    upstream[0, 1] = upstream[1, 0] = 0.0
    losses.backward(upstream)
    assert bool(x.grad.isfinite().all())
    assert bool((x.grad[0, 1] == 0).all())
    assert bool((x.grad[1, 0] == 0).all())
    assert bool((x.grad[0, 0] != 0).any())


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_are_bitwise_unchanged(impl, draw, dtype, softcap) -> None:
    """After forward and after backward; so are the weights and the labels."""
    logits, labels, weights = batch(draw, dtype)
    copies = [tensor.clone() for tensor in (logits, labels, weights)]
    loss = weighted_mtp_ce(
        logits.requires_grad_(), labels, weights.requires_grad_(), softcap=softcap, z_loss=0.1, impl=impl
    )
    loss.backward()
    for tensor, copy in zip((logits, labels, weights), copies, strict=True):
        assert torch.equal(tensor.detach(), copy)


def test_backward_twice_returns_the_same_gradient_twice(impl, draw) -> None:
    """retain_graph: nothing that backward needs is spent by it."""
    logits, labels, weights = batch(draw)
    leaves = (logits.requires_grad_(), weights.requires_grad_())
    loss = weighted_mtp_ce(leaves[0], labels, leaves[1], impl=impl)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for once, twice in zip(first, second, strict=True):
        assert torch.equal(once, twice)
        assert once.data_ptr() != twice.data_ptr()


def test_two_losses_of_the_same_logits_add_up(impl, draw) -> None:
    """Gradients accumulate, each in its own memory."""
    logits, labels, weights = batch(draw)
    x = logits.clone().requires_grad_()
    one = weighted_mtp_ce(x, labels, weights, impl=impl)
    other = weighted_mtp_ce(x, labels, shift=0, z_loss=0.1, impl=impl)
    separate = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (one, other)]
    (one + other).backward()
    torch.testing.assert_close(x.grad, sum(separate), rtol=1e-6, atol=1e-8)


def test_the_same_call_returns_the_same_bits(impl, draw) -> None:
    """Loss, gradients and statistics."""
    logits, labels, weights = batch(draw, torch.bfloat16)

    def run() -> list[Tensor]:
        x, w = logits.clone().requires_grad_(), weights.clone().requires_grad_()
        loss, stats = weighted_mtp_ce(x, labels, w, softcap=9.0, label_smoothing=0.1, impl=impl, return_stats=True)
        return [loss.detach(), *torch.autograd.grad(loss, (x, w)), *stats]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("wrt", ["logits", "weights", "both"])
def test_a_second_derivative_raises(impl, draw, wrt: str) -> None:
    """Rather than being silently 0."""
    logits, labels, weights = batch(draw)
    x = logits.requires_grad_(wrt != "weights")
    w = weights.requires_grad_(wrt != "logits")
    leaves = [leaf for leaf in (x, w) if leaf.requires_grad]
    loss = weighted_mtp_ce(x, labels, w, impl=impl)
    gradients = torch.autograd.grad(loss**2, leaves, create_graph=True)
    with pytest.raises(RuntimeError):
        sum((gradient**2).sum() for gradient in gradients).backward()


def test_a_second_derivative_through_the_layer_before_raises(impl, draw) -> None:
    """A gradient penalty on hidden states: d hidden depends on d logits, which has no derivative."""
    _, labels, weights = batch(draw)
    hidden, unembed = draw.normal(B, S, H, 5).requires_grad_(), draw.normal(5, V).requires_grad_()
    loss = weighted_mtp_ce(hidden @ unembed, labels, weights, impl=impl)
    (d_hidden,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        (d_hidden**2).sum().backward()


def test_without_a_gradient_to_compute_nothing_is_recorded(impl, draw) -> None:
    """no_grad and inference_mode give the value that training sees."""
    logits, labels, weights = batch(draw)
    x, w = logits.requires_grad_(), weights.requires_grad_()
    loss = weighted_mtp_ce(x, labels, w, impl=impl)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value = weighted_mtp_ce(x, labels, w, impl=impl)
        assert not value.requires_grad
        assert torch.equal(value, loss.detach())


OPTIONS = {
    "plain": {},
    "sum_shift_0": {"reduction": "sum", "shift": 0},
    "none": {"reduction": "none", "shift": 2},
    "target": {"weight_alignment": "target"},
    "horizon": {"head_reduction": "horizon", "loss_scale": -2.0},
    "per_token": {"head_reduction": "target"},
    "softcap": {"softcap": 1.5},
    "z_loss": {"z_loss": 0.3},
    "smoothing": {"label_smoothing": 0.2},
    "everything": {"softcap": 2.0, "z_loss": 0.1, "label_smoothing": 0.1, "normalizer": 3.0},
}


@pytest.mark.pairwise
@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("per_row", [False, True])
def test_gradcheck_in_float64(impl, device, draw, name: str, per_row: bool) -> None:
    """Finite differences, for logits and for weights (some of them 0)."""
    if per_row and name == "target":
        per_row = False
    logits = draw.normal(1, 4, 2, 4, dtype=torch.float64).requires_grad_()
    weights = draw.normal(*((1, 4, 2) if per_row else (1, 4)), dtype=torch.float64)
    weights[0, 1] = 0.0
    labels = draw.integers(4, 1, 4)
    labels[0, 2] = -100
    torch.autograd.gradcheck(
        lambda x, w: weighted_mtp_ce(x, labels, w, impl=impl, **OPTIONS[name]), (logits, weights.requires_grad_())
    )


@pytest.mark.parametrize("impl", ["cpu"])
@pytest.mark.parametrize("name", OPTIONS)
def test_float64_logits_are_exact(impl, draw, evaluate, name: str) -> None:
    """The blocked CPU path computes in float64 where the logits are float64: no silent fp32 inside."""
    logits, labels = draw.normal(2, 3, 2, 300, dtype=torch.float64, scale=4), draw.integers(300, 2, 3)
    weights = draw.normal(2, 3, dtype=torch.float64)
    ours, oracle = (evaluate(which, logits, labels, weights, **OPTIONS[name]) for which in (impl, "reference"))
    pairs = [(ours.loss, oracle.loss), (ours.d_logits[0], oracle.d_logits[0])]
    pairs += [(ours.d_token_weights, oracle.d_token_weights), (ours.stats.ce, oracle.stats.ce)]
    for mine, true in pairs:
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, true, rtol=1e-13, atol=1e-14)
