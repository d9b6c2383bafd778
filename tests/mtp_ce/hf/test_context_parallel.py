"""A sequence that is cut over 4 gloo ranks: with halos the loss, statistics and gradients are those of one process.

The scenarios are those of context_ranks.py, on models of transformers whose attention gathers keys and values.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

SCENARIOS = ("slices", "other_heads", "rank_without_targets", "trainer", "documented")


@pytest.fixture(scope="module")
def found(start_ranks, tmp_path_factory) -> Any:
    """What all ranks found: `found(name)` is a list of results, one a rank."""
    module = Path(__file__).with_name("context_ranks.py")
    jobs = {"module": str(module), "scenarios": SCENARIOS, "cases": []}
    return start_ranks(4, jobs, tmp_path_factory.mktemp("context"), 1200)


def assert_same_step(case: Any, alone: dict[str, Any], shared: dict[str, Any]) -> None:
    """Loss, every statistic and every gradient; some rows are masked, and others not."""
    named = {"loss": (shared["loss"], alone["loss"])}
    if case != "teacher_forcing":  # whose slices compute a token's row for the heads of their own positions
        named |= {f"stats {name}": (shared["stats"][name], x) for name, x in alone["stats"].items()}
    named |= {f"gradient of {name}": (shared["gradients"][name], x) for name, x in alone["gradients"].items()}
    assert shared["gradients"].keys() == alone["gradients"].keys()
    assert 0 < alone["stats"]["live"].float().mean() < 1
    assert sum(bool(x.any()) for x in alone["gradients"].values()) >= 4
    for name, (got, expected) in named.items():
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6, msg=lambda m, n=(case, name): f"{n}: {m}")


@pytest.mark.parametrize("scenario", SCENARIOS[:3])
def test_slices_of_four_ranks_are_the_whole(found, scenario: str) -> None:
    """Contiguous and in zig-zag, documents cut anywhere, more heads than a slice has positions, every kind of head."""
    for case, (alone, shared) in found(scenario)[0].items():
        assert_same_step(case, alone, shared)


def test_the_trainer_trains_and_evaluates_on_slices_as_one_process_does_on_the_whole(found) -> None:
    """Losses that are logged, eval_loss, parameters after two steps of two micro-batches; shifted labels likewise."""
    for case, (alone, shared) in found("trainer")[0].items():
        for name in ("losses", "ce", "eval"):
            assert shared[name] == pytest.approx(alone[name], rel=1e-4), (case, name)
        for name, expected in alone["parameters"].items():
            got = shared["parameters"][name]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6, msg=lambda m, n=(case, name): f"{n}: {m}")


def test_the_program_of_the_page_is_that_of_one_process(found) -> None:
    """docs/many_gpus.md, on every rank."""
    for rank in found("documented"):
        for expected, got in rank:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6)
