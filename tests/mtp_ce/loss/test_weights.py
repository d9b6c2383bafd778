"""Token weights: every form, both alignments, and their own gradient."""

import pytest
import torch
from torch import Tensor

from mtp_ce import weighted_mtp_ce

B, S, H, V = 2, 4, 2, 67


def _unaligned(draw, *shape: int) -> Tensor:
    flat = draw.normal(2 * torch.Size(shape).numel() + 1)
    return flat[1::2].view(shape)


FORMS = {
    "ones": lambda draw: draw.normal(B, S) * 0 + 1,
    "some_zero": lambda draw: draw.normal(B, S).relu(),
    "all_zero": lambda draw: draw.normal(B, S) * 0,
    "negative": lambda draw: draw.normal(B, S),
    "huge": lambda draw: draw.normal(B, S) * 1e30,
    "tiny": lambda draw: draw.normal(B, S) * 1e-30,
    "bfloat16": lambda draw: draw.normal(B, S, dtype=torch.bfloat16),
    "float16": lambda draw: draw.normal(B, S, dtype=torch.float16),
    "float64": lambda draw: draw.normal(B, S, dtype=torch.float64),
    "expanded_over_positions": lambda draw: draw.normal(B, 1).expand(B, S),
    "expanded_over_the_batch": lambda draw: draw.normal(1, S).expand(B, S),
    "one_number_expanded": lambda draw: draw.normal(1, 1).expand(B, S),
    "transposed": lambda draw: draw.normal(S, B).T,
    "every_other_and_unaligned": lambda draw: _unaligned(draw, B, S),
    "every_other_bfloat16": lambda draw: draw.normal(B, 2 * S, dtype=torch.bfloat16)[:, 1::2],
    "by_head": lambda draw: draw.normal(B, S, H),
    "by_head_permuted": lambda draw: draw.normal(H, B, S).permute(1, 2, 0),
    "by_head_expanded": lambda draw: draw.normal(B, S, 1).expand(B, S, H),
    "by_head_float16_some_zero": lambda draw: draw.normal(B, S, H, dtype=torch.float16).relu(),
}


def batch(draw) -> tuple[Tensor, Tensor]:
    """Logits and labels with a hole and a shorter second sequence."""
    labels = draw.integers(V, B, S)
    labels[0, 2] = labels[1, 3] = -100
    return draw.normal(B, S, H, V, scale=2), labels


@pytest.mark.pairwise
@pytest.mark.parametrize("alignment", ["position", "target"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weights(compare, draw, form: str, alignment: str) -> None:
    """Loss, d_logits and d_token_weights, whatever the dtype, the strides and the signs."""
    weights = FORMS[form](draw)
    if weights.dim() == 3 and alignment == "target":
        with pytest.raises(ValueError, match="weight_alignment is 'target'"):
            compare(*batch(draw), weights, weight_alignment=alignment)
        return
    got = compare(*batch(draw), weights, weight_alignment=alignment)
    assert got.d_token_weights.dtype == weights.dtype
    assert got.d_token_weights.shape == weights.shape


def test_under_position_alignment_a_weight_belongs_to_all_heads_of_its_position(impl, device, draw) -> None:
    """One weight of 1 at t = 2: only the rows (2, h) feel it."""
    logits, labels = draw.normal(1, 6, 2, V).requires_grad_(), draw.integers(V, 1, 6)
    weights = torch.zeros(1, 6, device=device)
    weights[0, 2] = 1.0
    weighted_mtp_ce(logits, labels, weights, impl=impl).backward()
    felt = (logits.grad != 0).any(-1)[0].nonzero().tolist()
    assert felt == [[2, 0], [2, 1]]


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_under_target_alignment_a_weight_belongs_to_the_token_that_is_predicted(impl, device, draw, shift) -> None:
    """One weight of 1 at token 4: only the rows with t + shift + h = 4 feel it."""
    logits, labels = draw.normal(1, 6, 2, V).requires_grad_(), draw.integers(V, 1, 6)
    weights = torch.zeros(1, 6, device=device)
    weights[0, 4] = 1.0
    weighted_mtp_ce(logits, labels, weights, shift=shift, weight_alignment="target", impl=impl).backward()
    felt = (logits.grad != 0).any(-1)[0].nonzero().tolist()
    assert felt == [[4 - shift - 1, 1], [4 - shift, 0]]


def test_a_weight_for_every_row_that_does_not_depend_on_the_head_is_a_weight_for_every_position(impl, draw) -> None:
    """[B,S,1] expanded to [B,S,H] equals [B,S], bit for bit."""
    logits, labels = batch(draw)
    weights = draw.uniform(B, S)
    by_position = weighted_mtp_ce(logits, labels, weights, reduction="none", impl=impl)
    by_row = weighted_mtp_ce(logits, labels, weights[:, :, None].expand(B, S, H), reduction="none", impl=impl)
    assert torch.equal(by_position, by_row)


@pytest.mark.pairwise
@pytest.mark.parametrize("alignment", ["position", "target", "by_head"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_gradient_of_a_weight_is_the_loss_of_its_rows(impl, draw, alignment: str, reduction: str) -> None:
    """Also where the weight is 0: loss_scale / N times the row's share of avg, worked out from ce."""
    logits, labels = batch(draw)
    weights = draw.normal(*((B, S, H) if alignment == "by_head" else (B, S))).relu().requires_grad_()
    assert bool((weights == 0).any())
    loss, stats = weighted_mtp_ce(
        logits, labels, weights, weight_alignment="target" if alignment == "target" else "position",
        reduction=reduction, loss_scale=-2.5, impl=impl, return_stats=True,
    )  # fmt: skip
    (d_weights,) = torch.autograd.grad(loss.sum(), weights)
    share = stats.ce.double() / stats.live.sum(-1, keepdim=True).clamp(min=1)
    by = stats.live.any(-1).sum() if reduction == "mean" else 1
    if alignment == "by_head":
        wanted = share
    elif alignment == "position":
        wanted = share.sum(-1)
    else:
        wanted = torch.zeros_like(share[:, :, 0])
        for h in range(H):
            wanted[:, 1 + h :] += share[:, : S - 1 - h, h]
    torch.testing.assert_close(d_weights.double(), -2.5 / by * wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_a_row_of_weight_zero_is_read_only_for_the_gradient_of_its_weight(impl, device, draw) -> None:
    """NaN logits under a zero weight: harmless while the weight is a constant, its gradient when it is not."""
    labels = draw.integers(V, 1, 4)
    logits = draw.normal(1, 4, 1, V)
    logits[0, 1] = torch.nan
    weights = torch.tensor([[1.0, 0.0, 2.0, 1.0]], device=device)
    loss, stats = weighted_mtp_ce(logits, labels, weights, impl=impl, return_stats=True)
    assert bool(loss.isfinite())
    assert stats.live.tolist() == [[[True], [True], [True], [False]]]
    assert stats.top1[0, 1, 0] == -1
    leaf = logits.requires_grad_()
    loss = weighted_mtp_ce(leaf, labels, weights.requires_grad_(), impl=impl)
    d_logits, d_weights = torch.autograd.grad(loss, (leaf, weights))
    assert bool(loss.isfinite())
    assert bool((d_logits[0, 1] == 0).all())
    assert d_weights[0].isnan().tolist() == [False, True, False, False]
    with torch.no_grad():
        assert bool(weighted_mtp_ce(leaf, labels, weights, impl=impl).isfinite())


@pytest.mark.pairwise
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("alignment", ["position", "target"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_weight_that_no_live_row_uses_is_never_used(impl, draw, alignment: str, poison: float) -> None:
    """NaN and Inf weights where K = 0, or on tokens that nothing predicts, reach no result."""
    labels = draw.integers(V, 1, 6)
    labels[0, 3:] = -100
    unused = slice(2, None) if alignment == "position" else slice(3, None)
    logits, weights = draw.normal(1, 6, 2, V), draw.uniform(1, 6)
    spoiled = weights.clone()
    spoiled[0, unused] = poison
    results = []
    for w in (weights, spoiled):
        leaf, w = logits.clone().requires_grad_(), w.requires_grad_()
        loss = weighted_mtp_ce(leaf, labels, w, weight_alignment=alignment, impl=impl)
        results.append((loss.detach(), *torch.autograd.grad(loss, (leaf, w))))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_no_weights_means_ones(impl, draw) -> None:
    """None and a tensor of ones, bit for bit."""
    logits, labels = batch(draw)
    ones = torch.ones(B, S, device=logits.device)
    assert torch.equal(weighted_mtp_ce(logits, labels, impl=impl), weighted_mtp_ce(logits, labels, ones, impl=impl))


def test_only_what_requires_a_gradient_gets_one(impl, draw) -> None:
    """Weights alone, logits alone."""
    logits, labels = batch(draw)
    weights = draw.uniform(B, S).requires_grad_()
    both = logits.clone().requires_grad_()
    d_logits, d_weights = torch.autograd.grad(weighted_mtp_ce(both, labels, weights, impl=impl), (both, weights))
    (weights_alone,) = torch.autograd.grad(weighted_mtp_ce(logits, labels, weights, impl=impl), weights)
    (logits_alone,) = torch.autograd.grad(weighted_mtp_ce(both, labels, weights.detach(), impl=impl), both)
    assert torch.equal(weights_alone, d_weights)
    assert torch.equal(logits_alone, d_logits)
    assert not weighted_mtp_ce(logits, labels, weights.detach(), impl=impl).requires_grad
