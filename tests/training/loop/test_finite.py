"""What counts as finite, and what does not: of every dtype, wherever it lies."""

from __future__ import annotations

import math

import pytest
import torch

from mtp_ce.training.loop.finite import first_not_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 777, -1])
def test_one_value_is_found_wherever_it_lies(dtype, value, place):
    tensors = {name: torch.ones(1031, dtype=dtype) for name in ("one", "other", "last")}
    assert first_not_finite(tensors) is None
    tensors["other"][place] = tensors["last"][0] = value
    name, found = first_not_finite(tensors)
    assert name == "other"
    assert str(found) == str(value)


def test_the_largest_numbers_of_a_dtype_are_finite():
    """Their sum is not, nor is their norm."""
    largest = {
        str(dtype): torch.full((100,), torch.finfo(dtype).max, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    assert first_not_finite(largest) is None


def test_counters_scalars_and_empty_shards_pass():
    others = {"step": torch.tensor(3.0), "count": torch.tensor([1, 2]), "mask": torch.tensor(True)}
    assert first_not_finite({**others, "empty": torch.zeros(0, 3)}) is None
    assert first_not_finite({"empty": torch.zeros(0)}) is None
    assert first_not_finite({}) is None
    assert first_not_finite({**others, "scalar": torch.tensor(math.nan)})[0] == "scalar"
