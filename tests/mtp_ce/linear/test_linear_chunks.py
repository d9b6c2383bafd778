"""How the rows are walked changes nothing but memory and speed: chunks, dropped rows, the dtype of the sums."""

import pytest
import torch
from torch import Tensor

from mtp_ce import token_ce, weighted_mtp_linear_ce
from mtp_ce.ops.chunks import chunks

B, S, H, D, V = 2, 7, 3, 16, 61
N = B * S * H


def batch(draw, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, unembed, labels with holes, weights with zeros."""
    labels, weights = draw.integers(V, B, S), draw.normal(B, S).relu()
    labels[0, 2] = labels[1, 5] = -100
    return draw.normal(B, S, H, D, dtype=dtype), draw.normal(V, D, dtype=dtype, scale=0.5), labels, weights


def on_a_grid(*tensors: Tensor) -> list[Tensor]:
    """Numbers whose products and sums are exact in fp32, so that logits are the same from a product of any shape."""
    return [(x * 8).round() / 8 for x in tensors]


ROWS = [1, 2, 5, N // 2, N - 1, N, 10 * N]


@pytest.mark.parametrize("drop", [True, False])
def test_the_number_of_chunks_changes_no_row_by_one_bit(impl, draw, evaluate, drop: bool) -> None:
    """Loss, ce, lse, top1, d_token_weights; a chunk of one row, a ragged last one, one chunk for all."""
    hidden, unembed, labels, weights = batch(draw)
    hidden, unembed = on_a_grid(hidden, unembed)
    results = []
    for rows in [*ROWS, None]:
        chunk_bytes = None if rows is None else rows * V * 4
        got = evaluate(
            impl, hidden, labels, weights, unembed=unembed, chunk_bytes=chunk_bytes, drop_dead_rows=drop, z_loss=0.1
        )
        results.append((got.loss, got.d_token_weights, *got.stats))
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert torch.equal(one, other)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_gradients_of_chunks_of_any_size_err_as_little_as_those_of_one(compare, draw, rows: int, dtype) -> None:
    """d_unembed and d_bias are summed over chunks, d_hidden is put together from them."""
    hidden, unembed, labels, weights = batch(draw, dtype)
    compare(
        hidden, labels, weights, unembed=unembed, bias=draw.normal(V, dtype=dtype),
        chunk_bytes=rows * V * dtype.itemsize + dtype.itemsize - 1,
    )  # fmt: skip


def test_no_selected_row_is_no_chunk() -> None:
    """Not a chunk without rows, which has no maximum."""
    assert list(chunks([torch.ones(3, D)], torch.empty(0, dtype=torch.int64), 2)) == []


DROPS = ["auto", True, False, "exact", "one_more", N, 10 * N]


@pytest.mark.pairwise
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_dropping_rows_changes_no_row_by_one_bit(impl, draw, evaluate, several: bool, learned: bool) -> None:
    """Loss, statistics, d_hidden and d_token_weights. Rows of weight 0 are needed where weights want a gradient."""
    hidden, unembed, labels, weights = batch(draw)
    hidden, unembed = on_a_grid(hidden, unembed)
    given = [x.contiguous() for x in hidden.unbind(2)] if several else hidden
    options = {"unembed": unembed, "weights_gradient": learned, "chunk_bytes": 100 * V * 4}
    stats = evaluate("reference", given, labels, weights, unembed=unembed, weights_gradient=learned).stats
    numbers = {"exact": int((stats.top1 >= 0).sum())}
    numbers["one_more"] = numbers["exact"] + 1
    assert 0 < numbers["exact"] < N
    results = []
    for drop in DROPS:
        got = evaluate(impl, given, labels, weights, drop_dead_rows=numbers.get(drop, drop), **options)
        results.append([got.loss, *got.stats, *([got.d_token_weights] if learned else [])])
        results[-1].append(torch.cat([x.flatten() for x in got.d_hidden]))
        results[-1].append(got.d_unembed)
    for result in results[1:]:
        for one, other in zip(results[0][:-2], result[:-2], strict=True):
            assert torch.equal(one, other)
        for one, other in zip(results[0][-2:], result[-2:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.pairwise
@pytest.mark.parametrize("drop", DROPS[:3] + DROPS[5:])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("several", [False, True])
def test_gradients_with_any_rows_dropped_are_right(compare, draw, drop, reduction: str, several: bool) -> None:
    """Each row's gradient returns to its place, also in the second pass of reduction="none"."""
    hidden, unembed, labels, weights = batch(draw)
    upstream = draw.normal(B, S).relu() if reduction == "none" else None
    compare(
        [*hidden.unbind(2)] if several else hidden, labels, weights, unembed=unembed, drop_dead_rows=drop,
        reduction=reduction, upstream=upstream, chunk_bytes=5 * V * 4, weights_gradient=False,
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_on_a_cpu_a_number_below_the_valid_rows_is_an_error(impl, device, draw, reduction: str) -> None:
    """It names both numbers and the way out. On a GPU, where nobody counts, loss and gradients are NaN."""
    hidden, unembed, labels, weights = batch(draw)
    live = int((weighted_mtp_linear_ce(
        hidden, unembed, labels, weights, impl=impl, return_stats=True
    ).stats.top1 >= 0).sum())  # fmt: skip
    x, u = hidden.requires_grad_(), unembed.requires_grad_()

    def call(number: int) -> Tensor:
        return weighted_mtp_linear_ce(x, u, labels, weights, reduction=reduction, drop_dead_rows=number, impl=impl)

    assert bool(call(live).isfinite().all())
    if device.type == "cpu":
        message = f"drop_dead_rows is {live - 1}, and {live} rows are live; expected at least that many, or True"
        with pytest.raises(ValueError, match=message):
            call(live - 1)
    else:
        loss = call(live - 1)
        assert bool(loss.isnan().any())
        for gradient in torch.autograd.grad(loss.sum(), (x, u)):
            assert bool(gradient.isnan().any())


def stalling(draw, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """300 rows that all push one class the same way: a sum in bf16 no longer feels a term after 256 like it."""
    rows, classes, features = 300, 4, 8
    hidden = 1 + 0.05 * draw.normal(rows, 2, 1, features)
    labels = torch.zeros(rows, 2, dtype=torch.int64, device=hidden.device)
    return hidden.to(dtype), draw.normal(classes, features, scale=0.01, dtype=dtype), labels


def errors_of_sums(impl: str, draw, grad_dtype: torch.dtype | None, rows: int) -> tuple[float, float]:
    """The relative error of d_unembed and d_bias, with sums in grad_dtype over chunks of some rows."""
    draw.generator.manual_seed(1)
    hidden, unembed, labels = stalling(draw, torch.bfloat16)
    options = {} if grad_dtype is None else {"grad_dtype": grad_dtype}

    def gradients(dtype: torch.dtype, **how) -> tuple[Tensor, ...]:
        u = unembed.to(dtype).requires_grad_()
        bias = torch.zeros(len(u), device=u.device, dtype=dtype, requires_grad=True)
        loss = weighted_mtp_linear_ce(hidden.to(dtype), u, labels, bias=bias, **how)
        return torch.autograd.grad(loss, (u, bias))

    got = gradients(torch.bfloat16, impl=impl, chunk_bytes=rows * len(unembed) * 2, **options)
    exact = gradients(torch.float64, impl="reference")
    return tuple(((x.double() - y).norm() / y.norm()).item() for x, y in zip(got, exact, strict=True))


@pytest.mark.parametrize("impl", ["cpu", pytest.param("triton", marks=pytest.mark.gpu)])  # the sums are torch's
def test_sums_over_many_chunks_are_kept_in_fp32(impl, draw) -> None:
    """By default: 150 chunks err no more than one, by a rounding of each g and of the sum. In bf16, ten times that."""
    whole = errors_of_sums(impl, draw, torch.float32, 300)
    by_default = errors_of_sums(impl, draw, None, 2)
    in_half = errors_of_sums(impl, draw, torch.bfloat16, 2)
    for one, chunked, half in zip(whole, by_default, in_half, strict=True):
        assert chunked <= max(2 * one, torch.finfo(torch.bfloat16).eps / 2)
        assert half >= 10 * chunked


@pytest.mark.pairwise
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_take_the_dtype_of_their_inputs(impl, draw, dtype, grad_dtype) -> None:
    """Whatever they are summed in; never in less than the inputs have."""
    hidden, unembed, labels, _ = batch(draw, dtype)
    leaves = [hidden, unembed, draw.normal(V, dtype=dtype)]
    leaves = [x.requires_grad_() for x in leaves]

    def gradients(kind: torch.dtype) -> tuple[Tensor, ...]:
        loss = weighted_mtp_linear_ce(
            *leaves[:2], labels, bias=leaves[2], grad_dtype=kind, impl=impl, chunk_bytes=9 * V * dtype.itemsize
        )
        return torch.autograd.grad(loss, leaves)

    got = gradients(grad_dtype)
    assert [x.dtype for x in got] == [dtype] * 3
    if dtype == torch.float32 and grad_dtype != torch.float64:
        assert all(torch.equal(*pair) for pair in zip(got, gradients(torch.float32), strict=True))


@pytest.mark.parametrize("given_as", ["number", "tensor", "loss_scale"])
def test_fp16_gradients_do_not_underflow_in_one_over_n(compare, draw, device, given_as: str) -> None:
    """One of 1e8 positions, under a loss scale of 1e6: 1e-2 in the end, and exactly 0 where 1/N went in first."""
    hidden, unembed, labels, _ = batch(draw, torch.float16)
    options = {"upstream": 1e6, "unembed": unembed, "bias": draw.normal(V, dtype=torch.float16)}
    assert (torch.tensor(1 / 1e8).half() == 0).item()
    options |= {
        "number": {"normalizer": 1e8},
        "tensor": {"normalizer": torch.tensor(1e8, device=device)},
        "loss_scale": {"reduction": "none", "loss_scale": 1e-8},
    }[given_as]
    got = compare(hidden, labels, **options)
    for gradient in (got.d_hidden[0][got.stats.live], got.d_unembed[labels[0, 1]], got.d_bias):
        assert bool((gradient.abs() > 1e-5).float().mean() > 0.5)


def test_fp16_gradients_of_a_late_small_upstream_do_not_underflow_on_the_way(compare, draw) -> None:
    """An upstream of 1e-6 on large hidden states: d_unembed is far above what fp16 holds, g itself is below it."""
    hidden, unembed, labels, _ = batch(draw, torch.float16)
    for reduction in ("sum", "none"):
        got = compare(300 * hidden, labels, unembed=unembed / 300, upstream=1e-6, reduction=reduction)
        assert bool((got.d_unembed[labels[0, 1]].abs() > 1e-5).any())


def gradient_errors(impl: str, draw, scale: float, dtype: torch.dtype, **how) -> list[float]:
    """Relative errors of d_hidden and d_unembed, of logits whose standard deviation is 4 * scale."""
    draw.generator.manual_seed(5)
    x, u = draw.normal(1, 24, 1, D, dtype=dtype), draw.normal(V, D, dtype=dtype, scale=scale)
    labels = draw.integers(V, 1, 24)

    def gradients(kind: torch.dtype, **how) -> tuple[Tensor, ...]:
        leaves = x.to(kind).requires_grad_(), u.to(kind).requires_grad_()
        return torch.autograd.grad(weighted_mtp_linear_ce(*leaves, labels, **how), leaves)

    got, exact = gradients(dtype, impl=impl, **how), gradients(torch.float64, impl="reference")
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]


@pytest.mark.parametrize("rows", [5, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_logits_make_the_gradients_of_large_logits_more_exact(impl, draw, dtype, rows: int) -> None:
    """Near 30 a logit of bf16 is rounded by up to 1/16. What stays is the rounding of g and of the gradients."""
    rounding = torch.finfo(dtype).eps / 2
    rounded = gradient_errors(impl, draw, 3.0, dtype, chunk_bytes=rows * V * 4)
    wide = gradient_errors(impl, draw, 3.0, dtype, chunk_bytes=rows * V * 4, logits_dtype=torch.float32)
    for coarse, fine in zip(rounded, wide, strict=True):
        assert fine <= 1.5 * rounding
        assert coarse >= 2 * fine


def test_fp32_logits_are_those_of_fp32_products(impl, draw) -> None:
    """Statistics of bf16 inputs as if both had been cast to fp32: nothing is rounded on the way to the loss."""
    hidden, unembed, labels, weights = batch(draw, torch.bfloat16)
    bias = draw.normal(V, dtype=torch.bfloat16)
    with torch.no_grad():
        got = weighted_mtp_linear_ce(
            hidden, unembed, labels, weights, bias=bias, logits_dtype=torch.float32, return_stats=True, impl=impl
        )
        wide = weighted_mtp_linear_ce(
            hidden.float(), unembed.float(), labels, weights, bias=bias.float(), return_stats=True, impl=impl
        )
        ce = token_ce(hidden, unembed, labels, bias=bias, logits_dtype=torch.float32, impl=impl)
    torch.testing.assert_close(got.loss, wide.loss, rtol=1e-6, atol=0)
    read = wide.stats.top1 >= 0
    torch.testing.assert_close(ce[read], wide.stats.ce[read], rtol=1e-5, atol=1e-6)
    for one, other in zip(got.stats, wide.stats, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
