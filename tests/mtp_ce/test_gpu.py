"""What only a GPU can show: no host sync, CUDA graphs, streams, devices, more than 2**31 elements."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mtp_ce import weighted_mtp_ce

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("impl", ["triton"])]

OPTIONS = {"softcap": 20.0, "z_loss": 1e-4, "label_smoothing": 0.1, "weight_alignment": "target"}


def batch(draw, B: int = 2, S: int = 64, H: int = 4, V: int = 4099) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 logits of an odd vocabulary, labels with a hole, weights with zeros."""
    labels = draw.integers(V, B, S)
    labels[0, 5:9] = -100
    return draw.normal(B, S, H, V, dtype=torch.bfloat16), labels, draw.normal(B, S).relu()


@pytest.fixture
def no_sync() -> Iterator[None]:
    """Any synchronisation with the host raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_host_synchronisation(impl, device, draw, reduction: str, request: pytest.FixtureRequest) -> None:
    """Forward, backward, in place, statistics, tensor normalizer, all ignored."""
    logits, labels, weights = batch(draw)
    x, w = logits.requires_grad_(), weights.requires_grad_()
    lens, nothing = torch.tensor([64, 9], device=device), torch.full_like(labels, -100)
    normalizer = torch.tensor(77.0, device=device) if reduction == "mean" else None
    upstream = torch.ones(labels.shape if reduction == "none" else (), device=device)
    weighted_mtp_ce(x, labels, w).backward()  # compiles, which may synchronise
    request.getfixturevalue("no_sync")
    for y in (labels, nothing):
        for inplace in (False, True):
            loss, _ = weighted_mtp_ce(
                x * 1, y, w, seq_lens=lens, reduction=reduction, normalizer=normalizer, inplace_backward=inplace,
                return_stats=True, **OPTIONS,
            )  # fmt: skip
            loss.backward(upstream)


def test_inside_a_cuda_graph(impl, draw) -> None:
    """Captured once, replayed on other numbers: loss and gradient of those numbers."""
    logits, labels, weights = batch(draw)
    static_x, static_y = logits.clone().requires_grad_(), labels.clone()

    def step() -> tuple[Tensor, Tensor]:
        loss = weighted_mtp_ce(static_x, static_y, weights, **OPTIONS)
        return loss, torch.autograd.grad(loss, static_x)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step()
    for _ in range(2):
        other, labels, _ = batch(draw)
        with torch.no_grad():
            static_x.copy_(other)
        static_y.copy_(labels)
        graph.replay()
        x = other.clone().requires_grad_()
        eager = weighted_mtp_ce(x, labels, weights, **OPTIONS)
        assert torch.equal(loss, eager)
        assert torch.equal(gradient, torch.autograd.grad(eager, x)[0])


def test_on_a_stream_of_its_own(impl, draw) -> None:
    """Kernels go to the current stream, after what was queued there."""
    logits, labels, weights = batch(draw, S=512)
    x = logits.clone().requires_grad_()
    wanted = weighted_mtp_ce(x, labels, weights)
    (d_wanted,) = torch.autograd.grad(wanted, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever forgets the stream reads the zeros below
        y = torch.zeros_like(logits)
        y.copy_(logits)
        loss = weighted_mtp_ce(y.requires_grad_(), labels, weights)
        (d_y,) = torch.autograd.grad(loss, y)
    stream.synchronize()
    assert torch.equal(loss, wanted)
    assert torch.equal(d_y, d_wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device, and there is none")
def test_on_a_device_that_is_not_the_current_one(impl, draw) -> None:
    """The launch is guarded."""
    tensors = [tensor.to("cuda:1") for tensor in batch(draw)]
    assert torch.equal(
        weighted_mtp_ce(*tensors).cpu(), weighted_mtp_ce(*(tensor.to("cuda:0") for tensor in tensors)).cpu()
    )


@pytest.mark.parametrize("inplace", [False, True])
def test_more_than_two_to_the_31_elements(impl, device, inplace: bool) -> None:
    """A row that lies behind 2**31 elements: its loss and its gradient are those of the same row alone."""
    B, S, H, V = 1, 8200, 2, 131072
    logits = torch.zeros(B, S, H, V, dtype=torch.bfloat16, device=device)
    labels = torch.full((B, S), 3, device=device)
    t = S - 3  # the last position whose second head has a target
    assert (t * H + 1) * V > 2**31
    row = torch.randn(V, device=device).bfloat16()
    logits[0, t, 1] = row
    weights = torch.zeros(B, S, device=device)
    weights[0, t] = 1.0
    output = Detached.apply(logits.requires_grad_())
    loss, stats = weighted_mtp_ce(output, labels, weights, reduction="sum", inplace_backward=inplace, return_stats=True)
    (gradient,) = torch.autograd.grad(loss, output)
    alone = row.float().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(alone[None], labels[0, :1])
    wanted.backward()
    torch.testing.assert_close(stats.ce[0, t, 1], wanted.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient[0, t, 1].float(), alone.grad / 2, rtol=1e-2, atol=1e-6)
    assert not bool(gradient[0, S - 1].any())


class Detached(torch.autograd.Function):
    """The same memory as if a layer had returned it: 4 GiB need no copy."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


@pytest.mark.parametrize("V", [32000, 50257, 128256, 151936])
def test_shapes_of_real_models(impl, draw, compare, V: int) -> None:
    """bf16 and fp32 rows of every tile, on the device."""
    labels, weights = draw.integers(V, 2, 16), draw.uniform(2, 16)
    for dtype in (torch.bfloat16, torch.float32):
        compare(draw.normal(2, 16, 4, V, dtype=dtype, scale=3), labels, weights)


def test_cuda_inputs_choose_triton(impl, draw) -> None:
    """impl="auto" on a GPU, bit for bit."""
    logits, labels, weights = batch(draw)
    assert torch.equal(
        weighted_mtp_ce(logits, labels, weights), weighted_mtp_ce(logits, labels, weights, impl="triton")
    )
