"""Numbers of the loss in other forms: 0-d tensors, which compile once, numpy scalars, and weights that are masks."""

import math
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mtp_ce import WeightedMTPLoss, token_ce, weighted_mtp_ce, weighted_mtp_linear_ce

B, S, H, D, V = 1, 4, 2, 3, 9
TERMS = {"loss_scale": 0.3, "softcap": 5.0, "z_loss": 0.01, "label_smoothing": 0.1}


def outcome(given: tuple[Tensor, ...], labels: Tensor, weights: Tensor, **options: Any) -> list[Tensor]:
    """Loss, gradients under an upstream other than 1, and statistics, on logits or on hidden and unembed."""
    leaves = [x.clone().requires_grad_() for x in (*given, weights)]
    loss_of = weighted_mtp_ce if len(given) == 1 else weighted_mtp_linear_ce
    loss, stats = loss_of(*leaves[:-1], labels, leaves[-1], return_stats=True, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum() * 3, leaves), *stats]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    for x, y in zip(one, other, strict=True):
        assert torch.equal(x, y)


def batch(draw) -> tuple[list[tuple[Tensor, ...]], Tensor, Tensor]:
    """Logits, and hidden states with unembed; labels with a hole, weights with a zero."""
    labels, weights = draw.integers(V, B, S), draw.uniform(B, S)
    labels[0, 2], weights[0, 0] = -100, 0.0
    return [(draw.normal(B, S, H, V),), (draw.normal(B, S, H, D), draw.normal(V, D))], labels, weights


@pytest.mark.parametrize("impl", ["cpu", "triton", "reference"])
def test_a_tensor_gives_the_numbers_result(impl, draw) -> None:
    """Bit for bit: each term alone and all together, in every reduction, beside every kind of normalizer."""
    givens, labels, weights = batch(draw)
    device = labels.device
    cases: list[tuple[list[str], str, Any]] = [([*TERMS], reduction, None) for reduction in ("mean", "sum", "none")]
    if impl != "triton":  # its interpreter is slow, and the four are read alike
        cases += [([name], "mean", None) for name in TERMS]
    cases += [(["loss_scale", "softcap"], "mean", normalizer) for normalizer in (3.5, torch.tensor(3.5, device=device))]
    for names, reduction, normalizer in cases:
        numbers = {name: TERMS[name] for name in names}
        tensors = {name: torch.tensor(TERMS[name], dtype=torch.float64, device=device) for name in names}
        how = {"reduction": reduction, "normalizer": normalizer, "impl": impl}
        for given in givens:
            expected = outcome(given, labels, weights, **numbers, **how)
            assert_same(outcome(given, labels, weights, **tensors, **how), expected)
            assert not torch.equal(outcome(given, labels, weights, **how)[0], expected[0]), names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_tensor_of_any_dtype_beside_numbers(impl, draw, dtype: torch.dtype) -> None:
    """A softcap of 5 is a softcap of 5."""
    givens, labels, weights = batch(draw)
    softcap = torch.tensor(5, dtype=dtype, device=labels.device)
    for given in givens:
        expected = outcome(given, labels, weights, softcap=5.0, z_loss=0.1, impl=impl)
        assert_same(outcome(given, labels, weights, softcap=softcap, z_loss=0.1, impl=impl), expected)
    (hidden, unembed) = givens[1]
    assert torch.equal(
        token_ce(hidden, unembed, labels, softcap=softcap, impl=impl),
        token_ce(hidden, unembed, labels, softcap=5.0, impl=impl),
    )
    module = WeightedMTPLoss(softcap=softcap, impl=impl)
    assert torch.equal(module(givens[0][0], labels), weighted_mtp_ce(givens[0][0], labels, softcap=5.0, impl=impl))


def test_nothing_to_predict_is_exactly_0_whatever_the_tensors_are(impl, draw) -> None:
    """Also with a normalizer of 0 and a scale that is a tensor."""
    givens, labels, weights = batch(draw)
    zero = torch.tensor(0.0, device=labels.device)
    for scale in (zero, zero + 2):
        for given in givens:
            nothing = torch.full_like(labels, -100)
            results = outcome(given, nothing, weights, loss_scale=scale, normalizer=zero, impl=impl)
            # The loss, and a gradient for each tensor; statistics follow.
            assert all(bool((result == 0).all()) for result in results[: len(given) + 2])
    # A scale of 0 is a loss of 0.
    assert outcome(givens[0], labels, weights, loss_scale=zero, impl=impl)[0].item() == 0


@pytest.mark.parametrize("impl", ["cpu"])
def test_a_value_out_of_range_is_named_on_a_cpu(impl, draw) -> None:
    """Where reading it waits for nobody; on a GPU with validate=True."""
    givens, labels, _ = batch(draw)
    with pytest.raises(ValueError, match=r"softcap is -1.0; expected a number above 0"):
        weighted_mtp_ce(*givens[0], labels, softcap=torch.tensor(-1.0), impl=impl)
    with pytest.raises(ValueError, match=r"label_smoothing is 1.5; expected"):
        weighted_mtp_linear_ce(*givens[1], labels, label_smoothing=torch.tensor(1.5), impl=impl)


@pytest.mark.parametrize("path", ["logits", "linear"])
def test_tensors_that_change_compile_once(impl, draw, path: str) -> None:
    """Ten values of all four, where the ninth number would raise; the eager result each time, bit for bit."""
    torch._dynamo.reset()
    givens, labels, weights = batch(draw)
    given = givens[path == "linear"]
    counter = CompileCounterWithBackend("aot_eager")

    def step(*tensors: Tensor) -> Tensor:
        *inputs, scale, cap, z, smoothing = tensors
        loss_of = weighted_mtp_ce if path == "logits" else weighted_mtp_linear_ce
        return loss_of(
            *[x * 2 for x in inputs], labels, weights, loss_scale=scale, softcap=cap, z_loss=z,
            label_smoothing=smoothing, impl=impl,
        )  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i in range(10 if impl == "cpu" else 3):
        terms = [torch.tensor(value * (i + 1), device=labels.device) for value in (0.5, 3.0, 0.01, 0.05)]
        results = []
        for function in (compiled, step):
            leaves = [x.clone().requires_grad_() for x in given]
            loss = function(*leaves, *terms)
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        assert_same(*results)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("impl", ["cpu"])
def test_numpy_scalars_are_numbers(impl, draw) -> None:
    """Of any width, wherever a Python number is taken."""
    givens, labels, weights = batch(draw)
    numbers = {"shift": 2, "ignore_index": -100, "normalizer": 3.5, "loss_scale": 2.0, "softcap": 5.0, "z_loss": 0.25}
    kinds = {
        "shift": numpy.int64, "ignore_index": numpy.int32, "normalizer": numpy.float32, "loss_scale": numpy.int8,
        "softcap": numpy.float16, "z_loss": numpy.float64,
    }  # fmt: skip
    scalars = {name: kinds[name](number) for name, number in numbers.items()}
    for given in givens:
        more = {} if len(given) == 1 else {"chunk_bytes": 3 * V * 4, "drop_dead_rows": B * S * H}
        as_numpy = {name: numpy.int64(number) for name, number in more.items()}
        expected = outcome(given, labels, weights, **numbers, **more)
        assert_same(outcome(given, labels, weights, **scalars, **as_numpy), expected)


@pytest.mark.parametrize("impl", ["cpu", "triton", "reference"])
def test_masks_are_weights_of_0_and_1(impl, draw) -> None:
    """Bools and integers, [B,S] and [B,S,H], by position and by target."""
    givens, labels, _ = batch(draw)
    for shape, alignment in (((B, S), "position"), ((B, S), "target"), ((B, S, H), "position")):
        mask = (torch.arange(math.prod(shape), device=labels.device) % 3 != 1).view(shape)
        for given in givens:
            loss_of = weighted_mtp_ce if len(given) == 1 else weighted_mtp_linear_ce
            results = []
            for dtype in (torch.float32, torch.bool, torch.uint8, torch.int64):
                leaf = given[0].clone().requires_grad_()
                loss = loss_of(
                    leaf, *given[1:], labels, mask.to(dtype), weight_alignment=alignment, validate=True,
                    impl=impl,
                )  # fmt: skip
                results.append([loss.detach(), *torch.autograd.grad(loss, leaf)])
            for result in results[1:]:
                assert_same(result, results[0])


def test_a_label_of_probability_0_has_an_infinite_loss_beside_a_z_loss(impl, draw) -> None:
    """Not NaN: nothing is smoothed."""
    hidden, unembed, bias = draw.normal(1, 3, 1, D), draw.normal(V, D), draw.normal(V)
    labels = torch.tensor([[3, 1, 2]], device=bias.device)
    bias[2] = -torch.inf  # the target of position 1
    logits = torch.nn.functional.linear(hidden, unembed, bias)
    for smoothing in (0.0, torch.tensor(0.0, device=bias.device)):
        how = {"z_loss": 0.1, "label_smoothing": smoothing, "reduction": "none", "impl": impl}
        for loss in (
            weighted_mtp_ce(logits, labels, **how),
            weighted_mtp_linear_ce(hidden, unembed, labels, bias=bias, **how),
        ):
            assert loss[0, 1].item() == torch.inf
            assert bool(loss[0, 0].isfinite())
