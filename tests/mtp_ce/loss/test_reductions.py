"""How rows become one number: normalizer, loss_scale, the mean over heads."""

import pytest
import torch

from mtp_ce import weighted_mtp_ce

B, S, H, V = 3, 5, 3, 53


def batch(draw):
    """Sequences of unequal numbers of targets, so that a mean of means would show."""
    labels = draw.integers(V, B, S)
    labels[0, 1:] = labels[2, 3:] = -100
    return draw.normal(B, S, H, V, scale=2), labels, draw.uniform(B, S)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("kind", ["float", "int", "float32", "float64", "int64"])
def test_two_micro_batches_equal_one_batch(impl, draw, device, kind: str) -> None:
    """Loss and gradients under the global count, as a number or as a tensor of any dtype."""
    logits, labels, weights = batch(draw)
    whole = logits.clone().requires_grad_()
    loss, stats = weighted_mtp_ce(whole, labels, weights, impl=impl, return_stats=True)
    loss.backward()
    count = int(stats.live.any(-1).sum())
    normalizer = {"float": float(count), "int": count}.get(kind)
    if normalizer is None:
        normalizer = torch.tensor(count, dtype=getattr(torch, kind), device=device)

    parts = logits.clone().requires_grad_()
    losses = []
    for half in (slice(0, 1), slice(1, B)):
        part = weighted_mtp_ce(parts[half], labels[half], weights[half], normalizer=normalizer, impl=impl)
        part.backward()
        losses.append(part.detach())
    torch.testing.assert_close(sum(losses), loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-6, atol=1e-9)
    means = [
        weighted_mtp_ce(logits[half], labels[half], weights[half], impl=impl) for half in (slice(0, 1), slice(1, B))
    ]
    assert not torch.allclose(sum(means) / 2, loss, rtol=1e-2), "the batch must be one where a mean of means differs"


@pytest.mark.pairwise
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss_scale", [0.25, -3.0, 0.0])
def test_loss_scale_multiplies_loss_and_gradients(impl, draw, reduction: str, loss_scale: float) -> None:
    """Powers of two and their multiples: equal up to the last bit."""
    logits, labels, weights = batch(draw)

    def run(scale):
        leaf, w = logits.clone().requires_grad_(), weights.clone().requires_grad_()
        loss = weighted_mtp_ce(leaf, labels, w, reduction=reduction, loss_scale=scale, impl=impl)
        return loss.detach(), *torch.autograd.grad(loss.sum(), (leaf, w))

    for scaled, plain in zip(run(loss_scale), run(1.0), strict=True):
        torch.testing.assert_close(scaled, loss_scale * plain, rtol=5e-7, atol=1e-12)


def test_none_sums_to_sum_and_mean_is_sum_over_the_count(impl, draw) -> None:
    """The three reductions are one number."""
    logits, labels, weights = batch(draw)
    none, total, mean = (
        weighted_mtp_ce(logits, labels, weights, reduction=reduction, loss_scale=0.7, impl=impl)
        for reduction in ("none", "sum", "mean")
    )
    _, stats = weighted_mtp_ce(logits, labels, impl=impl, return_stats=True)
    assert none.shape == (B, S)
    torch.testing.assert_close(none.sum(), total, rtol=1e-6, atol=0)
    torch.testing.assert_close(total / stats.live.any(-1).sum(), mean, rtol=1e-6, atol=0)


@pytest.mark.pairwise
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{"head_reduction": "horizon"}, {"normalizer": 17.0}, {"loss_scale": -0.3}, {}])
def test_every_reduction(compare, draw, reduction: str, options: dict) -> None:
    """Against the oracle, with signed weights."""
    if reduction != "mean" and "normalizer" in options:
        options = {}
    logits, labels, weights = batch(draw)
    compare(logits, labels, weights - 0.6, reduction=reduction, **options)


def test_horizon_divides_by_h_also_where_heads_are_masked(impl, draw) -> None:
    """avg = (1/H) sum over live heads of ce, position by position."""
    logits, labels, _ = batch(draw)
    loss, stats = weighted_mtp_ce(
        logits, labels, head_reduction="horizon", reduction="none", impl=impl, return_stats=True
    )
    assert bool((stats.live.sum(-1) < H).any())
    torch.testing.assert_close(loss, stats.ce.sum(-1) / H, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_head_weights_make_a_weighted_mean_over_valid_heads(impl, draw, device, dtype: torch.dtype) -> None:
    """sum a ce / sum a over the live heads only, position by position."""
    logits, labels, weights = batch(draw)
    a = torch.tensor([1.0, 0.5, 0.25], dtype=dtype, device=device)
    loss, stats = weighted_mtp_ce(
        logits, labels, weights, head_weights=a, reduction="none", impl=impl, return_stats=True
    )
    total = (stats.live * a.float()).sum(-1)
    wanted = weights * (a.float() * stats.ce).sum(-1) / torch.where(total == 0, 1.0, total)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)


def test_head_weights_against_the_oracle(compare, draw, device) -> None:
    """Loss and every gradient; a strided vector."""
    a = torch.tensor([1.0, 9.0, 0.5, 9.0, 0.25, 9.0], device=device)[::2]
    logits, labels, weights = batch(draw)
    compare(logits, labels, weights, head_weights=a)
    compare(logits, labels, weights, head_weights=a, weight_alignment="target", reduction="sum")
    compare(logits, labels, draw.normal(B, S, H), head_weights=a, reduction="none")


def test_only_the_ratios_of_head_weights_count(impl, draw, device) -> None:
    """a and 8 a, bit for bit; equal weights are no weights."""
    logits, labels, _ = batch(draw)
    a = torch.tensor([1.0, 0.5, 0.3], device=device)
    once, eight = (weighted_mtp_ce(logits, labels, head_weights=k * a, impl=impl) for k in (1.0, 8.0))
    assert torch.equal(once, eight)
    equal = weighted_mtp_ce(logits, labels, head_weights=torch.full_like(a, 2.0), impl=impl)
    torch.testing.assert_close(equal, weighted_mtp_ce(logits, labels, impl=impl), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_a_head_of_weight_zero_is_masked_but_its_positions_count(impl, draw, device) -> None:
    """NaN in it harms nobody; N still counts positions where it alone is live."""
    logits, labels, weights = batch(draw)
    logits[:, :, 0] = torch.nan
    logits = logits.requires_grad_()
    a = torch.tensor([0.0, 1.0, 1.0], device=device)
    loss, stats = weighted_mtp_ce(
        logits, labels, weights.requires_grad_(), head_weights=a, impl=impl, return_stats=True
    )
    d_logits, d_weights = torch.autograd.grad(loss, (logits, weights))
    assert bool((d_logits[:, :, 0] == 0).all())
    assert bool(d_weights.isfinite().all())
    live = stats.live[:, :, 1:].sum(-1)
    wanted = (weights * stats.ce[:, :, 1:].sum(-1) / live.clamp(min=1)).sum() / stats.live.any(-1).sum()
    assert bool((stats.live[:, :, 0] & (live == 0)).any()), "the batch must have a position with head 0 alone"
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_the_weights_of_a_head_of_weight_zero_are_never_used(impl, draw, device) -> None:
    """NaN token weights of its rows: 0 * NaN reaches no result."""
    logits, labels, _ = batch(draw)
    a, weights = torch.tensor([0.0, 1.0, 1.0], device=device), draw.uniform(B, S, H)
    results = []
    for value in (1.0, torch.nan):
        x, w = logits.clone().requires_grad_(), weights.clone()
        w[:, :, 0] = value
        w.requires_grad_()
        loss = weighted_mtp_ce(x, labels, w, head_weights=a, impl=impl)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, w))))
    for clean, spoiled in zip(*results, strict=True):
        assert torch.equal(clean, spoiled)
