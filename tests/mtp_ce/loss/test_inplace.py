"""inplace_backward: the gradient lies where the logits were, and no later use of them goes unnoticed."""

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
