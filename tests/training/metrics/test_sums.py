"""Sums over rows, divided once."""

from __future__ import annotations

import math

import pytest
import torch

from mtp_ce import weighted_mtp_ce
from mtp_ce.training.metrics.sums import HeadSums

CPU = torch.device("cpu")


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
        sums.add(stats)
        ce += stats.ce.sum((0, 1))
        rows += stats.live.sum((0, 1))
        means.append(stats.ce.sum((0, 1)) / stats.live.sum((0, 1)))
    expected = (ce / rows).tolist()
    assert sums.ce_of_heads() == pytest.approx(expected, rel=1e-6)
    assert sums.rows.tolist() == [22 + 4, 20 + 2]
    assert sums.ce_mean() == pytest.approx(float(ce.sum() / rows.sum()), rel=1e-6)
    # The test can fail: the mean of the two means is another number.
    assert abs(float(sum(means)[0]) / 2 - expected[0]) > 1e-2


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
    sums.add(stats)
    # Head 0: 3 + 7 targets inside documents, less token 6; head 1: 2 + 6, less token 6.
    assert sums.rows.tolist() == [9, 7]
    assert sums.ce_of_heads() == pytest.approx([math.log(12)] * 2)


def test_merging_is_counting_both():
    labels = torch.arange(8).reshape(1, 8)
    one, both = HeadSums.zeros(2, CPU), HeadSums.zeros(2, CPU)
    one.add(weighted_mtp_ce(torch.randn(1, 8, 2, 8), labels, return_stats=True).stats)
    for _ in range(2):
        both.merge(one)
    assert both.rows.tolist() == [14, 12]
    assert both.ce_mean() == pytest.approx(one.ce_mean())


def test_nothing_counted_is_not_a_number_and_never_0():
    sums = HeadSums.zeros(2, CPU)
    sums.add(weighted_mtp_ce(torch.randn(1, 4, 2, 8), torch.full((1, 4), -100), return_stats=True).stats)
    assert [math.isnan(ce) for ce in (*sums.ce_of_heads(), sums.ce_mean())] == [True] * 3
