"""Gradients of the linear path: every upstream, twice, never a second derivative, only those that are wanted."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_ce import weighted_mtp_linear_ce

B, S, H, D, V = 2, 4, 2, 8, 37
FEW = 3 * V * 4  # bytes of three rows of fp32 logits


def batch(draw, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, unembed, labels with a hole, weights of both signs."""
    labels = draw.integers(V, B, S)
    labels[0, 2] = -100
    return draw.normal(B, S, H, D, dtype=dtype), draw.normal(V, D, dtype=dtype), labels, draw.normal(B, S)


def learned(draw) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same as leaves, with a bias."""
    hidden, unembed, labels, weights = batch(draw)
    bias = draw.normal(V)
    return (*(x.requires_grad_() for x in (hidden, unembed, bias, weights)), labels)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("upstream", [2.5, -1e-3])
def test_a_scalar_upstream_other_than_one(compare, draw, dtype, reduction: str, upstream: float) -> None:
    """The loss is one term of several, scaled by whoever adds them."""
    hidden, unembed, labels, weights = batch(draw, dtype)
    compare(hidden, labels, weights, unembed=unembed, reduction=reduction, upstream=upstream)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alignment", ["position", "target"])
def test_an_upstream_for_every_token(compare, draw, dtype, alignment: str) -> None:
    """reduction="none" under signed upstream gradients, some of them 0, of any strides and sizes."""
    hidden, unembed, labels, weights = batch(draw, dtype)
    upstreams = [
        draw.normal(S, B).T,
        draw.normal(B, S).relu(),
        1e-6 * draw.normal(B, S),
        draw.normal(1, 1).expand(B, S),
    ]
    for upstream in upstreams:
        compare(
            hidden, labels, weights, unembed=unembed, bias=draw.normal(V, dtype=dtype), reduction="none",
            upstream=upstream, weight_alignment=alignment, loss_scale=0.5, chunk_bytes=3 * V * dtype.itemsize,
        )  # fmt: skip


def test_the_square_of_the_loss(impl, draw) -> None:
    """An upstream that is only known in backward: 2 * loss."""
    tensors = batch(draw)
    labels = tensors[2]
    results = {}
    for name, dtype in ((impl, torch.float32), ("reference", torch.float32), ("exact", torch.float64)):
        x, u, w = (tensors[i].to(dtype).requires_grad_() for i in (0, 1, 3))
        loss = weighted_mtp_linear_ce(x, u, labels, w, impl="reference" if name == "exact" else name) ** 2
        results[name] = (loss.detach(), *torch.autograd.grad(loss, (x, u, w)))
    for ours, peer, exact in zip(*results.values(), strict=True):
        error, allowed = (float((value.double() - exact).abs().max()) for value in (ours, peer))
        assert error <= 3 * allowed + 4 * torch.finfo(torch.float32).eps * float(exact.abs().max())


@pytest.mark.pairwise
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("size", [1e5, 1e-7])
def test_weights_beyond_the_range_of_fp16_leave_gradients_within_it(impl, draw, reduction: str, size: float) -> None:
    """Weights of one size and a normalizer, or an upstream, of the same: the gradients of weights near 1."""
    hidden, unembed, labels, weights = batch(draw, torch.float16)
    bias = draw.normal(V, dtype=torch.float16)

    def gradients(size: float) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (hidden, unembed, bias)]
        x, u, b = leaves
        if reduction == "mean":
            loss = weighted_mtp_linear_ce(x, u, labels, size * weights, bias=b, normalizer=size, impl=impl)
        else:
            loss = weighted_mtp_linear_ce(x, u, labels, size * weights, bias=b, reduction="none", impl=impl) / size
        return torch.autograd.grad(loss.sum(), leaves)

    for gradient, plain in zip(gradients(size), gradients(1.0), strict=True):
        assert bool(plain.any())
        torch.testing.assert_close(gradient, plain, rtol=2e-3, atol=2e-3)


def test_an_upstream_of_zero_kills_its_rows(impl, draw) -> None:
    """Hidden states that are NaN at such a position reach no gradient: not their own, not that of unembed."""
    hidden, unembed, labels, _ = batch(draw)
    hidden[1, 0] = torch.nan
    x, u = hidden.requires_grad_(), unembed.requires_grad_()
    losses = weighted_mtp_linear_ce(x, u, labels, reduction="none", impl=impl)
    upstream = torch.ones_like(losses)
    upstream[0, 1] = upstream[1, 0] = 0.0
    losses.backward(upstream)
    for gradient in (x.grad, u.grad):
        assert bool(gradient.isfinite().all())
    assert not bool(x.grad[0, 1].any() | x.grad[1, 0].any())
    assert bool(x.grad[0, 0].any())


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inputs_are_bitwise_unchanged(impl, draw, dtype, reduction: str) -> None:
    """After forward and after two backwards: hidden, unembed, bias, labels, weights."""
    hidden, unembed, labels, weights = batch(draw, dtype)
    tensors = (hidden, unembed, draw.normal(V, dtype=dtype), labels, weights)
    copies = [tensor.clone() for tensor in tensors]
    versions = [tensor._version for tensor in tensors]
    x, u, bias, _, w = (tensor.requires_grad_(tensor.is_floating_point()) for tensor in tensors)
    loss = weighted_mtp_linear_ce(x, u, labels, w, bias=bias, softcap=3.0, z_loss=0.1, reduction=reduction, impl=impl)
    loss.sum().backward(retain_graph=True)
    loss.sum().backward()
    for tensor, copy, version in zip(tensors, copies, versions, strict=True):
        assert torch.equal(tensor.detach(), copy)
        assert tensor._version == version


@pytest.mark.pairwise
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("several", [False, True])
def test_backward_twice_returns_the_same_gradient_twice(impl, draw, reduction: str, several: bool) -> None:
    """The first takes the gradients that forward made, and scales them in place: they are never handed out again."""
    x, u, bias, w, labels = learned(draw)
    given = [part.detach().clone().requires_grad_() for part in x.unbind(2)] if several else x
    leaves = [*(given if several else [x]), u, bias, w]
    loss = weighted_mtp_linear_ce(
        given, u, labels, w, bias=bias, reduction=reduction, chunk_bytes=FEW, impl=impl
    ).sum()  # fmt: skip
    upstream = torch.tensor(-2.5, device=loss.device)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    third = torch.autograd.grad(loss, leaves, 4 * upstream)
    for i, copy in enumerate(kept):
        assert torch.equal(first[i], copy), "a later backward overwrote the first gradient"
        torch.testing.assert_close(second[i], copy, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(third[i], 4 * copy, rtol=1e-6, atol=1e-8)
        assert len({gradient[i].untyped_storage().data_ptr() for gradient in (first, second, third)}) == 3


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_that_was_kept_survives_the_next_backward(impl, draw, reduction: str) -> None:
    """`.grad` may be the very memory that forward wrote: it adds up, or stays what it was once taken away."""
    x, u, bias, w, labels = learned(draw)
    leaves = (x, u, bias, w)
    loss = weighted_mtp_linear_ce(x, u, labels, w, bias=bias, reduction=reduction, impl=impl).sum()
    loss.backward(retain_graph=True)
    kept = [leaf.grad for leaf in leaves]
    copies = [gradient.clone() for gradient in kept]
    for leaf in leaves:
        leaf.grad = None
    loss.backward(retain_graph=True)
    for leaf, gradient, copy in zip(leaves, kept, copies, strict=True):
        assert torch.equal(gradient, copy)
        torch.testing.assert_close(leaf.grad, copy, rtol=1e-6, atol=1e-8)
    loss.backward()
    for leaf, gradient, copy in zip(leaves, kept, copies, strict=True):
        assert torch.equal(gradient, copy)
        torch.testing.assert_close(leaf.grad, 2 * copy, rtol=1e-6, atol=1e-8)


def test_a_second_call_does_not_touch_the_first_one_s_gradients(impl, draw) -> None:
    """Two steps on the same parameters: chunks and sums belong to a call."""
    x, u, bias, w, labels = learned(draw)
    leaves = (x, u, bias, w)
    first, second = (
        weighted_mtp_linear_ce(x, u, labels, w, bias=bias, shift=shift, impl=impl) for shift in (1, 0)
    )  # fmt: skip
    of_second = [gradient.clone() for gradient in torch.autograd.grad(second, leaves)]
    of_first = torch.autograd.grad(first, leaves)
    for shift, gradients in ((1, of_first), (0, of_second)):
        alone = weighted_mtp_linear_ce(x, u, labels, w, bias=bias, shift=shift, impl=impl)
        for ours, wanted in zip(gradients, torch.autograd.grad(alone, leaves), strict=True):
            assert torch.equal(ours, wanted)


def test_two_losses_of_the_same_hidden_and_unembed_add_up(impl, draw) -> None:
    """Gradients accumulate, each in its own memory."""
    x, u, bias, w, labels = learned(draw)
    leaves = (x, u, bias)
    one = weighted_mtp_linear_ce(x, u, labels, w.detach(), bias=bias, impl=impl)
    other = weighted_mtp_linear_ce(x, u, labels, bias=bias, shift=0, z_loss=0.1, impl=impl)
    separate = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (one, other)]
    (one + other).backward()
    for leaf, first, second in zip(leaves, *separate, strict=True):
        torch.testing.assert_close(leaf.grad, first + second, rtol=1e-6, atol=1e-8)


def test_an_unembed_that_is_the_embedding_too_gets_both_gradients(impl, draw) -> None:
    """Tied weights: the rows that made hidden, and the classes."""
    _, table, labels, weights = batch(draw)
    results = []
    for name, dtype in ((impl, torch.float32), ("reference", torch.float64)):
        tied = table.to(dtype).requires_grad_()
        hidden = tied[labels.clamp(min=0)][:, :, None].expand(B, S, H, D) * 2
        loss = weighted_mtp_linear_ce(hidden, tied, labels, weights, impl=name)
        results.append(torch.autograd.grad(loss, tied)[0].double())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.pairwise
@pytest.mark.parametrize("name", ["hidden", "unembed", "bias", "weights"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_gradient_of_one_input_alone(impl, draw, name: str, reduction: str) -> None:
    """torch.autograd.grad for one of them, then for the others, is one backward for all."""
    leaves = dict(zip(("hidden", "unembed", "bias", "weights"), (tensors := learned(draw))[:4], strict=True))

    def loss() -> Tensor:
        return weighted_mtp_linear_ce(
            leaves["hidden"], leaves["unembed"], tensors[4], leaves["weights"], bias=leaves["bias"],
            reduction=reduction, impl=impl,
        ).sum()  # fmt: skip

    wanted = dict(zip(leaves, torch.autograd.grad(loss(), [*leaves.values()]), strict=True))
    again = loss()
    (alone,) = torch.autograd.grad(again, leaves[name], retain_graph=True)
    assert torch.equal(alone, wanted[name])
    others = {key: leaf for key, leaf in leaves.items() if key != name}
    for key, gradient in zip(others, torch.autograd.grad(again, [*others.values()]), strict=True):
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_without_retaining_the_graph_raises(impl, draw, reduction: str) -> None:
    """As every torch function does."""
    x, u, bias, w, labels = learned(draw)
    loss = weighted_mtp_linear_ce(x, u, labels, w, bias=bias, reduction=reduction, impl=impl).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.pairwise
@pytest.mark.parametrize("wrt", ["hidden", "unembed", "bias", "weights", "all"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_raises(impl, draw, wrt: str, reduction: str) -> None:
    """Rather than being silently 0; the first derivative under create_graph is right."""
    *tensors, labels = learned(draw)
    names = ("hidden", "unembed", "bias", "weights")
    x, u, bias, w = (
        tensor.detach().requires_grad_(wrt in (name, "all")) for name, tensor in zip(names, tensors, strict=True)
    )
    leaves = [leaf for leaf in (x, u, bias, w) if leaf.requires_grad]

    def loss() -> Tensor:
        return (weighted_mtp_linear_ce(x, u, labels, w, bias=bias, reduction=reduction, impl=impl) ** 2).sum()

    gradients = torch.autograd.grad(loss(), leaves, create_graph=True)
    for gradient, plain in zip(gradients, torch.autograd.grad(loss(), leaves), strict=True):
        torch.testing.assert_close(gradient.detach(), plain, rtol=1e-6, atol=1e-8)
    with pytest.raises(RuntimeError):
        sum((gradient**2).sum() for gradient in gradients).backward()


def test_a_second_derivative_through_the_layer_before_raises(impl, draw) -> None:
    """A gradient penalty on what comes before hidden: d hidden depends on hidden, and nobody wrote that down."""
    hidden, unembed, labels, _ = batch(draw)
    layer = draw.normal(D, D).requires_grad_()
    loss = weighted_mtp_linear_ce(hidden @ layer, unembed, labels, impl=impl)
    (d_layer,) = torch.autograd.grad(loss, layer, create_graph=True)
    with pytest.raises(RuntimeError):
        (d_layer**2).sum().backward()


@pytest.mark.pairwise
@pytest.mark.parametrize("frozen", [("hidden",), ("unembed",), ("bias",), ("hidden", "unembed"), ("unembed", "bias")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_inputs_get_no_gradient_and_the_others_theirs(compare, draw, frozen, reduction: str) -> None:
    """Each combination a trainer freezes."""
    hidden, unembed, labels, weights = batch(draw)
    got = compare(
        hidden, labels, weights, unembed=unembed, bias=draw.normal(V), frozen=frozen, reduction=reduction,
        chunk_bytes=FEW,
    )  # fmt: skip
    for name in ("hidden", "unembed", "bias"):
        assert (getattr(got, f"d_{name}") is None) == (name in frozen)


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_list_with_one_frozen_head(impl, draw, frozen: int, reduction: str) -> None:
    """The other gets what it gets when all learn, also from a second backward; the frozen one gets nothing."""
    hidden, unembed, labels, _ = batch(draw)
    heads = [x.contiguous().requires_grad_() for x in hidden.unbind(2)]
    weighted_mtp_linear_ce(heads, unembed, labels, impl=impl, reduction=reduction).sum().backward()
    some = [x.detach().requires_grad_(h != frozen) for h, x in enumerate(heads)]
    loss = weighted_mtp_linear_ce(some, unembed, labels, impl=impl, reduction=reduction).sum()
    for _ in range(2):
        loss.backward(retain_graph=True)
        assert some[frozen].grad is None
        assert torch.equal(some[1 - frozen].grad, heads[1 - frozen].grad)
        some[1 - frozen].grad = None


def test_weights_alone_may_require_gradients(compare, draw) -> None:
    """All else frozen: no product but the logits, and d_token_weights is there."""
    hidden, unembed, labels, weights = batch(draw)
    got = compare(hidden, labels, weights, unembed=unembed, frozen=("hidden", "unembed"))
    assert bool(got.d_token_weights.any())


def test_without_a_gradient_to_compute_nothing_is_recorded(impl, draw) -> None:
    """no_grad and inference_mode give the value that training sees."""
    x, u, bias, w, labels = learned(draw)
    loss = weighted_mtp_linear_ce(x, u, labels, w, bias=bias, impl=impl)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value = weighted_mtp_linear_ce(x, u, labels, w, bias=bias, impl=impl)
        assert not value.requires_grad
        assert torch.equal(value, loss.detach())


def test_the_same_call_returns_the_same_bits(impl, draw) -> None:
    """Loss, gradients and statistics."""
    hidden, unembed, labels, weights = batch(draw, torch.bfloat16)

    def run() -> list[Tensor]:
        x, u, w = (tensor.clone().requires_grad_() for tensor in (hidden, unembed, weights))
        loss, stats = weighted_mtp_linear_ce(
            x, u, labels, w, softcap=9.0, label_smoothing=0.1, chunk_bytes=FEW, impl=impl, return_stats=True
        )
        return [loss.detach(), *torch.autograd.grad(loss, (x, u, w)), *stats]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_a_loss_without_backward_frees_its_gradients(impl, draw) -> None:
    """They belong to the graph alone: dropped with it, without a cycle that waits for the collector."""
    x, u, bias, w, labels = learned(draw)
    gc.collect()
    gc.disable()
    try:
        loss = weighted_mtp_linear_ce(x, u, labels, w, bias=bias, impl=impl)
        graph = weakref.ref(loss.grad_fn)
        gradients = [weakref.ref(tensor) for tensor in gc.get_referents(loss.grad_fn) if isinstance(tensor, Tensor)]
        del loss
        assert graph() is None
        assert all(gradient() is None for gradient in gradients)
    finally:
        gc.enable()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum_shift_0": {"reduction": "sum", "shift": 0},
    "none": {"reduction": "none", "shift": 2},
    "target": {"weight_alignment": "target"},
    "horizon": {"head_reduction": "horizon", "loss_scale": -2.0},
    "per_token": {"head_reduction": "target"},
    "softcap": {"softcap": 1.5},
    "z_loss": {"z_loss": 0.3},
    "smoothing": {"label_smoothing": 0.2},
    "everything": {"softcap": 2.0, "z_loss": 0.1, "label_smoothing": 0.1, "normalizer": 3.0},
}


@pytest.mark.parametrize("impl", ["cpu"])
@pytest.mark.parametrize(("name", "drop"), [*((name, True) for name in OPTIONS), ("everything", False)])
def test_gradcheck_in_float64(impl, draw, name: str, drop: bool) -> None:
    """Finite differences, for hidden, unembed, bias and weights (some of them 0), over two chunks."""
    hidden, unembed, bias = (draw.normal(*shape, dtype=torch.float64) for shape in ((1, 4, 2, 3), (4, 3), (4,)))
    weights = draw.normal(1, 4, dtype=torch.float64)
    weights[0, 1] = 0.0
    labels = draw.integers(4, 1, 4)
    labels[0, 2] = -100
    torch.autograd.gradcheck(
        lambda x, u, b, w: weighted_mtp_linear_ce(
            x, u, labels, w, bias=b, impl=impl, chunk_bytes=2 * 4 * 8, drop_dead_rows=drop, **OPTIONS[name]
        ),
        [x.requires_grad_() for x in (hidden, unembed, bias, weights)],
        nondet_tol=1e-14,  # the second backward leaves out the row of weight 0, and sums in another order
    )


@pytest.mark.parametrize("impl", ["cpu"])
@pytest.mark.parametrize("name", OPTIONS)
def test_float64_is_exact(impl, draw, evaluate, name: str) -> None:
    """No silent fp32 inside, also where the sums were asked for in fp32, the default."""
    hidden, unembed, bias = (draw.normal(*shape, dtype=torch.float64) for shape in ((2, 3, 2, 9), (300, 9), (300,)))
    labels, weights = draw.integers(300, 2, 3), draw.normal(2, 3, dtype=torch.float64)
    options = {"unembed": unembed, "bias": bias, **OPTIONS[name]}
    ours = evaluate(impl, hidden, labels, weights, chunk_bytes=3 * 300 * 8, **options)
    oracle = evaluate("reference", hidden, labels, weights, **options)
    pairs = [(getattr(ours, key), getattr(oracle, key)) for key in ("loss", "d_unembed", "d_bias", "d_token_weights")]
    pairs += [(ours.d_hidden[0], oracle.d_hidden[0]), (ours.stats.ce, oracle.stats.ce)]
    for mine, true in pairs:
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-13)
