"""What only a GPU can show: no host sync, CUDA graphs, streams, devices, more than 2**31 elements."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_ce import MTPWrapper, token_ce, weighted_mtp_ce, weighted_mtp_linear_ce
from mtp_ce.ops.chunks import GPU_ROWS

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


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_without_synchronisation(impl, draw, linear: bool, mode: str, request: pytest.FixtureRequest) -> None:
    """torch.compile, also with its CUDA graphs: the numbers of eager on every batch, and nobody waits."""

    def step(labels: Tensor, weights: Tensor, *leaves: Tensor) -> Tensor:
        if linear:
            return weighted_mtp_linear_ce(*leaves, labels, weights, drop_dead_rows=False, **OPTIONS)
        return weighted_mtp_ce(*leaves, labels, weights, **OPTIONS)

    def outcome(function: Callable[..., Tensor], labels: Tensor, weights: Tensor, *leaves: Tensor) -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        loss = function(labels, weights, *leaves)
        return [tensor.detach().clone() for tensor in (loss, *torch.autograd.grad(loss, leaves))]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, mode=mode)
    data = []
    for _ in range(5):
        logits, labels, weights = batch(draw)
        leaves = [draw.normal(2, 64, 4, 72).bfloat16(), draw.normal(4099, 72).bfloat16()] if linear else [logits]
        data.append((labels, weights, *[leaf.requires_grad_() for leaf in leaves]))
    wanted = [outcome(step, *one) for one in data]
    got = [outcome(compiled, *one) for one in data[:4]]  # compiles, warms up and captures, which may synchronise
    request.getfixturevalue("no_sync")
    got.append(outcome(compiled, *data[4]))
    for ours, eager in zip(got, wanted, strict=True):
        for one, other in zip(ours, eager, strict=True):
            if linear:
                close(one, other)
            else:
                assert torch.equal(one, other)


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


def linear_batch(draw, B: int = 2, S: int = 64, H: int = 4, D: int = 72, V: int = 4099) -> dict[str, Tensor]:
    """The same on hidden states: bf16 leaves."""
    _, labels, weights = batch(draw, B, S, 1, V)
    leaves = {
        "hidden": draw.normal(B, S, H, D, dtype=torch.bfloat16),
        "unembed": draw.normal(V, D, dtype=torch.bfloat16, scale=0.2),
        "bias": draw.normal(V, dtype=torch.bfloat16),
        "token_weights": weights,
    }
    return {**{name: leaf.requires_grad_() for name, leaf in leaves.items()}, "labels": labels}


LEAVES = ("hidden", "unembed", "bias", "token_weights")
# The batch has 2 * 64 positions of 4 heads: all rows, or an upper bound of those that are read.
NO_SYNC = [False, 500, 512]


@pytest.mark.pairwise
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("drop", NO_SYNC)
@pytest.mark.parametrize("several", [False, True])
def test_no_host_synchronisation_on_the_linear_path(
    impl, device, draw, reduction: str, drop: bool | int, several: bool, request: pytest.FixtureRequest
) -> None:
    """Forward, backward, a second backward, statistics, tensor normalizer, all ignored, several chunks, token_ce."""
    data = linear_batch(draw)
    leaves = [data[name] for name in LEAVES]
    lens, nothing = torch.tensor([64, 9], device=device), torch.full_like(data["labels"], -100)
    normalizer = torch.tensor(77.0, device=device) if reduction == "mean" else None
    upstream = torch.ones(nothing.shape if reduction == "none" else (), device=device)
    how = {"drop_dead_rows": drop, "chunk_bytes": 200 * 4099 * 2, "seq_lens": lens}

    def step() -> None:
        for labels in (data["labels"], nothing):
            arguments = {**data, "labels": labels}
            if several:
                arguments["hidden"] = data["hidden"].unbind(2)
            loss, _ = weighted_mtp_linear_ce(
                **arguments, **how, reduction=reduction, normalizer=normalizer, return_stats=True, **OPTIONS
            )
            torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
            torch.autograd.grad(loss, leaves, upstream)
            token_ce(arguments["hidden"], data["unembed"], labels, bias=data["bias"], **how)

    step()  # compiles, which may synchronise
    request.getfixturevalue("no_sync")
    step()


def test_counting_the_valid_rows_waits_and_is_not_the_default(impl, draw, request: pytest.FixtureRequest) -> None:
    """drop_dead_rows=True is the one way to wait; "auto" does not take it."""
    data = linear_batch(draw)
    weighted_mtp_linear_ce(**data)
    request.getfixturevalue("no_sync")
    weighted_mtp_linear_ce(**data)
    with pytest.raises(RuntimeError, match="synchroniz"):
        weighted_mtp_linear_ce(**data, drop_dead_rows=True)


@pytest.mark.parametrize("heads", ["residual", "teacher_forcing"])
def test_a_wrapper_that_is_told_its_rows_does_not_wait(impl, device, draw, heads: str, request) -> None:
    """Counted on the host; behind the trunk, which may wait, nothing does. The loss is that over all rows."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MTPWrapper(transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=999, **sizes)), 4, heads=heads)
    model = model.to(device=device, dtype=torch.bfloat16)
    tokens = torch.arange(8 * 256).view(8, 256) % 999
    batch = {"labels": tokens.masked_fill(torch.arange(256) < 100, -100), "token_weights": (tokens % 3 > 0).float()}
    rows = model.count_rows(**batch)
    assert rows % GPU_ROWS == 0
    assert rows < 0.5 * 4 * tokens.numel()
    moved = {name: x.to(device) for name, x in batch.items()}
    hidden, _ = model._hidden_states(input_ids=tokens.to(device))
    model._hidden_states = lambda **_: ([x.detach().requires_grad_() for x in hidden], None)
    arguments = {"input_ids": tokens.to(device), **moved, "num_items_in_batch": torch.tensor(999.0, device=device)}
    model(**arguments, drop_dead_rows=rows).loss.backward()  # compiles, which may synchronise
    request.getfixturevalue("no_sync")
    losses = []
    for drop in (rows, None):
        losses.append(model(**arguments, drop_dead_rows=drop).loss)
        losses[-1].backward()
    torch.cuda.set_sync_debug_mode("default")
    close(*losses)
    assert model(**arguments, drop_dead_rows=rows - GPU_ROWS).loss.isnan()


def close(ours: Tensor, wanted: Tensor) -> None:
    """cuBLAS may sum in another order; bf16 rounds what differs."""
    half = wanted.dtype == torch.bfloat16
    torch.testing.assert_close(
        ours, wanted, rtol=2e-2 if half else 1e-5, atol=2e-2 * float(wanted.abs().max()) if half else 1e-6
    )


@pytest.mark.parametrize("drop", NO_SYNC)
def test_the_linear_path_inside_a_cuda_graph(impl, draw, drop: bool | int) -> None:
    """Captured once, replayed on other numbers and other labels: loss and gradients of those."""
    data = linear_batch(draw)
    how = {"drop_dead_rows": drop, "chunk_bytes": 200 * 4099 * 2, **OPTIONS}

    def step() -> list[Tensor]:
        loss = weighted_mtp_linear_ce(**data, **how)
        return [loss, *torch.autograd.grad(loss, [data[name] for name in LEAVES])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        other = linear_batch(draw)
        with torch.no_grad():
            for name, tensor in other.items():
                data[name].copy_(tensor)
        graph.replay()
        replayed = [tensor.detach().clone() for tensor in captured]
        for ours, eager in zip(replayed, step(), strict=True):
            close(ours, eager.detach())


def test_the_linear_path_on_a_stream_of_its_own(impl, draw) -> None:
    """Products and kernels go to the current stream, after what was queued there."""
    data = linear_batch(draw, S=512)

    def step(hidden: Tensor) -> list[Tensor]:
        loss = weighted_mtp_linear_ce(**{**data, "hidden": hidden})
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, data["unembed"]))]

    wanted = step(data["hidden"])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever forgets the stream reads the zeros below
        late = torch.zeros_like(data["hidden"]).detach()
        late.copy_(data["hidden"].detach())
        got = step(late.requires_grad_())
    stream.synchronize()
    for ours, true in zip(got, wanted, strict=True):
        close(ours, true)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device, and there is none")
def test_the_linear_path_on_a_device_that_is_not_the_current_one(impl, draw) -> None:
    """The launch is guarded, in forward and in backward."""
    data = linear_batch(draw)
    results = []
    for device in ("cuda:0", "cuda:1"):
        moved = {name: tensor.detach().to(device) for name, tensor in data.items()}
        leaves = [moved[name].requires_grad_() for name in LEAVES]
        loss = weighted_mtp_linear_ce(**moved)
        results.append([x.detach().cpu() for x in (loss, *torch.autograd.grad(loss, leaves))])
    for ours, wanted in zip(*results, strict=True):
        close(ours, wanted)


@pytest.mark.parametrize("V", [32000, 50257, 128256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shapes_of_real_models_on_the_linear_path(impl, draw, compare, V: int, dtype: torch.dtype) -> None:
    """By the products of the device, in three chunks; half inputs are summed in fp32."""
    B, S, H, D = 1, 96, 4, 256
    labels, weights = draw.integers(V, B, S), draw.uniform(B, S)
    hidden, unembed = draw.normal(B, S, H, D, dtype=dtype), draw.normal(V, D, dtype=dtype, scale=D**-0.5)
    compare(hidden, labels, weights, unembed=unembed, chunk_bytes=GPU_ROWS * V * dtype.itemsize)


def test_half_gradients_are_summed_over_chunks_in_fp32(impl, device, draw) -> None:
    """32 chunks that push one class the same way: in bf16 the sum would lose the last bits of the late ones."""
    rows, V, D = 32 * GPU_ROWS, 64, 128
    hidden = (1 + 0.05 * draw.normal(rows, 2, 1, D)).bfloat16()
    unembed = draw.normal(V, D, scale=0.01, dtype=torch.bfloat16)
    labels = torch.zeros(rows, 2, dtype=torch.int64, device=device)

    def gradient(dtype: torch.dtype, **how: Any) -> Tensor:
        u = unembed.to(dtype).requires_grad_()
        loss = weighted_mtp_linear_ce(hidden.to(dtype), u, labels, drop_dead_rows=rows, **how)
        return torch.autograd.grad(loss, u)[0].double()

    exact = gradient(torch.float64, impl="reference")
    chunk_bytes = GPU_ROWS * V * 2
    errors = {
        grad_dtype: float((gradient(torch.bfloat16, chunk_bytes=chunk_bytes, grad_dtype=grad_dtype) - exact).norm())
        for grad_dtype in (torch.float32, torch.bfloat16)
    }
    assert errors[torch.float32] <= torch.finfo(torch.bfloat16).eps / 2 * float(exact.norm())
    assert errors[torch.bfloat16] >= 2 * errors[torch.float32]


@pytest.mark.parametrize("chunk_bytes", [None, 5 * 2**30])
def test_more_than_two_to_the_31_logits_on_the_linear_path(impl, device, chunk_bytes: int | None) -> None:
    """Over chunks and in one chunk: the last row's loss and gradients are those of the same row alone."""
    S, H, V, D = 8260, 2, 131072, 64
    t = S - 3  # the last position whose second head has a target
    assert (t * H + 1) * V > 2**31
    hidden = torch.zeros(1, S, H, D, dtype=torch.bfloat16, device=device)
    hidden[0, t, 1] = torch.randn(D, device=device)
    unembed = torch.randn(V, D, device=device).mul_(0.3).bfloat16()
    labels, weights = torch.full((1, S), 3, device=device), torch.zeros(1, S, device=device)
    weights[0, t] = 1.0
    x, u = hidden.requires_grad_(), unembed.requires_grad_()
    loss, stats = weighted_mtp_linear_ce(
        x, u, labels, weights, reduction="sum", chunk_bytes=chunk_bytes, drop_dead_rows=False, return_stats=True
    )
    d_hidden, d_unembed = torch.autograd.grad(loss, (x, u))
    row, wide = hidden[0, t].detach().float().requires_grad_(), unembed.detach().float().requires_grad_()
    logits = torch.nn.functional.linear(row, wide)
    # Rounded as the chunk rounds them, without a rounding of their gradient.
    rounded = logits + (logits.detach().bfloat16().float() - logits.detach())
    ce = torch.nn.functional.cross_entropy(rounded, labels[0, :2], reduction="none")
    ce.mean().backward()
    torch.testing.assert_close(stats.ce[0, t], ce.detach(), rtol=1e-3, atol=0)
    for ours, wanted in ((d_hidden[0, t], row.grad), (d_unembed, wide.grad)):
        assert float((ours.float() - wanted).norm()) <= 1e-2 * float(wanted.norm())
    assert not bool(d_hidden[0, :t].any())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_memory_is_a_chunk_and_the_gradients(impl, device, draw, watch, reduction: str) -> None:
    """16384 rows of 32000 logits: 1 GiB whole, of which a tenth is alive; forward alone takes no gradient's room."""
    S, H, V, D = 4096, 4, 32000, 512
    hidden = draw.normal(1, S, H, D, dtype=torch.bfloat16).requires_grad_()
    unembed = draw.normal(V, D, dtype=torch.bfloat16, scale=0.05).requires_grad_()
    labels, rows = draw.integers(V, 1, S), 1664
    how = {"chunk_bytes": rows * V * 2, "reduction": reduction}

    def step() -> None:
        loss = weighted_mtp_linear_ce(hidden, unembed, labels, **how)
        torch.autograd.grad(loss.sum(), (hidden, unembed))

    def evaluation() -> Tensor:
        return token_ce(hidden, unembed, labels, chunk_bytes=how["chunk_bytes"])

    step()  # cuBLAS takes its workspaces, which stay
    evaluation()
    logits_chunk, chunk = rows * V * 2, rows * D * 2
    sums = V * D * 4 + V * D * 2  # d_unembed in fp32, and in bf16 at the end
    small = 128 * S * H + 16 * 2**20
    used = watch(step).peak
    assert used <= logits_chunk + sums + 2 * S * H * D * 2 + 3 * chunk + small
    assert used < S * H * V * 2 / 3
    used = watch(evaluation).peak
    assert used <= logits_chunk + 3 * chunk + small
