"""The linear path inside the machinery of others: torch.compile, opcheck, autocast, activation checkpointing."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mtp_ce import token_ce, weighted_mtp_ce, weighted_mtp_linear_ce
from mtp_ce.ops import linear as linear_ops
from mtp_ce.ops.chunks import COUNT, KEEP_ALL, LinearCall
from mtp_ce.options import LossInputs, LossOptions, VocabShard

B, S, H, D, V = 2, 5, 3, 8, 37
FEW = 4 * V * 4  # bytes of four rows of fp32 logits


@pytest.fixture(autouse=True)
def fresh_cache() -> Iterator[None]:
    """No test runs what another has compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(draw, positions: int = S, vocabulary: int = V) -> tuple[Tensor, ...]:
    """hidden, unembed, bias, labels with a hole, weights."""
    labels = draw.integers(vocabulary, B, positions)
    labels[0, 2] = -100
    return (
        draw.normal(B, positions, H, D), draw.normal(vocabulary, D), draw.normal(vocabulary), labels,
        draw.normal(B, positions),
    )  # fmt: skip


Step = Callable[..., Any]


def outcome(function: Step, data: tuple[Tensor, ...], *more: Any) -> list[Tensor]:
    """Loss, statistics and gradients of fresh leaves, under an upstream other than 1."""
    x, u, bias, labels, w = data
    leaves = [tensor.clone().requires_grad_() for tensor in (x, u, bias, w)]
    loss, stats = function(*leaves[:3], labels, leaves[3], *more)
    return [loss.detach(), *torch.autograd.grad(loss.sum() * 3, leaves), *stats]


def assert_same(compiled: list[Tensor], eager: list[Tensor]) -> None:
    for one, other in zip(compiled, eager, strict=True):
        assert torch.equal(one, other)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "softcap": 5.0, "z_loss": 0.01, "label_smoothing": 0.1, "weight_alignment": "target", "loss_scale": 0.5,
        "head_reduction": "target", "left_halo": 1,
        "chunk_bytes": FEW,
    },
    "none": {"reduction": "none", "head_reduction": "horizon", "shift": 0},
    "sum_of_all_rows": {"reduction": "sum", "shift": 2, "drop_dead_rows": False},
    "a_bound_of_rows": {"drop_dead_rows": B * S * H, "normalizer": 3.0},
}  # fmt: skip


# What differs between the two lies inside the operators, and Triton's interpreter is slow.
COMPILED_BY = ["cpu", "triton"] if torch.cuda.is_available() else ["cpu"]
COMPILED = [(impl, "aot_eager", name) for impl in COMPILED_BY for name in OPTIONS]
COMPILED += [(impl, "inductor", "everything") for impl in COMPILED_BY]
COMPILED += [("triton", "aot_eager", "everything")] if "triton" not in COMPILED_BY else []


@pytest.mark.parametrize(("impl", "backend", "options"), COMPILED)
def test_compiled_is_eager(impl, draw, backend: str, options: str) -> None:
    """Loss, statistics and all gradients bit for bit, between operations that are compiled around the loss."""

    def step(x: Tensor, u: Tensor, bias: Tensor, y: Tensor, w: Tensor) -> Any:
        if options == "everything":  # positions in the midst of the labels
            x = x[:, 1:-1]
        return weighted_mtp_linear_ce(x * 2, u, y, w, bias=bias, impl=impl, return_stats=True, **OPTIONS[options])

    data = batch(draw)
    assert_same(outcome(torch.compile(step, fullgraph=True, backend=backend), data), outcome(step, data))


def test_compiled_with_wide_logits_and_a_frozen_head(draw) -> None:
    """bf16 with fp32 logits, over chunks; the first head's hidden states want no gradient."""
    x, u, _, labels, _ = batch(draw)
    heads, u = [head.bfloat16() for head in x.unbind(2)], u.bfloat16()

    def step(heads: list[Tensor], u: Tensor) -> Tensor:
        return weighted_mtp_linear_ce(heads, u, labels, logits_dtype=torch.float32, chunk_bytes=FEW)

    results = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        leaves = [heads[0], *(head.clone().requires_grad_() for head in heads[1:])]
        unembed = u.clone().requires_grad_()
        loss = function(leaves, unembed)
        results.append([loss.detach(), *torch.autograd.grad(loss, [*leaves[1:], unembed])])
    assert_same(*results)


def test_compiled_with_every_optional_tensor(impl, device, draw) -> None:
    """Documents, lengths, head weights, a tensor normalizer; heads as a list."""
    ids = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]], device=device)
    lens, a = torch.tensor([5, 4], device=device), torch.tensor([1.0, 0.0, 0.5], device=device)

    def step(x: Tensor, u: Tensor, bias: Tensor, y: Tensor, w: Tensor, n: Tensor) -> Any:
        return weighted_mtp_linear_ce(
            list((x + 1).unbind(2)), u, y, w, bias=bias, document_ids=ids, seq_lens=lens, head_weights=a, normalizer=n,
            impl=impl, return_stats=True,
        )  # fmt: skip

    data, n = batch(draw), torch.tensor(6.0, device=device)
    assert_same(outcome(torch.compile(step, fullgraph=True, backend="aot_eager"), data, n), outcome(step, data, n))


@pytest.mark.parametrize(("impl", "dynamic"), [("cpu", None), ("cpu", True), ("triton", None)])
def test_new_shapes_do_not_recompile(draw, impl, dynamic: bool | None) -> None:
    """Every length, every vocabulary: one graph with sizes as numbers, at most one with them as constants."""
    counter = CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, u: Tensor, bias: Tensor, y: Tensor, w: Tensor) -> Any:
        return weighted_mtp_linear_ce(
            x * 2, u, y, w, bias=bias, weight_alignment="target", impl=impl, return_stats=True
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    for positions in (4, 5, 3):
        data = batch(draw, positions, V + positions)
        assert_same(outcome(compiled, data), outcome(step, data))
    assert counter.frame_count <= 2


def test_new_shapes_of_a_marked_dimension_are_one_graph(impl, draw) -> None:
    """mark_dynamic on the positions: the second length runs what the first compiled."""
    counter = CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, u: Tensor, y: Tensor) -> Tensor:
        return weighted_mtp_linear_ce(x * 2, u, y, impl=impl)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for positions in (6, 9):
        x, u, _, labels, _ = batch(draw, positions)
        results = []
        for function in (compiled, step):
            leaves = [x.clone().requires_grad_(), u.clone().requires_grad_()]
            marked = labels.clone()
            if function is compiled:
                torch._dynamo.mark_dynamic(leaves[0], 1)
                torch._dynamo.mark_dynamic(marked, 1)
            loss = function(*leaves, marked)
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        assert_same(*results)
    assert counter.frame_count == 1


@pytest.mark.parametrize("frozen", ["hidden", "unembed"])
def test_compiled_with_a_frozen_input(impl, draw, frozen: str) -> None:
    """Which products are wanted is known when the graph is made."""
    x, u, _, labels, _ = batch(draw)

    def step(x: Tensor, u: Tensor) -> Tensor:
        return weighted_mtp_linear_ce(x, u, labels, impl=impl)

    results = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        leaves = [x.clone().requires_grad_(frozen != "hidden"), u.clone().requires_grad_(frozen != "unembed")]
        loss = function(*leaves)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert len(results[0]) == 2
    assert_same(*results)


def test_a_compiled_backward_twice(impl, draw) -> None:
    """retain_graph through the compiled graph: the gradients that it keeps are not scaled twice."""
    x, u, _, labels, _ = batch(draw)

    def step(x: Tensor, u: Tensor) -> Tensor:
        return weighted_mtp_linear_ce(x, u, labels, impl=impl)

    leaves = [x.requires_grad_(), u.requires_grad_()]
    wanted = torch.autograd.grad(step(*leaves), leaves, torch.tensor(-2.5, device=x.device))
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    first = torch.autograd.grad(loss, leaves, torch.tensor(-2.5, device=x.device), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, leaves, torch.tensor(-2.5, device=x.device))
    for true, one, copy, two in zip(wanted, first, kept, second, strict=True):
        assert torch.equal(one, true)
        assert torch.equal(two, true)
        assert torch.equal(one, copy)


def test_compiled_forwards_without_gradients(impl, draw) -> None:
    """Evaluation: the loss under no_grad, and token_ce."""
    x, u, bias, labels, weights = batch(draw)

    def evaluation(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            loss = weighted_mtp_linear_ce(x, u, labels, weights, bias=bias, impl=impl)
        return loss, token_ce(x, u, labels, bias=bias, impl=impl)

    compiled = torch.compile(evaluation, fullgraph=True, backend="aot_eager")
    assert_same([*compiled(x.requires_grad_())], [*evaluation(x)])


CHECKED: dict[str, dict[str, Any]] = {
    "changing": {"changing": True, "softcap": 5.0, "z_loss": 0.1, "smoothing": 0.1},
    "plain": {},
    "everything": {"tensors": True, "softcap": 5.0, "z_loss": 0.1, "smoothing": 0.1, "reduction": "none"},
    "list_of_half": {"listed": True, "dtype": torch.bfloat16, "drop": KEEP_ALL},
    "wide_logits": {"dtype": torch.bfloat16, "logits": torch.float32, "rows": 2},
    "wide_logits_fp16": {"dtype": torch.float16, "logits": torch.float32},
    "halo": {"target": True, "left_halo": 1, "tensors": True, "rows": 2},
    "target_and_bound": {"target": True, "reduction": "sum", "drop": 5, "rows": 2},
    "hidden_frozen": {"products": ([False], True, False), "weights": False},
    "one_head_frozen": {"products": ([False, True], True, True), "listed": True},
    "unembed_frozen": {"products": ([True], False, False), "bias": False},
    "nothing_wanted": {"products": ([False], False, False), "top1": False},
    "fp64_sums": {"grad_dtype": torch.float64},
    "empty": {"positions": 0},
}


def operator_arguments(draw, impl: str, case: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of linear_loss, linear_forward and linear_backward."""
    positions, dtype = case.get("positions", 3), case.get("dtype", torch.float32)
    hidden, unembed = draw.normal(1, positions, 2, 5, dtype=dtype), draw.normal(9, 5, dtype=dtype)
    given = [x.contiguous() for x in hidden.unbind(2)] if case.get("listed") else [hidden]
    bias = draw.normal(9, dtype=dtype) if case.get("bias", True) else None
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
    products = case.get("products", ([True] * len(given), True, bias is not None))
    logits_dtype = case.get("logits", dtype)
    chunk_bytes = case["rows"] * 9 * logits_dtype.itemsize if "rows" in case else None
    how = (chunk_bytes, case.get("drop", COUNT), case.get("grad_dtype", torch.float32), logits_dtype, impl)
    call = LinearCall(case.get("top1", True), weights is not None, *products, *how)
    whole = VocabShard(9)
    forward = (given, unembed, bias, *inputs, *options.values(), *call, *whole)
    loss, *_, factor, _, _, _, _ = linear_ops.linear_forward(*forward)
    upstream = torch.ones_like(loss)
    backward = (upstream, given, unembed, bias, *inputs, *options.values(), factor, *call, *whole)
    leaves = [[x.clone().requires_grad_(wanted) for x, wanted in zip(given, products[0], strict=True)]]
    leaves.append(unembed.clone().requires_grad_(products[1]))
    leaves.append(None if bias is None else bias.clone().requires_grad_(products[2]))
    if weights is not None:
        inputs = inputs._replace(token_weights=weights.clone().requires_grad_())
    return (*leaves, *inputs, *options.values(), *call, *whole), forward, backward


@pytest.mark.parametrize(
    ("impl", "name"), [*(("cpu", name) for name in CHECKED), ("triton", "plain"), ("triton", "everything")]
)
def test_the_operators_keep_their_promises(impl, draw, name: str) -> None:
    """torch.library.opcheck: schema, no alias and no mutation, fake tensors, autograd, dynamic shapes."""
    operators = ("linear_loss", "linear_forward", "linear_backward")
    for operator, arguments in zip(operators, operator_arguments(draw, impl, CHECKED[name]), strict=True):
        torch.library.opcheck(getattr(torch.ops.mtp_ce, operator).default, arguments)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("several", [False, True])
def test_autocast_casts_as_a_linear_layer_does(impl, device, draw, dtype: torch.dtype, several: bool) -> None:
    """fp32 parameters under torch.autocast: the numbers of a call with casts by hand, gradients in fp32."""
    x, u, bias, labels, weights = batch(draw)
    results = []
    for by_hand in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, u, bias)]
        cast = [leaf.to(dtype) if by_hand else leaf for leaf in leaves]
        given = [*cast[0].unbind(2)] if several else cast[0]
        with torch.autocast(device.type, dtype=dtype, enabled=not by_hand):
            loss = weighted_mtp_linear_ce(given, cast[1], labels, weights, bias=cast[2], impl=impl, chunk_bytes=FEW)
        assert loss.dtype == torch.float32
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(result.dtype == torch.float32 for result in results[0])
    assert_same(*results)
    plain = weighted_mtp_linear_ce(x, u, labels, weights, bias=bias, impl=impl)
    assert not torch.equal(results[0][0], plain)


def test_autocast_takes_what_a_layer_before_it_has_cast(impl, device, draw) -> None:
    """hidden arrives in bf16 from a layer under autocast, unembed in fp32: no mismatch, and backward works there."""
    x, u, _, labels, _ = batch(draw)
    layer = torch.nn.Linear(D, D, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        hidden = layer(x)
        assert hidden.dtype == torch.bfloat16
        loss = weighted_mtp_linear_ce(hidden, u.requires_grad_(), labels, impl=impl)
        ce = token_ce(hidden, u, labels, impl=impl)
        loss.backward()
    assert ce.dtype == torch.float32
    assert layer.weight.grad.dtype == u.grad.dtype == torch.float32
    assert bool(u.grad.any())
    with pytest.raises(TypeError, match=r"unembed is torch.float32; expected torch.bfloat16"):
        weighted_mtp_linear_ce(hidden, u, labels, impl=impl)


# Of forward and backward: autocast to a dtype, or off.
HALF, OFF = torch.bfloat16, None


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_does_not_reach_into_the_operators(impl, device, draw, reduction: str) -> None:
    """Whatever its state in forward and in backward, and wherever rows are gathered; both backwards of retain_graph."""
    x, u, bias, labels, weights = batch(draw)
    states, drops = ((OFF, HALF), (HALF, OFF), (HALF, HALF), (OFF, torch.float16)), (True, B * S * H, False)
    if impl == "triton":  # its interpreter is slow
        states, drops = ((OFF, HALF), (HALF, HALF)), (True,)
    for forward, backward in states:
        for drop in drops:
            results = []
            for by_hand in (True, False):
                leaves = [tensor.clone().requires_grad_() for tensor in (x, u, bias, weights)]
                given = [leaf.to(forward) for leaf in leaves[:3]] if by_hand and forward else leaves
                with torch.autocast(device.type, dtype=forward, enabled=forward is not None and not by_hand):
                    loss = weighted_mtp_linear_ce(
                        given[0], given[1], labels, leaves[3], bias=given[2], impl=impl, drop_dead_rows=drop,
                        reduction=reduction, chunk_bytes=FEW if impl == "cpu" else None,
                    ).sum()  # fmt: skip
                with torch.autocast(device.type, dtype=backward, enabled=backward is not None and not by_hand):
                    loss.backward(retain_graph=True)
                    loss.backward()
                results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
            assert_same(*results)


@pytest.mark.parametrize("impl", COMPILED_BY)
def test_compiled_under_autocast_is_eager_under_autocast(impl, device, draw) -> None:
    """A layer and the loss in one graph, its backward inside autocast or after it; the logits path beside it."""
    x, u, _, labels, weights = batch(draw)
    layer = torch.nn.Linear(D, D, device=device)

    def step(x: Tensor, u: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=HALF):
            hidden = layer(x)
            logits = torch.nn.functional.linear(hidden, u)
            over_logits = weighted_mtp_ce(logits, labels, weights, impl=impl, inplace_backward=True)
            return over_logits + weighted_mtp_linear_ce(hidden, u, labels, weights, impl=impl, chunk_bytes=FEW)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for backward in (True, False):
        results = []
        for function in (compiled, step):
            layer.zero_grad()
            leaves = [tensor.clone().requires_grad_() for tensor in (x, u)]
            loss = function(*leaves)
            with torch.autocast(device.type, dtype=HALF, enabled=backward):
                loss.backward()
            results.append([loss.detach(), layer.weight.grad.clone(), *(leaf.grad for leaf in leaves)])
        assert_same(*results)


def products_of(function: Callable[[], Any]) -> float:
    """The products [1, D] x [D, V] that FlopCounterMode counts, by the multiplications and additions of one."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / (2 * D * V)


def test_the_flop_counter_counts_three_products_a_computed_row(impl, draw) -> None:
    """2 M V D for each product of M rows: the logits, the gradients that are wanted; nothing twice but with "none"."""
    x, u, bias, labels, weights = batch(draw)
    weights[1] = 0.0
    N = B * S * H
    computed = int((weighted_mtp_linear_ce(x, u, labels, weights, return_stats=True, impl=impl).stats.top1 >= 0).sum())
    assert 0 < computed < N

    def call(*, wants: str = "xu", **options: Any) -> None:
        leaves = x.clone().requires_grad_("x" in wants), u.clone().requires_grad_("u" in wants)
        loss = weighted_mtp_linear_ce(*leaves, labels, weights, bias=bias, impl=impl, chunk_bytes=FEW, **options).sum()
        if wants:
            loss.backward()

    expected = [
        ({"drop_dead_rows": True}, 3 * computed),
        ({"drop_dead_rows": False}, 3 * N),
        ({"drop_dead_rows": computed + 2}, 3 * (computed + 2)),
        ({"drop_dead_rows": True, "reduction": "none"}, 4 * computed),
        ({"drop_dead_rows": True, "wants": "u"}, 2 * computed),
        ({"drop_dead_rows": True, "wants": ""}, computed),
    ]
    for options, count in expected:
        assert products_of(lambda options=options: call(**options)) == count, options
    assert products_of(lambda: token_ce(x, u, labels, impl=impl, drop_dead_rows=False)) == N
    # Of the positions alone, of which two stand before the last of the labels.
    assert products_of(lambda: token_ce(x[:, :-2], u, labels, impl=impl, drop_dead_rows=False)) == N - 2 * B * H
    heads = [head.detach().requires_grad_(h > 0) for h, head in enumerate(x.unbind(2))]
    some = functools.partial(weighted_mtp_linear_ce, heads, u.detach(), labels, impl=impl)
    assert products_of(lambda: some(drop_dead_rows=False).backward()) == N + B * S * (H - 1)
    valid = some(return_stats=True).stats.live.sum((0, 1))  # of each head
    assert products_of(lambda: some(drop_dead_rows=True).backward()) == int(valid.sum() + valid[1:].sum())
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = [mode.from_tensor(tensor.requires_grad_(tensor.is_floating_point())) for tensor in (x, u, labels)]
        loss = functools.partial(weighted_mtp_linear_ce, *fake, impl=impl, drop_dead_rows=True)
        assert products_of(lambda: loss().backward()) == 3 * N


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(()).to(x))[0],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
}


def test_a_transform_of_torch_func_is_refused_with_the_way_out(impl, device, draw) -> None:
    """By name on both paths; impl="reference" takes those that differentiate backwards, as the message says."""
    x, u, _, labels, weights = batch(draw)
    losses: list[tuple[Callable[..., Tensor], Tensor]] = [
        (lambda x, **how: weighted_mtp_linear_ce(x, u, labels, weights, **how), x),
        (lambda z, **how: weighted_mtp_ce(z, labels, weights, **how), torch.nn.functional.linear(x, u)),
    ]
    for loss, given in losses:
        leaf = given.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf, impl=impl), leaf)
        for name, transform in TRANSFORMS.items():
            with pytest.raises(RuntimeError, match=r"inside a transform of torch.func.*impl='reference'"):
                transform(functools.partial(loss, impl=impl), given)
            if name in ("grad", "vjp", "jacrev"):
                got = transform(functools.partial(loss, impl="reference"), given)
                assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
            loss(forward_ad.make_dual(given, given), impl=impl)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_autocast_leaves_float64_alone(impl, draw) -> None:
    """As torch does."""
    x, u, _, labels, _ = (tensor.double() if tensor.is_floating_point() else tensor for tensor in batch(draw))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = weighted_mtp_linear_ce(x, u, labels, impl=impl)
    assert loss.dtype == torch.float64
    assert torch.equal(loss, weighted_mtp_linear_ce(x, u, labels, impl=impl))


@pytest.mark.pairwise
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inside_activation_checkpointing(impl, draw, reentrant: bool, reduction: str) -> None:
    """The forward that is run again gives the gradients of the first one, bit for bit."""
    x, u, bias, labels, weights = batch(draw)

    def head(x: Tensor, u: Tensor, bias: Tensor, w: Tensor) -> Tensor:
        return weighted_mtp_linear_ce(
            torch.tanh(x), u, labels, w, bias=bias, reduction=reduction, chunk_bytes=FEW, impl=impl
        ).sum()

    results = []
    for checkpointed in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, u, bias, weights)]
        loss = checkpoint(head, *leaves, use_reentrant=reentrant) if checkpointed else head(*leaves)
        (loss * 3).backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    assert_same(*results)
