"""One head's losses on a shard of the vocabulary beside those of torch's loss_parallel and of Liger on the same shard.

The cases are those that only a vocabulary in parts can get wrong: the largest entry, the label or everything that is
not masked on one rank alone; logits so large, or so alike, that each rank's maximum and base decide the rounding.
"""

from typing import Any

import pytest
from torch import Tensor


@pytest.fixture(
    scope="module",
    # Liger imports transformers, and its kernels run in Triton's interpreter.
    params=["loss_parallel_of_logits loss_parallel_of_layers", pytest.param("liger", marks=pytest.mark.slow)],
    ids=lambda names: names.partition("_of")[0],
)
def found(request, start_ranks, tmp_path_factory) -> dict[str, list[Any]]:
    """What both ranks found, by scenario."""
    names = request.param.split()
    jobs = {"module": "peers.py", "scenarios": names, "cases": []}
    of = start_ranks(2, jobs, tmp_path_factory.mktemp("peers"), 1200)
    return {name: of(name) for name in names}


def error(results: list[Tensor], exact: list[Tensor], i: int) -> float:
    return float((results[i].double() - exact[i]).abs().max()) if exact[i].numel() else 0.0


def test_errors_are_at_most_three_times_the_peers_own(found):
    """Of loss and gradients, against torch in float64; every rank has the same bits."""
    wrong = []
    for scenario, (first, *others) in found.items():
        if first is None:
            pytest.skip("Liger is not installed")
        assert len(first) > 5
        for name, (ours, peer, exact) in first.items():
            for rank in others:
                assert all((x == other).all() for x, other in zip(ours, rank[name][0], strict=True)), name
            for i, result in enumerate(ours):
                assert result.shape == exact[i].shape
                # Two units in the last place of the largest number, where the peer happens to be exact.
                least = 2**-22 * float(exact[i].abs().max())
                if not error(ours, exact, i) <= 3 * error(peer, exact, i) + least:
                    wrong.append(f"{scenario}, {name}, result {i}: {error(ours, exact, i)} {error(peer, exact, i)}")
    assert not wrong, "\n".join(wrong)
