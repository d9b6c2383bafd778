"""Which token each head predicts, which positions count, and what is left when none does."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_ce import weighted_mtp_ce


def loop_over_heads(logits: Tensor, labels: Tensor, weights: Tensor, shift: int) -> Tensor:
    """What people write by hand: one F.cross_entropy a head on sliced labels, summed, divided by K."""
    B, S, H, V = logits.shape
    total, count = logits.new_zeros(B, S), logits.new_zeros(B, S)
    for h in range(H):
        d = shift + h
        if d >= S:
            break
        kept = logits[:, : S - d, h].reshape(-1, V)
        ce = F.cross_entropy(kept, labels[:, d:].reshape(-1), reduction="none").view(B, S - d)
        total = total + F.pad(ce, (0, d))
        count = count + F.pad((labels[:, d:] != -100).to(count.dtype), (0, d))
    return (weights * total / count.clamp(min=1)).sum() / (count > 0).sum()


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_fused_is_the_loop_over_heads(impl, draw, shift: int) -> None:
    """Loss, d_logits and d_token_weights, against a loop that shares no line with the oracle."""
    V = 257
    logits, labels, weights = draw.normal(2, 7, 3, V, scale=3), draw.integers(V, 2, 7), draw.uniform(2, 7)
    labels[0, 3] = labels[1, 5:] = -100
    results = {}
    for name, dtype in (("ours", torch.float32), ("loop", torch.float32), ("exact", torch.float64)):
        x, w = logits.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()
        if name == "ours":
            loss = weighted_mtp_ce(x, labels, w, shift=shift, impl=impl)
        else:
            loss = loop_over_heads(x, labels, w, shift)
        results[name] = (loss.detach(), *torch.autograd.grad(loss, (x, w)))
    for ours, loop, exact in zip(*results.values(), strict=True):
        error, peer = (float((value.double() - exact).abs().max()) for value in (ours, loop))
        assert error <= 3 * peer + 4 * torch.finfo(torch.float32).eps * float(exact.abs().max())


def planted(labels: Tensor, H: int, V: int, distance: int) -> Tensor:
    """Logits [B,S,H,V] that are sure of the token at t + distance + h, and of class V - 1 where there is none."""
    S = labels.shape[1]
    place = torch.arange(S)[:, None] + torch.arange(H) + distance
    sure = torch.where(place < S, labels.cpu()[:, place.clamp(0, S - 1)], V - 1)
    return 60 * F.one_hot(sure, V).float().to(labels.device)


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_head_h_is_scored_against_the_token_at_t_plus_shift_plus_h(impl, device, draw, shift: int) -> None:
    """A head that knows just that token has loss 0; one that is off by one in either direction loses."""
    labels = torch.randperm(7, generator=draw.generator)[None].to(device)
    for distance in range(max(shift - 1, 0), shift + 2):
        loss, stats = weighted_mtp_ce(
            planted(labels, 2, 8, distance), labels, shift=shift, impl=impl, return_stats=True
        )
        if distance == shift:
            assert loss.item() < 1e-6
        else:
            assert bool((stats.ce[stats.live] > 50).all())


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_a_row_is_valid_exactly_where_its_target_is_inside_the_sequence(impl, device, draw, shift: int) -> None:
    """S smaller than H, too: the last positions have fewer heads, some have none."""
    B, S, H, V = 2, 3, 5, 17
    _, stats = weighted_mtp_ce(
        draw.normal(B, S, H, V), draw.integers(V, B, S), shift=shift, impl=impl, return_stats=True
    )
    for t in range(S):
        assert stats.live[0, t].tolist() == [t + shift + h < S for h in range(H)]


@pytest.mark.pairwise
@pytest.mark.parametrize(("S", "H"), [(1, 1), (1, 4), (2, 5), (3, 3)])
@pytest.mark.parametrize("shift", [0, 1])
def test_sequences_shorter_than_the_horizon(compare, draw, S: int, H: int, shift: int) -> None:
    """S = 1 with shift = 1 has no target at all; with shift = 0 it has one."""
    got = compare(draw.normal(2, S, H, 33), draw.integers(33, 2, S), draw.uniform(2, S), shift=shift)
    assert got.stats.live.sum() == 2 * sum(t + shift + h < S for t in range(S) for h in range(H))


def test_positions_without_a_valid_head_are_not_counted(impl, device, draw) -> None:
    """Uniform logits cost ln V a position: a K = 0 position inside or at the tail would pull the mean below it."""
    V = 50
    labels = draw.integers(V, 2, 12)
    labels[0, 3:8] = -100  # longer than the horizon: positions 3, 4, 5 see no target
    loss, stats = weighted_mtp_ce(torch.zeros(2, 12, 2, V, device=device), labels, impl=impl, return_stats=True)
    assert stats.live.any(-1)[0].tolist() == [True, True, False, False, False, False] + [True] * 5 + [False]
    assert math.isclose(loss.item(), math.log(V), rel_tol=1e-6)


def test_positions_without_a_valid_head_inside_and_at_the_tail(compare, draw) -> None:
    """The same holes, under random logits and weights, with gradients."""
    V = 61
    labels = draw.integers(V, 2, 9)
    labels[0, 2:6] = labels[1, 7:] = -100
    compare(draw.normal(2, 9, 2, V), labels, draw.uniform(2, 9))
    compare(draw.normal(2, 9, 2, V), labels, draw.uniform(2, 9), weight_alignment="target", head_reduction="horizon")


EMPTY = {
    "all_ignored": lambda labels: {},
    "seq_lens_0": lambda labels: {"seq_lens": torch.zeros(len(labels), dtype=torch.int64, device=labels.device)},
    "shift_beyond_the_sequence": lambda labels: {"shift": labels.shape[1] + 3},
    "documents_of_one_token": lambda labels: {
        "document_ids": torch.arange(labels.numel(), device=labels.device).view_as(labels)
    },
}


@pytest.mark.pairwise
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("reason", EMPTY)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_valid_row_returns_exactly_zero_and_zero_gradients(impl, device, draw, reason: str, reduction: str) -> None:
    """Never NaN, also with NaN logits; and the loss stays connected, so that every rank can run backward."""
    labels = draw.integers(9, 2, 4)
    if reason == "all_ignored":
        labels.fill_(-100)
    logits = torch.full((2, 4, 3, 9), torch.nan, device=device, requires_grad=True)
    weights = draw.uniform(2, 4).requires_grad_()
    loss, stats = weighted_mtp_ce(
        logits, labels, weights, reduction=reduction, z_loss=0.1, label_smoothing=0.1, loss_scale=-3.0, impl=impl,
        return_stats=True, **EMPTY[reason](labels),
    )  # fmt: skip
    assert loss.shape == ((2, 4) if reduction == "none" else ())
    assert bool((loss == 0).all())
    assert not bool(stats.live.any())
    d_logits, d_weights = torch.autograd.grad(loss.sum(), (logits, weights))
    assert bool((d_logits == 0).all())
    assert bool((d_weights == 0).all())


@pytest.mark.parametrize("normalizer", [8.0, "tensor"])
def test_no_valid_row_returns_zero_under_a_normalizer_too(impl, device, draw, normalizer) -> None:
    """A rank without targets divides by the global count like the others."""
    normalizer = torch.tensor(8.0, device=device) if normalizer == "tensor" else normalizer
    logits = draw.normal(1, 3, 2, 7).requires_grad_()
    loss = weighted_mtp_ce(logits, draw.integers(7, 1, 3), shift=5, normalizer=normalizer, impl=impl)
    loss.backward()
    assert loss.item() == 0
    assert bool((logits.grad == 0).all())


@pytest.mark.pairwise
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("shape", [(0, 5, 2, 7), (2, 0, 2, 7), (0, 0, 1, 7)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("alignment", ["position", "target"])
def test_an_empty_batch_returns_zero(impl, device, shape, reduction: str, alignment: str) -> None:
    """B = 0 and S = 0: loss 0 (or an empty one), connected, gradients of the right shape."""
    B, S, H, _ = shape
    logits = torch.empty(shape, device=device, requires_grad=True)
    labels = torch.empty(B, S, dtype=torch.int64, device=device)
    weights = torch.empty(B, S, device=device, requires_grad=True)
    loss, stats = weighted_mtp_ce(
        logits, labels, weights, reduction=reduction, weight_alignment=alignment, impl=impl, return_stats=True
    )
    assert loss.shape == ((B, S) if reduction == "none" else ())
    assert loss.sum().item() == 0
    assert all(value.shape == (B, S, H) for value in stats)
    d_logits, d_weights = torch.autograd.grad(loss.sum(), (logits, weights))
    assert d_logits.shape == shape
    assert d_weights.shape == (B, S)


def test_random_tokens_cost_at_least_ln_v(impl, device, draw) -> None:
    """No prediction made from the past beats ln V on independent uniform tokens; a peek at the target would."""
    V, S = 16, 40
    labels = draw.integers(V, 1, S)
    honest = draw.normal(1, S, 1, V).expand(1, S, 2, V)  # expected to cost 1/2 more than ln V
    copying = 8 * F.one_hot(labels, V).float()[:, :, None].expand(1, S, 2, V)  # sure of its own input token
    for logits in (honest, copying):
        _, stats = weighted_mtp_ce(logits, labels, impl=impl, return_stats=True)
        by_head = [stats.ce[:, :, h][stats.live[:, :, h]].mean().item() for h in range(2)]
        assert min(by_head) > math.log(V), by_head
