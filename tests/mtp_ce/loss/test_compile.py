"""torch.compile(fullgraph=True) gives the eager result, and the operators keep the promises that it relies on."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mtp_ce import WeightedMTPLoss, weighted_mtp_ce
from mtp_ce.ops import logits as ops
from mtp_ce.options import LossInputs, LossOptions, VocabShard

B, S, H, V = 2, 5, 3, 37


@pytest.fixture(autouse=True)
def fresh_cache() -> Iterator[None]:
    """No test runs what another has compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(draw, positions: int = S, vocabulary: int = V) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels with a hole, weights."""
    labels = draw.integers(vocabulary, B, positions)
    labels[0, 2] = -100
    return draw.normal(B, positions, H, vocabulary), labels, draw.normal(B, positions)


def outcome(function: Callable[..., Any], logits: Tensor, labels: Tensor, weights: Tensor, *more: Any) -> list[Tensor]:
    """Loss, statistics and gradients of fresh leaves."""
    x, w = logits.clone().requires_grad_(), weights.clone().requires_grad_()
    loss, stats = function(x, labels, w, *more)
    return [loss.detach(), *torch.autograd.grad(loss.sum() * 3, (x, w)), *stats]


def assert_same(compiled: list[Tensor], eager: list[Tensor]) -> None:
    for one, other in zip(compiled, eager, strict=True):
        assert torch.equal(one, other)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "softcap": 5.0,
        "z_loss": 0.01,
        "label_smoothing": 0.1,
        "weight_alignment": "target",
        "loss_scale": 0.5,
        "head_reduction": "target",
        "left_halo": 1,
    },
    "none": {"reduction": "none", "head_reduction": "horizon", "shift": 0},
    "sum": {"reduction": "sum", "shift": 2},
}


@pytest.mark.parametrize(
    ("backend", "options"), [("inductor", "everything"), *(("aot_eager", name) for name in OPTIONS)]
)
def test_compiled_is_eager(impl, draw, backend: str, options: str) -> None:
    """Loss, statistics and both gradients bit for bit, between operations that are compiled around the loss."""

    def step(x: Tensor, y: Tensor, w: Tensor) -> Any:
        if options == "everything":  # positions in the midst of the labels
            x = x[:, 1:-1]
        return weighted_mtp_ce(x * 2, y, w, impl=impl, return_stats=True, **OPTIONS[options])

    data = batch(draw)
    assert_same(outcome(torch.compile(step, fullgraph=True, backend=backend), *data), outcome(step, *data))


def test_compiled_with_documents_lengths_and_head_weights(impl, device, draw) -> None:
    """Every optional tensor through the graph; heads as a list."""
    ids = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]], device=device)
    lens, a = torch.tensor([5, 4], device=device), torch.tensor([1.0, 0.0, 0.5], device=device)

    def step(x: Tensor, y: Tensor, w: Tensor, n: Tensor) -> Any:
        return weighted_mtp_ce(
            list((x + 1).unbind(2)), y, w, document_ids=ids, seq_lens=lens, head_weights=a, normalizer=n, impl=impl,
            return_stats=True,
        )  # fmt: skip

    data = (*batch(draw), torch.tensor(6.0, device=device))
    assert_same(outcome(torch.compile(step, fullgraph=True, backend="aot_eager"), *data), outcome(step, *data))


def test_a_compiled_module_is_eager(impl, draw) -> None:
    """WeightedMTPLoss with a buffer, compiled as a part of a model is."""
    logits, labels, weights = batch(draw)
    module = WeightedMTPLoss(head_weights=torch.tensor([1.0, 0.5, 0.2]), impl=impl, return_stats=True).to(logits.device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(outcome(compiled, logits, labels, weights), outcome(module, logits, labels, weights))


@pytest.mark.parametrize(("impl", "dynamic"), [("cpu", None), ("cpu", True), ("triton", None)])
def test_new_shapes_do_not_recompile(draw, impl, dynamic: bool | None) -> None:
    """Batches of every length: one graph with sizes as numbers, at most one with them as constants."""
    counter = CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, y: Tensor, w: Tensor, n: Tensor) -> Any:
        return weighted_mtp_ce(x * 2, y, w, normalizer=n, weight_alignment="target", impl=impl, return_stats=True)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    for positions, count in ((4, 4.0), (5, 5.0), (3, 8.0)):
        data = (*batch(draw, positions, V + positions), torch.tensor(count, device=draw.integers(1, 1).device))
        assert_same(outcome(compiled, *data), outcome(step, *data))
    assert counter.frame_count <= 2


def test_a_number_that_changes_between_calls_is_not_frozen(impl, draw) -> None:
    """A float normalizer: the count of each batch, not of the first."""

    def step(x: Tensor, y: Tensor, w: Tensor, n: float) -> Any:
        return weighted_mtp_ce(x * 2, y, w, normalizer=n, impl=impl, return_stats=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    data = batch(draw)
    for count in (4.0, 5.0, 8.5):
        assert_same(outcome(compiled, *data, count), outcome(step, *data, count))


@pytest.mark.parametrize(("impl", "backend"), [("cpu", "aot_eager"), ("cpu", "inductor"), ("triton", "aot_eager")])
def test_compiled_in_place_is_eager_out_of_place(impl, draw, backend: str) -> None:
    """The gradient of what comes before the logits, which the compiled backward may overwrite."""

    def step(x: Tensor, y: Tensor, w: Tensor, inplace: bool) -> Any:
        return weighted_mtp_ce(x * 2, y, w, inplace_backward=inplace, impl=impl, return_stats=True)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    data = batch(draw)
    assert_same(outcome(compiled, *data, True), outcome(step, *data, False))


def test_a_compiled_forward_without_gradients(impl, draw) -> None:
    """Evaluation: no graph, no shares, the same number."""
    logits, labels, weights = batch(draw)

    def step(x: Tensor) -> Tensor:
        return weighted_mtp_ce(x, labels, weights, impl=impl)

    with torch.no_grad():
        assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(logits), step(logits))


CHECKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "changing": {"changing": True, "softcap": 5.0, "z_loss": 0.1, "smoothing": 0.1},
    "everything": {"tensors": True, "softcap": 5.0, "z_loss": 0.1, "smoothing": 0.1, "reduction": "none"},
    "list_of_half": {"listed": True, "dtype": torch.bfloat16},
    "target": {"target": True, "reduction": "sum"},
    "halo": {"target": True, "left_halo": 1, "tensors": True},
    "no_weights": {"weights": False},
    "sliced": {"sliced": True, "dtype": torch.bfloat16},
    "empty": {"positions": 0},
}


def operator_arguments(draw, impl: str, case: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Arguments of the loss, its forward, the two backward operators of the logits, and that of the weights."""
    positions = case.get("positions", 3)
    logits = draw.normal(1, positions, 2, 9, dtype=case.get("dtype", torch.float32))
    if case.get("sliced"):
        logits = torch.nn.functional.pad(logits, (3, 4))[..., 3:12]
    given = [x.contiguous() for x in logits.unbind(2)] if case.get("listed") else [logits]
    left = case.get("left_halo", 0)
    tokens = positions + 3 * left
    labels = draw.integers(9, 1, tokens)
    weights = draw.uniform(1, tokens) if case.get("weights", True) else None
    inputs = LossInputs(labels, weights)
    if case.get("tensors"):
        inputs = LossInputs(labels, weights, draw.uniform(2), draw.integers(4, 1), draw.integers(2, 1, tokens))
    if case.get("changing"):
        inputs = inputs._replace(terms=draw.uniform(4, dtype=torch.float64) / 2)
    options = LossOptions(
        weight_alignment="target" if case.get("target") else "position", reduction=case.get("reduction", "mean"),
        head_reduction="target" if left else "live", left_halo=left,
        loss_scale=0.5, softcap=case.get("softcap"), z_loss=case.get("z_loss", 0.0),
        label_smoothing=case.get("smoothing", 0.0),
    )  # fmt: skip
    call = ops.LogitsCall(True, weights is not None, False, impl)
    whole = VocabShard(9)
    forward = (given, *inputs, *options.values(), *call, *whole)
    results = ops.logits_forward(*forward)
    loss, _, row_max, log_sum, _, _, d_row_weights, factor = results
    d_loss = torch.ones_like(loss)
    backward = (d_loss, given, *inputs, *options.values(), row_max, log_sum, factor, impl, *whole)
    of_weights = (d_loss, weights, d_row_weights, factor, 1 + left, options.weight_alignment)
    leaves = [x.clone().requires_grad_() for x in given]
    if weights is not None:
        inputs = inputs._replace(token_weights=weights.clone().requires_grad_())
    differentiated = (leaves, *inputs, *options.values(), *call, *whole)
    return [differentiated, forward, backward, backward, *([] if weights is None else [of_weights])]


@pytest.mark.parametrize(
    ("impl", "name"), [*(("cpu", name) for name in CHECKED), ("triton", "plain"), ("triton", "everything")]
)
def test_the_operators_keep_their_promises(impl, draw, name: str) -> None:
    """torch.library.opcheck: schema, mutation, fake tensors, autograd, dynamic shapes."""
    operators = ("logits_loss", "logits_forward", "logits_backward", "logits_backward_", "weights_backward")
    for operator, arguments in zip(operators, operator_arguments(draw, impl, CHECKED[name]), strict=False):
        torch.library.opcheck(getattr(torch.ops.mtp_ce, operator).default, arguments)
