"""The share of weight on noise, and the effective sample size of clean tokens, by hand."""

from __future__ import annotations

import pytest
import torch

from mtp_ce.scorers.planted_truth import PlantedTruth
from mtp_ce.training.metrics.noise import NoiseSums


def sums_of(weights: list[float], noise: list[int], predicted: list[int] | None = None) -> NoiseSums:
    sums = NoiseSums.zeros(torch.device("cpu"))
    mask = torch.ones(1, len(noise)) if predicted is None else torch.tensor([predicted])
    sums.add(torch.tensor([weights]), torch.tensor([noise]).bool(), mask.bool())
    return sums


def test_shares_count_predicted_tokens_alone():
    """Clean 2, 1, 0.5 and noise 0.5; a noise token of weight 9 is predicted by nothing."""
    found = sums_of([9.0, 2.0, 1.0, 0.5, 0.5], [1, 0, 0, 0, 1], [0, 1, 1, 1, 1]).metrics()
    assert found["train/noise_token_share"] == 1 / 4
    assert found["train/noise_weight_share"] == 0.5 / 4
    assert found["train/clean_ess"] == pytest.approx(3.5**2 / (4 * (4 + 1 + 0.25 + 0.25)))


def test_the_truth_has_the_largest_effective_sample_of_clean_tokens():
    """Uniform weights: (1 - share)^2; the truth: 1 - share; sharp weights on clean tokens alone: less."""
    noise = [1, 1, 0, 0, 0]
    labels = torch.arange(5)[None]
    truth = PlantedTruth().run(labels, labels, noise=torch.tensor([noise]).bool()).weights[0].tolist()
    assert truth == pytest.approx([0, 0, 5 / 3, 5 / 3, 5 / 3])
    of = {
        name: sums_of(weights, noise).metrics()["train/clean_ess"]
        for name, weights in {"uniform": [1.0] * 5, "truth": truth, "sharp": [0.0, 0.0, 5.0, 0.0, 0.0]}.items()
    }
    assert of == pytest.approx({"uniform": 0.36, "truth": 0.6, "sharp": 0.2})


def test_a_batch_of_noise_alone_keeps_its_weight():
    labels = torch.tensor([[7, 8, -100]])
    found = PlantedTruth().run(labels, labels, noise=torch.ones(1, 3, dtype=torch.bool))
    assert found.weights.tolist() == [[1.0, 1.0, 0.0]]
    assert float(found.statistics.mean) == 1
    assert PlantedTruth().run(labels, labels, noise=None).weights.tolist() == [[1.0, 1.0, 0.0]]
