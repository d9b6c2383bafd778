"""inplace_backward: the gradient lies where the logits were, and no later use of them goes unnoticed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mtp_ce import weighted_mtp_ce

B, S, H, D, V = 2, 4, 3, 8, 131
# What autograd says of a tensor, or of a view of one, whose version has moved on.
OVERWRITTEN = "modified (by an inplace operation|inplace)"


def batch(draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, unembed, labels with a hole, weights with a zero."""
    labels = draw.integers(V, B, S)
    labels[0, 2] = -100
    weights = draw.uniform(B, S)
    weights[1, 0] = 0.0
    return draw.normal(B, S, H, D), draw.normal(D, V), labels, weights


def as_heads(logits: Tensor, form: str):
    """The logits as one tensor, or as a list of its heads, contiguous or not."""
    if form == "one":
        return logits
    return [head.contiguous() if form == "list" else head for head in logits.unbind(2)]


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["one", "list", "views"])
def test_the_gradient_is_the_same_bit_for_bit(impl, draw, dtype, form: str) -> None:
    """In place and out of place, for what comes before the logits."""
    hidden, unembed, labels, weights = batch(draw)
    results = []
    for inplace in (False, True):
        x, w = hidden.to(dtype).requires_grad_(), weights.clone().requires_grad_()
        logits = x @ unembed.to(dtype)
        loss = weighted_mtp_ce(
            as_heads(logits, form), labels, w, softcap=8.0, z_loss=0.01, inplace_backward=inplace, impl=impl
        )
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, w))))
    for out_of_place, in_place in zip(*results, strict=True):
        assert torch.equal(out_of_place, in_place)


@pytest.mark.parametrize("form", ["one", "list", "transposed", "column_major"])
def test_the_gradient_is_written_over_the_logits(impl, draw, form: str) -> None:
    """Same memory, same strides; the values there are the gradient, zeros of masked rows included."""
    hidden, unembed, labels, weights = batch(draw)
    logits = hidden.requires_grad_() @ unembed
    if form == "transposed":
        logits = logits.transpose(1, 2).contiguous().transpose(1, 2)
    elif form == "column_major":
        logits = logits.transpose(2, 3).contiguous().transpose(2, 3)
    given = as_heads(logits, "list" if form == "list" else "one")
    tensors = given if isinstance(given, list) else [given]
    expected = torch.autograd.grad(weighted_mtp_ce(given, labels, weights, impl=impl), tensors, retain_graph=True)
    seen: dict[int, Tensor] = {}
    for i, tensor in enumerate(tensors):
        tensor.register_hook(lambda gradient, i=i: seen.__setitem__(i, gradient))
    weighted_mtp_ce(given, labels, weights, inplace_backward=True, impl=impl).backward()
    for i, tensor in enumerate(tensors):
        assert seen[i].data_ptr() == tensor.data_ptr()
        assert seen[i].stride() == tensor.stride()
        assert torch.equal(seen[i], expected[i])
        assert torch.equal(tensor.detach(), expected[i])


def test_forward_leaves_the_logits_alone(impl, draw) -> None:
    """Only backward overwrites."""
    hidden, unembed, labels, _ = batch(draw)
    logits = hidden.requires_grad_() @ unembed
    copy = logits.detach().clone()
    weighted_mtp_ce(logits, labels, inplace_backward=True, impl=impl)
    assert torch.equal(logits.detach(), copy)
    with torch.no_grad():
        weighted_mtp_ce(logits, labels, inplace_backward=True, impl=impl)
    assert torch.equal(logits.detach(), copy)


@pytest.mark.parametrize("form", ["one", "list", "views"])
def test_a_second_backward_raises(impl, draw, form: str) -> None:
    """With retain_graph the logits are gone, and autograd says so instead of differentiating the gradient."""
    hidden, unembed, labels, _ = batch(draw)
    logits = hidden.requires_grad_() @ unembed
    loss = weighted_mtp_ce(as_heads(logits, form), labels, inplace_backward=True, impl=impl)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=OVERWRITTEN):
        loss.backward()


@pytest.mark.parametrize("before", [True, False])
def test_another_graph_that_saved_the_logits_raises(impl, draw, before: bool) -> None:
    """An auxiliary loss that keeps the logits for its own backward, built before or after ours."""
    hidden, unembed, labels, _ = batch(draw)
    logits = hidden.requires_grad_() @ unembed
    auxiliary = (logits**2).sum() if before else None
    loss = weighted_mtp_ce(logits, labels, inplace_backward=True, impl=impl)
    auxiliary = (logits**2).sum() if auxiliary is None else auxiliary
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=OVERWRITTEN):
        auxiliary.backward()


def test_a_layer_that_needs_its_own_output_raises(impl, draw) -> None:
    """exp saves what it returned: overwriting that would give a wrong gradient without a word."""
    logits = draw.normal(1, 3, 1, 11).requires_grad_().exp()
    loss = weighted_mtp_ce(logits, draw.integers(11, 1, 3), inplace_backward=True, impl=impl)
    with pytest.raises(RuntimeError, match=OVERWRITTEN):
        loss.backward()


def test_where_torch_could_not_notice_it_is_refused(impl, draw) -> None:
    """What hooks gave back has no version: a layer that saved its own output would go on with the gradient in it."""
    hidden, unembed, labels, _ = batch(draw)
    hidden.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return weighted_mtp_ce((x @ unembed).tanh(), labels, inplace_backward=True, impl=impl)

    with pytest.raises(ValueError, match="inplace_backward is True under hooks for saved tensors"):
        checkpoint(loss, hidden, use_reentrant=False)
    with torch.autograd.graph.save_on_cpu():
        with pytest.raises(ValueError, match="inplace_backward"):
            loss(hidden)
        # Nothing is saved where nobody wants a gradient.
        assert bool(loss(hidden.detach()).isfinite())


def test_two_losses_that_share_logits_raise_if_one_is_in_place(impl, draw) -> None:
    """Whichever backward runs second finds its logits overwritten."""
    hidden, unembed, labels, _ = batch(draw)
    logits = hidden.requires_grad_() @ unembed
    total = weighted_mtp_ce(logits, labels, inplace_backward=True, impl=impl)
    total = total + weighted_mtp_ce(logits, labels, shift=0, inplace_backward=True, impl=impl)
    with pytest.raises(RuntimeError, match=OVERWRITTEN):
        total.backward()


def test_a_second_derivative_raises_in_place_too(impl, draw) -> None:
    """A gradient penalty on what comes before the logits must not silently lose its larger half."""
    hidden, unembed, labels, _ = batch(draw)
    unembed.requires_grad_()
    loss = weighted_mtp_ce(hidden.requires_grad_() @ unembed, labels, inplace_backward=True, impl=impl)
    with pytest.raises(RuntimeError):  # noqa: PT012  (either step may be the one that refuses)
        (d_hidden,) = torch.autograd.grad(loss, hidden, create_graph=True)
        (d_hidden**2).sum().backward()


def test_an_upstream_of_zero_writes_zeros(impl, draw) -> None:
    """Masked rows are overwritten as well: memory holds the gradient everywhere."""
    hidden, unembed, labels, weights = batch(draw)
    logits = hidden.requires_grad_() @ unembed
    weighted_mtp_ce(logits, labels, weights, inplace_backward=True, impl=impl).backward(torch.tensor(0.0).to(logits))
    assert bool((logits.detach() == 0).all())


# Logits [1,3,V] or heads of them, made of z [1,3,V+1], some of whose rows share memory; and what names them.
SHARED: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "one_tensor_twice": ("two heads", lambda z: [z, z]),
    "a_view": ("two heads", lambda z: [z, z.view(-1).view(z.shape)]),
    "shifted_heads": ("two heads", lambda z: [z[..., :-1], z[..., 1:]]),
    "overlapping_rows": ("rows", lambda z: z.flatten().unfold(0, V, 1)[:3].view(1, 3, V)),
    "overlapping_heads": ("rows", lambda z: z.as_strided((1, 3, 2, V), (3 * V + 3, V + 1, 1, 1))),
    "expanded": ("rows", lambda z: z[:, :, None].expand(1, 3, 2, V + 1)),
}
COMPILED = {"one_tensor_twice", "a_view", "shifted_heads", "overlapping_rows", "heads_side_by_side"}
APART: dict[str, Callable[[Tensor], Any]] = {
    "a_slice": lambda z: z[..., 1:],
    "heads_side_by_side": lambda z: [z[..., : V // 2], z[..., V // 2 : 2 * (V // 2)]],
    "heads_of_one_tensor": lambda z: z.view(1, 3, 4, -1).unbind(2),
    "transposed": lambda z: z.view(1, 3, 4, -1).transpose(1, 3)[:, :, :, :3].transpose(2, 3),
    "two_tensors": lambda z: [z, z + 1],
}


def backward_of(views: Callable[[Tensor], Any], *, inplace: bool, compiled: bool = False, **options: Any) -> Tensor:
    """The gradient of what comes before z, of which `views` makes the logits."""

    def step(x: Tensor) -> Tensor:
        logits = views(x * 2)
        first = logits if isinstance(logits, Tensor) else logits[0]
        labels = torch.arange(first.shape[0] * first.shape[1]).view(first.shape[:2]) % 3
        return weighted_mtp_ce(logits, labels, inplace_backward=inplace, **options)

    torch._dynamo.reset()
    x = torch.linspace(-1, 1, 3 * (V + 1)).view(1, 3, V + 1).requires_grad_()
    step_ = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    return torch.autograd.grad(step_(x), x)[0]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_rows_that_share_memory_are_refused_and_no_others(compiled: bool) -> None:
    """By storage and strides, also where a compiler sees neither addresses nor bases."""
    for form, (named, views) in SHARED.items():
        if compiled and form not in COMPILED:
            continue
        # torch.compile raises an error of its own that quotes ours.
        with pytest.raises(Exception, match=f"inplace_backward is True and {named}.*share memory"):
            backward_of(views, inplace=True, compiled=compiled)
        assert bool(backward_of(views, inplace=False).any()), form
    for form, views in APART.items():
        if compiled and form not in COMPILED:
            continue
        expected = backward_of(views, inplace=False)
        assert torch.equal(backward_of(views, inplace=True, compiled=compiled), expected), form


def test_a_leaf_is_refused_while_compiling_too() -> None:
    """A parameter, or a view of one, that the compiled graph would overwrite."""
    parameter, labels = torch.linspace(-1, 1, 33).view(1, 3, 11).clone().requires_grad_(), torch.tensor([[3, 1, 2]])
    for view in (lambda x: x, lambda x: x.view(1, 3, 1, 11)):
        step = torch.compile(
            lambda x, view=view: weighted_mtp_ce(view(x), labels, inplace_backward=True),
            fullgraph=True, backend="aot_eager",
        )  # fmt: skip
        with pytest.raises(Exception, match="logits is a leaf that requires a gradient"):
            step(parameter)


def test_graph_inputs_that_share_memory_later_give_the_gradient_of_separate_ones() -> None:
    """A graph compiled for separate heads, then called with overlapping ones of the same strides."""
    torch._dynamo.reset()
    labels, x = torch.tensor([[3, 1, 2]]), torch.linspace(-1, 1, 36).view(1, 3, 12)
    step = torch.compile(
        lambda a, b: weighted_mtp_ce([a, b], labels, inplace_backward=True), fullgraph=True, backend="aot_eager"
    )
    for second in (lambda z: (z * 1)[..., 1:], lambda z: z[..., 1:]):
        leaf = x.clone().requires_grad_()
        z = leaf * 2
        (got,) = torch.autograd.grad(step(z[..., :-1], second(z)), leaf)
        z = leaf * 2
        (expected,) = torch.autograd.grad(weighted_mtp_ce([z[..., :-1], z[..., 1:]], labels), leaf)
        assert torch.equal(got, expected)
