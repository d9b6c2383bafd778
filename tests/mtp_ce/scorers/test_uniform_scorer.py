"""UniformScorer and its statistics: weight 1 where there is supervision, and sums that add up."""

from __future__ import annotations

import pytest
import torch

from mtp_ce import UniformScorer
from mtp_ce.scorers.weights import WeightStatistics


@pytest.fixture
def batch():
    """Two rows of six tokens, of which four and none are supervised."""
    tokens = torch.arange(12).reshape(2, 6)
    labels = tokens.clone()
    labels[0, [0, 3]] = -100
    labels[1] = -100
    return tokens, labels


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_weights_are_1_at_supervised_tokens_and_0_elsewhere(batch, dtype):
    tokens, labels = batch
    weights, _ = UniformScorer().run(tokens, labels.to(dtype), document_ids=torch.zeros_like(tokens))
    assert weights.tolist() == [[0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]]
    assert weights.dtype == torch.float32
    assert weights.device == labels.device
    assert not weights.requires_grad


def test_another_ignore_index_is_respected(batch):
    tokens, labels = batch
    weights, _ = UniformScorer(ignore_index=5).run(tokens, labels)
    assert weights[0].tolist() == [1, 1, 1, 1, 1, 0]


def test_statistics_are_over_supervised_tokens_and_stay_tensors(batch):
    statistics = UniformScorer().run(*batch).statistics
    facts = {name: getattr(statistics, name) for name in ("mean", "min", "max", "ess", "clipped")}
    assert all(isinstance(value, torch.Tensor) and value.ndim == 0 for value in facts.values())
    assert {name: value.item() for name, value in facts.items()} == {
        "mean": 1.0,
        "min": 1.0,
        "max": 1.0,
        "ess": 1.0,
        "clipped": 0,
    }


@pytest.mark.parametrize("shape", [(2, 6), (0, 6), (2, 0)])
def test_no_supervised_token_gives_zeros_and_nothing_that_is_not_finite(shape):
    labels = torch.full(shape, -100)
    weights, statistics = UniformScorer().run(labels, labels)
    assert weights.shape == shape
    assert weights.sum() == 0
    for name in ("mean", "min", "max", "ess", "clipped"):
        assert getattr(statistics, name).item() == 0


def test_the_meta_device_proves_that_nothing_is_read_on_the_host(batch):
    """A tensor without values can't be synchronised with: any .item() or bool() would raise."""
    tokens, labels = (tensor.to("meta") for tensor in batch)
    weights, statistics = UniformScorer().run(tokens, labels)
    assert weights.is_meta
    merged = statistics.merge(statistics)
    assert all(getattr(merged, name).is_meta for name in ("mean", "min", "max", "ess", "clipped"))


def test_ess_is_the_share_of_tokens_that_carry_the_weight():
    supervised = torch.ones(1, 8, dtype=torch.bool)
    one = torch.tensor([[8.0] + [0.0] * 7])
    assert WeightStatistics.of(one, supervised).ess.item() == pytest.approx(1 / 8)
    half = torch.tensor([[2.0] * 4 + [0.0] * 4])
    assert WeightStatistics.of(half, supervised).ess.item() == pytest.approx(1 / 2)
    assert WeightStatistics.of(5 * half, supervised).ess.item() == pytest.approx(1 / 2), "scale does not matter"
    assert WeightStatistics.of(0 * half, supervised).ess.item() == 0


def test_weights_of_unsupervised_tokens_are_not_counted_whatever_they_are():
    weights = torch.tensor([[1.0, 3.0, float("nan"), -50.0]])
    supervised = torch.tensor([[True, True, False, False]])
    clipped = torch.tensor([[False, True, True, True]])
    statistics = WeightStatistics.of(weights, supervised, clipped)
    assert (statistics.mean, statistics.min, statistics.max, statistics.clipped) == (2, 1, 3, 1)
    assert statistics.ess.item() == pytest.approx(4**2 / (2 * 10))


def test_merging_two_batches_is_counting_them_together():
    """The batches differ in size, so a mean of their means would be wrong."""
    torch.manual_seed(0)
    weights = torch.rand(6, 10) * 3
    supervised = torch.rand(6, 10) > 0.5
    supervised[:1] = False
    parts = [
        WeightStatistics.of(w, s, w > 2)
        for w, s in zip(weights.split([1, 4, 1]), supervised.split([1, 4, 1]), strict=True)
    ]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    whole = WeightStatistics.of(weights, supervised, weights > 2)
    for name in ("mean", "min", "max", "ess", "clipped"):
        assert getattr(merged, name).item() == pytest.approx(getattr(whole, name).item(), rel=1e-6), name


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"labels is \[2, 5\]; expected .* \[2, 6\]"):
        UniformScorer().run(torch.zeros(2, 6), torch.zeros(2, 5))
