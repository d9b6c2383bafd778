"""MTPStats: what is reported about each row, from the same read of the logits."""

import pytest
import torch

from mtp_ce import MTPLoss, MTPStats, weighted_mtp_ce

B, S, H, V = 2, 5, 2, 43
IMPLEMENTATIONS = ["reference", "cpu", "triton"]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_have_the_documented_shapes_and_dtypes(impl, draw, dtype: torch.dtype) -> None:
    """ce and lse fp32 whatever the logits, live bool, top1 int32; all on the logits' device, all detached."""
    logits, weights = draw.normal(B, S, H, V, dtype=dtype).requires_grad_(), draw.uniform(B, S).requires_grad_()
    result = weighted_mtp_ce(logits, draw.integers(V, B, S), weights, impl=impl, return_stats=True)
    assert isinstance(result, MTPLoss)
    assert isinstance(result.stats, MTPStats)
    wanted = {"ce": torch.float32, "live": torch.bool, "lse": torch.float32, "top1": torch.int32}
    for name, kind in wanted.items():
        value = getattr(result.stats, name)
        assert value.shape == (B, S, H), name
        assert value.dtype == kind, name
        assert value.device == logits.device, name
        assert not value.requires_grad, name
    assert result.loss.requires_grad


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_top1_is_the_first_of_equal_largest_logits(impl, draw) -> None:
    """As torch.argmax, wherever the equal ones stand: in front edge, body, back edge, in one lane or in two tiles."""
    width = 5001
    # The distances 1024, 2048 and 4096 are those of one thread's elements in two tiles.
    places = [[0, 5000], [1, 8, 300], [5, 1029], [6, 2054], [9, 4105], [2047, 2048, 5000], [4999, 5000], [0, 1, 2, 3]]
    logits = draw.normal(1, len(places), 1, width).clamp(max=2.0)
    for t, place in enumerate(places):
        logits[0, t, 0, place] = 3.0
    labels = draw.integers(width, 1, len(places))
    for given in (logits, logits.bfloat16()):
        _, stats = weighted_mtp_ce(given, labels, shift=0, impl=impl, return_stats=True)
        assert stats.top1[0, :, 0].tolist() == [place[0] for place in places]
        assert stats.top1[0, :, 0].tolist() == given.argmax(-1)[0, :, 0].tolist()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("wide", [1, 6, 300])
def test_top1_of_equal_logits_is_entry_zero(impl, draw, wide: int) -> None:
    """Also of a row that is -inf everywhere: an index that can be read with."""
    logits = draw.normal(1, 3, 1, wide) * 0
    logits[0, 1] = -torch.inf
    _, stats = weighted_mtp_ce(logits, draw.integers(wide, 1, 3), shift=0, impl=impl, return_stats=True)
    assert stats.top1[0, :, 0].tolist() == [0, 0, 0]


def test_accuracy_from_top1(impl, draw) -> None:
    """The share of valid rows whose top1 is the label, against a hand-written one."""
    logits, labels = draw.normal(B, S, H, 4), draw.integers(4, B, S)
    labels[0, 3] = -100
    _, stats = weighted_mtp_ce(logits, labels, impl=impl, return_stats=True)
    for h in range(H):
        target = labels[:, 1 + h :]
        wanted = ((logits[:, : S - 1 - h, h].argmax(-1) == target) & (target != -100)).sum()
        padded = torch.nn.functional.pad(target, (0, 1 + h), value=-100)
        assert ((stats.top1[:, :, h] == padded) & stats.live[:, :, h]).sum() == wanted


def test_statistics_do_not_change_the_loss_or_its_gradients(impl, draw) -> None:
    """Bit for bit, with and without."""
    logits, labels, weights = draw.normal(B, S, H, V), draw.integers(V, B, S), draw.normal(B, S)
    results = []
    for with_stats in (False, True):
        x, w = logits.clone().requires_grad_(), weights.clone().requires_grad_()
        result = weighted_mtp_ce(x, labels, w, impl=impl, return_stats=with_stats)
        loss = result.loss if with_stats else result
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, w))))
    for without, with_them in zip(*results, strict=True):
        assert torch.equal(without, with_them)


def test_statistics_do_not_feel_weights_or_reduction(impl, draw) -> None:
    """ce, lse and live belong to the rows; weights, scales and normalizers to the loss."""
    logits, labels = draw.normal(B, S, H, V), draw.integers(V, B, S)
    _, plain = weighted_mtp_ce(logits, labels, impl=impl, return_stats=True)
    _, other = weighted_mtp_ce(
        logits, labels, draw.uniform(B, S), loss_scale=7.0, normalizer=0.1, head_reduction="horizon",
        weight_alignment="target", impl=impl, return_stats=True,
    )  # fmt: skip
    for one, two in zip(plain, other, strict=True):
        assert torch.equal(one, two)


def test_live_follows_the_formula_also_for_rows_of_weight_zero(impl, draw) -> None:
    """A row that has a target is live; only whether it was read depends on its weight."""
    logits, labels = draw.normal(B, S, H, V), draw.integers(V, B, S)
    weights = draw.uniform(B, S) * 0
    _, stats = weighted_mtp_ce(logits, labels, weights, impl=impl, return_stats=True)
    _, weightless = weighted_mtp_ce(logits, labels, impl=impl, return_stats=True)
    assert torch.equal(stats.live, weightless.live)
    assert bool((stats.top1 == -1).all())
