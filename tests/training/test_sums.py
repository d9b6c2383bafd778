"""Sums over rows: divided once, and right about which token each head meant."""

from __future__ import annotations

import math

import pytest
import torch

from mtp_ce import weighted_mtp_ce
from mtp_ce.training.sums import HeadSums

CPU = torch.device("cpu")


def logits_that_say(labels: torch.Tensor, horizon: int, vocabulary: int) -> list[torch.Tensor]:
    """Heads that all know the future: head h at t is sure of labels[t + 1 + h]."""
    heads = []
    for h in range(horizon):
        future = torch.roll(labels, -(h + 1), dims=1).clamp(min=0)
        heads.append(torch.nn.functional.one_hot(future, vocabulary).float() * 20)
    return heads


def test_a_batch_with_few_rows_counts_little():
    """Means of means would give the short batch half the say."""
    torch.manual_seed(0)
    labels = torch.randint(7, (2, 12))
    few = labels.clone()
    few[:, 3:] = -100
    batches = [(torch.randn(2, 12, 2, 7), labels), (torch.randn(2, 12, 2, 7), few)]
    sums = HeadSums.zeros(2, CPU)
    ce, rows = torch.zeros(2), torch.zeros(2)
    means = []
    for logits, target in batches:
        stats = weighted_mtp_ce(logits, target, return_stats=True).stats
        sums.add(stats, target)
        ce += stats.ce.sum((0, 1))
        rows += stats.live.sum((0, 1))
        means.append(stats.ce.sum((0, 1)) / stats.live.sum((0, 1)))
    results = sums.results()
    expected = (ce / rows).tolist()
    assert [result.ce for result in results] == pytest.approx(expected, rel=1e-6)
    assert [result.rows for result in results] == [22 + 4, 20 + 2]
    assert sums.ce_mean() == pytest.approx(float(ce.sum() / rows.sum()), rel=1e-6)
    assert results[0].perplexity == pytest.approx(math.exp(expected[0]), rel=1e-6)
    # The test can fail: the mean of the two means is another number.
    assert abs(float(sum(means)[0]) / 2 - expected[0]) > 1e-2


def test_a_head_that_knows_the_future_hits_every_time_and_a_shifted_one_never():
    labels = torch.arange(12).reshape(1, 12)
    heads = logits_that_say(labels, 3, 12)
    sums = HeadSums.zeros(3, CPU)
    sums.add(weighted_mtp_ce(heads, labels, return_stats=True).stats, labels)
    assert [(result.top1, result.rows) for result in sums.results()] == [(1.0, 11), (1.0, 10), (1.0, 9)]
    shifted = HeadSums.zeros(3, CPU)
    shifted.add(weighted_mtp_ce([heads[1], heads[2], heads[0]], labels, return_stats=True).stats, labels)
    assert [result.top1 for result in shifted.results()] == [0.0, 0.0, 0.0]


def test_rows_of_weight_0_and_rows_across_documents_are_not_counted():
    labels = torch.arange(12).reshape(1, 12)
    weights = torch.ones(1, 12)
    weights[0, 6] = 0
    documents = torch.tensor([[0] * 4 + [1] * 8])
    sums = HeadSums.zeros(2, CPU)
    stats = weighted_mtp_ce(
        torch.zeros(1, 12, 2, 12),
        labels,
        weights,
        weight_alignment="target",
        document_ids=documents,
        return_stats=True,
    ).stats
    sums.add(stats, labels)
    # Head 0: 3 + 7 targets inside documents, less token 6; head 1: 2 + 6, less token 6.
    assert [result.rows for result in sums.results()] == [9, 7]
    assert [result.ce for result in sums.results()] == pytest.approx([math.log(12)] * 2)


def test_merging_is_counting_both():
    labels = torch.arange(8).reshape(1, 8)
    one, both = HeadSums.zeros(2, CPU), HeadSums.zeros(2, CPU)
    stats = weighted_mtp_ce(torch.randn(1, 8, 2, 8), labels, return_stats=True).stats
    one.add(stats, labels)
    for _ in range(2):
        both.merge(one)
    assert [r.rows for r in both.results()] == [14, 12]
    assert both.ce_mean() == pytest.approx(one.ce_mean())


def test_nothing_counted_is_0_and_not_a_division_by_0():
    sums = HeadSums.zeros(2, CPU)
    labels = torch.full((1, 4), -100)
    sums.add(weighted_mtp_ce(torch.randn(1, 4, 2, 8), labels, return_stats=True).stats, labels)
    assert [(r.ce, r.top1, r.rows) for r in sums.results()] == [(0.0, 0.0, 0)] * 2
    assert sums.ce_mean() == 0.0
