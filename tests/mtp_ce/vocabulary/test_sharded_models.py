"""MTPWrapper on models whose output layer is sharded over ranks: the loss and gradients of one process.

The scenarios are those of models.py, on 2 gloo ranks; on 4, a mesh of 2 x 2, in the slow tier.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

SCENARIOS = ("parallelized", "loaded", "two_dimensions", "other_calls")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=lambda n: f"{n}_ranks")
def found(request, start_ranks, tmp_path_factory) -> SimpleNamespace:
    """What all ranks found."""
    jobs = {"module": "models.py", "scenarios": SCENARIOS, "cases": []}
    of = start_ranks(request.param, jobs, tmp_path_factory.mktemp("models"), 1200)
    return SimpleNamespace(of=of, ranks=request.param)


def same_step(alone: dict[str, Any], shared: dict[str, Any]) -> None:
    """The same loss, and the same gradient of every parameter; the parameters of a tied model have two names."""
    torch.testing.assert_close(shared["loss"], alone["loss"], rtol=1e-5, atol=1e-6)
    assert len(alone["gradients"]) > 10
    assert alone["gradients"].keys() <= shared["gradients"].keys()
    for name, gradient in alone["gradients"].items():
        got = shared["gradients"][name]
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_a_model_that_torch_parallelizes_trains_as_in_one_process(found):
    """Heads of three kinds, both paths of the loss, tied embeddings; V is no multiple of the ranks."""
    for rank in found.of("parallelized"):
        assert len(rank) == 5
        for alone, shared in rank.values():
            same_step(alone, shared)


def test_a_model_that_transformers_shards_on_loading_trains_as_in_one_process(found):
    for rank in found.of("loaded"):
        assert rank["placement"] == "(Shard(dim=0),)"
        same_step(*rank["steps"])


def test_fsdp_around_a_sharded_model_trains_as_in_one_process(found):
    """On a mesh of two dimensions; the ranks of one of them have rows of their own."""
    for rank in found.of("two_dimensions"):
        assert rank["placements"].count("dim=0") == 2, "sharded twice"
        same_step(*rank["steps"])


def test_logits_entropy_and_drafts_of_a_sharded_model_are_whole_on_every_rank(found):
    for rank in found.of("other_calls"):
        for alone, shared in zip(rank["alone"], rank["shared"], strict=True):
            torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-5)
