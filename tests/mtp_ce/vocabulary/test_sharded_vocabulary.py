"""Logits and output layers that are DTensors sharded over the vocabulary: the losses of one process, on 2 gloo ranks.

One start of the ranks (ranks.py) runs everything here: the suite's random cases, and the scenarios by name. Four ranks,
and ten times the cases, are slow tests. With few entries some ranks hold none, and half of the cases have no label in
the second half of the vocabulary.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_ce.loss import MTPStats
from mtp_ce.ops.cpu import BLOCK_BYTES

HERE = Path(__file__).resolve().parent
SCENARIOS = (
    "all_rows_masked", "numbers_sent", "different_calls", "in_place", "retained_graph", "other_functions", "refused",
    "documented", "peak_memory", "compiled",
)  # fmt: skip
# How many seeds in CI, and in the slow tier. The interpreter takes 20 times as long as the passes of the CPU.
SEEDS = {
    ("linear", "cpu"): (60, 200),
    ("logits", "cpu"): (60, 200),
    ("linear", "triton"): (8, 60),
    ("logits", "triton"): (8, 60),
}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=lambda n: f"{n}_ranks")
def found(request, start_ranks, tmp_path_factory) -> SimpleNamespace:
    """What all ranks found: `of(name)` is a list of results, one a rank."""
    slow = request.param > 2
    cases = [[*kind, seed] for kind, counts in SEEDS.items() for seed in range(counts[slow])]
    jobs = {"scenarios": SCENARIOS, "cases": cases}
    of = start_ranks(request.param, jobs, tmp_path_factory.mktemp("ranks"), 1800 if slow else 1200)
    return SimpleNamespace(of=of, ranks=request.param, slow=slow)


def joined(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim)


def whole_results(kind: str, parts: list[dict[str, Any]]) -> SimpleNamespace:
    """The results of all ranks as one process returns them; what several ranks hold has the same bits on each."""
    first = parts[0]
    got: dict[str, Any] = {}
    for name, value in first.items():
        others = [part[name] for part in parts]
        if name == "placements" or value is None:
            assert all(other == value for other in others), name
        elif name == "stats":
            for field, columns in zip(MTPStats._fields, zip(*others, strict=True), strict=True):
                assert all(same_bits(column, columns[0]) for column in columns), field
            got[name] = MTPStats(*value)
        elif name == "d_logits":
            got[name] = [joined([*heads], -1) for heads in zip(*others, strict=True)]
        elif name in ("d_unembed", "d_bias"):
            got[name] = joined(others, 0)
        elif name == "d_hidden":
            for heads in zip(*others, strict=True):
                assert all(same_bits(head, heads[0]) for head in heads), name
            got[name] = value
        else:
            assert all(same_bits(other, value) for other in others), name
            got[name] = value
    for name in ("d_logits", "d_hidden", "d_unembed", "d_bias", "d_token_weights"):
        got.setdefault(name, None)
    return SimpleNamespace(**got)


def same_bits(x: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, NaN included."""
    return torch.equal(x.nan_to_num(12345.0), other.nan_to_num(12345.0)) and torch.equal(x.isnan(), other.isnan())


@pytest.mark.parametrize(("kind", "impl"), SEEDS)
def test_random_cases_err_at_most_three_times_as_much_as_torch_in_one_process(
    kind, impl, found, ranks_file, expect, assert_errs, draw_on
):
    """Losses, statistics, gradients; all ranks have the same bits, and gradients the placement of their tensors."""
    cases = ranks_file.load(HERE.parent / "loss" / "test_random_cases.py")
    draw_one: Callable[..., Any] = cases.draw_linear_case if kind == "linear" else cases.draw_case
    wrong = []
    for seed in range(SEEDS[kind, impl][found.slow]):
        case = ranks_file.mirrored(draw_one(seed, draw_on(torch.device("cpu"))), seed)
        try:
            parts = found.of(kind, impl, seed)
            got = whole_results(kind, parts)
            assert_errs(got, expect(case.given, case.labels, case.weights, **case.options))
            for name, placement in parts[0]["placements"].items():
                if name != "first" or kind == "logits":
                    dim = case.labels.dim() + (isinstance(case.given, Tensor) and case.given.dim() == 4)
                    assert placement == f"(Shard(dim={dim if name == 'first' else 0}),)", name
        except (AssertionError, KeyError) as error:
            wrong.append(f"seed {seed}: {str(error)[-1500:]}")
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:5])


def test_all_rows_masked_give_a_loss_and_gradients_of_exactly_zero(found):
    for rank in found.of("all_rows_masked"):
        assert all(bool((x == 0).all()) for x in rank)


def test_a_row_costs_at_most_seven_numbers_and_d_hidden(found):
    """Against V / ranks logits for gathering them. A call adds two, by which ranks notice that theirs differ."""
    for rank in found.of("numbers_sent"):
        rows, D = rank["rows"], rank["D"]
        for (impl, kind, name), sent in rank["counts"].items():
            gathered = [count for collective, count in sent if collective == "gather"]
            reduced = [count for collective, count in sent if collective == "reduce"]
            assert gathered[0] == 2
            live = sum(gathered[1:]) // (3 if name == "plain" else 7)
            assert sum(gathered[1:]) == live * (3 if name == "plain" else 7)
            # The logits' path of the CPU leaves out rows without a target.
            assert live == rows if (impl, kind) != ("cpu", "logits") else 0 < live < rows
            assert sum(reduced) == (rows * D if kind == "linear" else 0)
            if kind == "linear":
                assert len(reduced) == len(gathered) - 1 > 1, "chunk by chunk"


def test_what_differs_on_one_rank_raises_on_all_of_them(found):
    """Else the others would wait for a rank that raises, or combine numbers of different rows.

    And a layer that FSDP shards, called outside of its forward, would return a loss of nothing.
    """
    for rank, raised in enumerate(found.of("different_calls")):
        for name, said in raised.items():
            if name == "entries" and rank == found.ranks - 1:
                assert "as torch.chunk divides them" in said
            elif name != "entries" or found.ranks == 2:
                assert said.startswith("ValueError: labels, token_weights, another input, an option or V differ"), name
                assert "FSDP" in said
            else:
                assert said.startswith("ValueError"), name


def test_the_gradient_overwrites_a_shard_of_logits_where_nobody_else_needs_it(found):
    for rank in found.of("in_place"):
        for impl in ("cpu", "triton"):
            assert torch.equal(rank[impl, True], rank[impl, False])
            assert rank[impl, "overwritten"]
        assert "logits is a leaf" in rank["leaf"]
        assert "modified by an inplace operation" in rank["saved"]


def test_a_second_backward_reads_gradients_that_the_first_left_alone(found):
    for rank in found.of("retained_graph"):
        for once, twice in zip(rank["once"], rank["twice"], strict=True):
            torch.testing.assert_close(3 * once, twice)
        assert "no second derivative" in rank["second"]


def test_every_function_of_the_loss_takes_a_shard(found):
    for rank in found.of("other_functions"):
        for name, (got, expected) in rank.items():
            close = {"rtol": 2e-2, "atol": 2e-2} if name == "autocast" else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(got, expected, **close, msg=lambda text, name=name: f"{name}: {text}")


def test_what_one_process_refuses_all_ranks_refuse(found):
    for rank in found.of("refused"):
        assert "IndexError: labels[0, 3] is 11" in rank["label"]
        assert "[0, 11)" in rank["label"]
        assert "IndexError: labels[0, 3] is 11" in rank["label, linear"]
        assert "drop_dead_rows is 3" in rank["too few rows"]
        assert f"expected at least {-(-11 // found.ranks) * 4}, one row of logits" in rank["chunk_bytes"]
        assert "as torch.chunk divides them" in rank["uneven"]
        assert "or V differ" in rank["of another V"]
        assert "functorch transforms" in rank["torch.func"], "torch's own error about DTensors"


def test_the_program_of_the_documentation_runs(found):
    first, *others = found.of("documented")
    assert first > 0
    assert all(torch.equal(first, other) for other in others)


def test_a_rank_holds_its_part_of_the_logits_and_of_the_gradient(found):
    """Peak memory falls with the ranks, but for the gradient of the hidden states and a block of rows."""
    for rank in found.of("peak_memory"):
        assert rank["shard"] < rank["whole"] / found.ranks + rank["hidden"] + 2 * BLOCK_BYTES, rank


def test_both_losses_compile_into_one_graph(found):
    for rank in found.of("compiled"):
        for name, pairs in rank.items():
            for got, expected in pairs:
                torch.testing.assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")
