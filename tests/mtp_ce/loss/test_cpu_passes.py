"""The CPU path's operations: how often it passes over the logits, and how many calls a few rows cost.

A pass costs time in proportion to the vocabulary, a call some microseconds: both are counted, since no time on a shared
machine would hold what a change gained.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtp_ce.kernels.results import RowResults, Rows
from mtp_ce.ops import cpu
from mtp_ce.options import LossInputs, LossOptions

B, S, H, V = 1, 4, 1, 4096  # one block


class Calls(TorchDispatchMode):
    """Names of all operations, in order, and of those that take or return a tensor of V columns; views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.passes: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func):
            name = func.overloadpacket.__name__
            self.names.append(name)
            leaves = tree_leaves((args, kwargs, result))
            if any(isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] == V for x in leaves):
                self.passes.append(name)
        return result


def calls_of(run: Callable[[], Any]) -> Calls:
    with Calls() as calls:
        run()
    return calls


def step(dtype: torch.dtype, *, inplace: bool, rows: int = S, peak: float = 0.0) -> tuple[Calls, Calls]:
    """Operations of a forward and a backward; `peak` is added to each label's logit."""
    logits, labels = torch.randn(B, rows, H, V, dtype=dtype), torch.randint(V, (B, rows))
    logits.scatter_add_(3, labels[:, :, None, None], torch.full((B, rows, H, 1), peak, dtype=dtype))
    inputs, given = LossInputs(labels, torch.rand(B, rows)), LossOptions(shift=0)
    heads = list(logits.unbind(2))
    d_heads = heads if inplace else [torch.empty_like(x) for x in heads]
    results: list[Any] = []

    def forward() -> None:
        results.append(cpu.forward(heads, inputs, given, with_top1=False, with_d_weights=False))
        results.append(cpu.mean(results[0].out, results[0].valid, None, given)[1])

    def backward() -> None:
        d_loss = torch.ones(B, rows)
        cpu.backward(d_loss, heads, d_heads, inputs, given, results[0].row_max, results[0].log_sum, results[1])

    return calls_of(forward), calls_of(backward)


LABEL = {"gather", "scatter_add_"}  # of one column
EXP2 = ["mul_", "threshold_", "exp2_"]
EXP = {True: ["exp_"], False: EXP2}  # by `prefers_exp`


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> bool:
    """Whether `exp_` is the faster one: no, where a test does not say."""
    faster: bool = getattr(request, "param", False)
    monkeypatch.setattr(cpu, "prefers_exp", lambda: faster)
    return faster


def passes_of(calls: Calls) -> list[str]:
    return [name for name in calls.passes if name not in LABEL]


@pytest.mark.parametrize("processor", [True, False], indirect=True)
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_passes_over_a_block(dtype: torch.dtype, inplace: bool, processor: bool) -> None:
    """No pass more than these."""
    forward, backward = (passes_of(calls) for calls in step(dtype, inplace=inplace))
    assert forward == ["copy_", "amax", "sub_", *EXP[processor], "sum"]
    if dtype == torch.float32:  # read once, written where the gradient stays
        assert backward == ["sub", *EXP[processor], "mul_"]
    else:
        assert backward == ["copy_", "sub_", *EXP[processor], "mul_", "copy_"]


@pytest.mark.parametrize("processor", [True, False], indirect=True)
def test_rows_that_underflow_never_meet_exp(processor: bool) -> None:
    """It takes 50 times as long there, on any processor."""
    forward, backward = (passes_of(calls) for calls in step(torch.float32, inplace=True, peak=95.0))
    assert forward == ["copy_", "amax", "sub_", *EXP2, "sum"]
    assert backward == ["sub", *EXP2, "mul_"]


@pytest.mark.parametrize("processor", [True, False], indirect=True)
@pytest.mark.parametrize("low", [-95.0, -1e4, -math.inf, math.nan])
def test_how_a_row_is_computed_follows_from_that_row_alone(processor: bool, low: float) -> None:
    """Exponentials differ in their last bits, so a row must not choose them for its neighbours in a block."""
    logits = torch.randn(B, S, H, V)
    beside = logits.clone()
    beside[:, 1, :, : V // 2] = low
    inputs, given = LossInputs(torch.randint(V // 2, V, (B, S))), LossOptions(shift=0)
    others = [0, 2, 3]
    seen = []
    for given_logits in (logits, beside):
        heads = list(given_logits.unbind(2))
        results = cpu.forward(heads, inputs, given, with_top1=False, with_d_weights=False)
        d_heads = [torch.empty_like(x) for x in heads]
        factor, log_sum = torch.ones(()), results.log_sum
        cpu.backward(torch.ones(B, S), heads, d_heads, inputs, given, results.row_max, log_sum, factor)
        seen.append([x[:, others] for x in (results.out, log_sum, *d_heads)])
    for ours, theirs in zip(*seen, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("processor", [True, False], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_passes_over_a_block_of_the_linear_path(dtype: torch.dtype, processor: bool) -> None:
    """As a forward and a backward, with one exponential."""
    logits, column = torch.randn(S, V, dtype=dtype), [torch.empty(S) for _ in range(3)]
    rows = Rows(torch.randint(V, (S,), dtype=torch.int32), torch.rand(S) + 0.1, torch.ones(S, dtype=torch.bool))
    results = RowResults(*column, None)
    calls = calls_of(lambda: cpu.forward_backward(logits, rows, results, LossOptions(), gradient=True))
    between = ["amax", "sub_", *EXP[processor], "sum", "mul_"]
    assert passes_of(calls) == (between if dtype == torch.float32 else ["copy_", *between, "copy_"])


@pytest.mark.parametrize("processor", [True, False], indirect=True)
def test_few_rows_cost_few_calls(processor: bool) -> None:
    """With 32 rows of one head a step is as fast as eager only if little stands around the passes."""
    forward, backward = step(torch.float32, inplace=True, rows=32)
    around = len(forward.names) - len(forward.passes), len(backward.names) - len(backward.passes)
    most = (73, 50) if processor else (60, 44)
    assert around[0] <= most[0]
    assert around[1] <= most[1]


def test_statistics_cost_no_second_pass_for_top1() -> None:
    """The maximum and its index come from one pass."""
    logits = torch.randn(B, S, V)
    inputs, given = LossInputs(torch.randint(V, (B, S))), LossOptions(shift=0)
    calls = calls_of(lambda: cpu.forward([logits], inputs, given, with_top1=True, with_d_weights=False))
    assert [name for name in calls.passes if "max" in name] == ["max"]
