"""Memory and products of the linear path: one chunk of logits at a time, and nothing that nobody asked for."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mtp_ce import weighted_mtp_linear_ce

S, H, D, V = 24, 2, 8, 1024
ROWS = 5  # of a chunk
BYTES = {torch.float32: 4, torch.bfloat16: 2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The CPU path's block grows with the threads: the same block on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_change(rows: int) -> int:
    """Bytes for some numbers a row."""
    return 16384 + 256 * rows


def chunk_bytes_of(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """A row is padded to vectors, on a CPU to lines of the cache. On a CPU half types are computed in fp32: the block
    in the cache, and the gradient once more for the product into fp32 sums."""
    row = vocabulary * BYTES[dtype] + 64
    return rows * (row if device.type == "cuda" or dtype == torch.float32 else row + 2 * 4 * vocabulary)


Caller = Callable[..., Tensor]


@pytest.fixture
def call(impl, draw) -> Caller:
    """A loss of S * H rows over chunks of ROWS, as a function of the sizes, of what learns and of the options."""

    def make(
        learn: str, dtype: torch.dtype = torch.float32, features: int = D, vocabulary: int = V, **options: Any
    ) -> tuple[Callable[[], Tensor], list[Tensor]]:
        draw.generator.manual_seed(0)
        tensors = {
            "hidden": draw.normal(1, S, H, features, dtype=dtype),
            "unembed": draw.normal(vocabulary, features, dtype=dtype),
            "bias": draw.normal(vocabulary, dtype=dtype),
        }
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in learn)
        bias = tensors.pop("bias")
        bias = bias if bias.requires_grad else None
        labels = draw.integers(vocabulary, 1, S)
        how = {"chunk_bytes": ROWS * vocabulary * BYTES[dtype], "impl": impl, **options}
        leaves = [x for x in (*tensors.values(), bias) if x is not None and x.requires_grad]
        return lambda: weighted_mtp_linear_ce(**tensors, labels=labels, bias=bias, **how), leaves

    return make


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_more_than_a_chunk_and_the_gradients_is_ever_held(call, device, watch, dtype, drop, reduction: str) -> None:
    """In forward and backward together; the logits of all rows, or of one head, never exist."""
    loss, leaves = call("hidden unembed bias", dtype, drop_dead_rows=drop, reduction=reduction, return_stats=False)
    sums = V * D * 4 + V * 4  # fp32
    gradients = S * H * D * BYTES[dtype] + V * D * BYTES[dtype] + V * BYTES[dtype]
    seen = watch(lambda: torch.autograd.grad(loss().sum(), leaves))
    bound = chunk_bytes_of(ROWS, V, dtype, device) + sums + gradients * (dtype != torch.float32 or reduction == "none")
    bound += S * H * D * BYTES[dtype] + small_change(S * H)
    # A chunk of hidden states, gathered, without its masked rows and in fp32, and of their gradient.
    bound += 4 * ROWS * D * 4
    peak, largest = seen.peak, seen.largest
    assert peak <= bound + seen.spare
    assert bound < S * H * V * 4
    if dtype == torch.float32:  # torch's half products take room of their own
        assert device.type == "cuda" or largest < S * V * 4


def test_backward_allocates_nothing(call, watch) -> None:
    """The gradients are there already: scaled in place."""
    loss, leaves = call("hidden unembed bias")
    value = loss()
    seen = watch(lambda: torch.autograd.grad(value, leaves))
    peak, products = seen.peak, seen.products
    assert peak <= 4096 + seen.spare
    assert products == 0


LIGHT = {"features": 512, "vocabulary": 64}  # a chunk is far smaller than hidden, unembed and their gradients


@pytest.mark.pairwise
@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("wanted", ["nothing", "no_grad", "none"])
def test_forward_alone_holds_a_chunk(call, device, watch, drop: bool, wanted: str) -> None:
    """Nothing of the size of a gradient: frozen inputs, under no_grad, and the forward of reduction="none"."""
    learn = "" if wanted == "nothing" else "hidden unembed bias"
    loss, _ = call(learn, drop_dead_rows=drop, reduction="none" if wanted == "none" else "mean", **LIGHT)

    def forward() -> Tensor:
        with torch.set_grad_enabled(wanted != "no_grad"):
            return loss()

    seen = watch(forward)
    rows = S * H
    chunk = ROWS * LIGHT["features"] * 4
    bound = chunk_bytes_of(ROWS, LIGHT["vocabulary"], torch.float32, device) + chunk + small_change(rows)
    peak = seen.peak
    assert peak <= bound + seen.spare
    assert bound < min(rows, LIGHT["vocabulary"]) * LIGHT["features"] * 4


LIVE = (S - 1) + (S - 2)
CHUNKS = -(-LIVE // ROWS)
LEARNING = ["hidden unembed bias", "hidden unembed", "hidden", "unembed", "bias", "hidden bias", ""]


@pytest.mark.parametrize("learn", LEARNING, ids=lambda learn: learn.replace(" ", "_") or "nothing")
def test_products_that_no_input_wants_are_not_computed(call, watch, learn: str) -> None:
    """One a chunk for the logits, one for hidden, one for unembed; the gradient of the bias is no product."""
    loss, leaves = call(learn, drop_dead_rows=True)
    value = watch(loss)
    assert value.products == CHUNKS * (1 + ("hidden" in learn) + ("unembed" in learn))
    if leaves:
        assert watch(lambda: torch.autograd.grad(value.result, leaves)).products == 0


@pytest.mark.parametrize("learn", LEARNING[:-1], ids=lambda learn: learn.replace(" ", "_"))
def test_products_of_a_loss_for_every_token_come_in_backward(call, watch, learn: str) -> None:
    """reduction="none": logits in forward, logits once more and the wanted products in backward."""
    loss, leaves = call(learn, drop_dead_rows=True, reduction="none")
    value = watch(loss)
    assert value.products == CHUNKS
    gradients = watch(lambda: torch.autograd.grad(value.result.sum(), leaves))
    assert gradients.products == CHUNKS * (1 + ("hidden" in learn) + ("unembed" in learn))


def rows_multiplied(function: Callable[[], Any], vocabulary: int) -> int:
    """Rows of the products [rows, V] x [V, D], which are those of the gradient of hidden."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        function()
    shapes = [event.input_shapes[:2] for event in seen.events() if event.name == "aten::mm"]
    return sum(a[0] for a, b in shapes if a[1] == b[0] == vocabulary)


@pytest.mark.pairwise
@pytest.mark.parametrize("wants", ["_h", "h_", "h_h", "_hh_", "__"])
@pytest.mark.parametrize("drop", [True, False, "number"])
def test_only_rows_of_heads_that_want_a_gradient_are_multiplied_for_it(impl, draw, wants: str, drop) -> None:
    """h: the head's hidden states learn. Chunks of five rows begin and end within heads; gradients are those of all."""
    S, V = 8, 37
    heads = [draw.normal(1, S, D) for _ in wants]
    unembed, labels = draw.normal(V, D).requires_grad_(), draw.integers(V, 1, S)
    labels[0, 3:5] = -100

    def gradients(wants: str, drop: bool | int) -> list[Tensor]:
        leaves = [x.detach().requires_grad_(want == "h") for x, want in zip(heads, wants, strict=True)]
        loss = weighted_mtp_linear_ce(leaves, unembed, labels, chunk_bytes=ROWS * V * 4, drop_dead_rows=drop, impl=impl)
        return [*torch.autograd.grad(loss, [x for x in [*leaves, unembed] if x.requires_grad])]

    with torch.no_grad():
        valid = weighted_mtp_linear_ce(heads, unembed, labels, return_stats=True, impl=impl).stats.live.sum((0, 1))
    rows = [S] * len(wants) if drop is False else valid.tolist()
    number = int(valid.sum()) + 3 if drop == "number" else drop
    expected = sum(n for n, want in zip(rows, wants, strict=True) if want == "h")
    if drop == "number" and unembed.is_cuda and "h" in wants:
        expected = number  # a GPU is not asked whose rows they are
    assert rows_multiplied(lambda: gradients(wants, number), V) == expected
    kept = [x for x, want in zip(gradients("h" * len(wants), number), [*wants, "h"], strict=True) if want == "h"]
    for one, other in zip(gradients(wants, number), kept, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_chunk_of_bf16_has_no_sum_and_no_cast(call, device, watch, reduction: str) -> None:
    """Its logits and gradients are all there is: no fp32 gradient of unembed, which would be twice its size."""
    loss, leaves = call("hidden unembed", torch.bfloat16, features=256, chunk_bytes=None, reduction=reduction)
    seen = watch(lambda: torch.autograd.grad(loss().sum(), leaves))
    assert seen.products == 3 + (reduction == "none")
    in_fp32 = V * 256 * 4
    if device.type == "cpu":  # torch's half products take room of their own, as much as unembed
        assert seen.largest < in_fp32
    else:
        assert seen.peak <= in_fp32 + S * H * (V + 4 * 256) * 2 + small_change(S * H) + seen.spare
    several, leaves = call("hidden unembed", torch.bfloat16, features=256, reduction=reduction)
    seen = watch(lambda: torch.autograd.grad(several().sum(), leaves))
    assert seen.largest >= in_fp32


def test_a_gradient_that_waits_for_backward_has_the_dtype_of_its_input(call, watch) -> None:
    """Sums of bf16 are cast when the chunk is freed; backward under an upstream gradient of 1 allocates nothing."""
    loss, leaves = call("hidden unembed bias", torch.bfloat16, features=256)
    value = loss()
    seen = watch(lambda: torch.autograd.grad(value, leaves))
    assert seen.peak <= 4096 + seen.spare


def test_a_second_backward_computes_nothing_again(call, watch) -> None:
    """retain_graph costs a copy of the gradients, where it is used, and no product."""
    loss, leaves = call("hidden unembed", drop_dead_rows=True)
    value = loss()
    seen = [watch(lambda: torch.autograd.grad(value, leaves, retain_graph=True)) for _ in range(3)]
    seen.append(watch(lambda: torch.autograd.grad(value, leaves)))
    assert [one.products for one in seen] == [0] * 4
    assert min(one.peak for one in seen[:3]) >= (S * H + V) * D * 4
    assert seen[3].peak <= 4096 + seen[3].spare
    for one in seen[1:]:
        for first, later in zip(seen[0].result, one.result, strict=True):
            assert torch.equal(first, later)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hidden_states_are_saved_only_where_backward_reads_them(call, reduction: str) -> None:
    """Heads that nothing else needs are freed after the loss: their gradients are there."""
    loss, (hidden, _) = call("hidden unembed", reduction=reduction, features=64)
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss()
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    assert (hidden.untyped_storage().data_ptr() in held) == (reduction == "none")
    if reduction == "mean":
        assert sum(held.values()) < hidden.nbytes / 4


def test_the_cost_falls_with_the_masked_rows(impl, draw, watch) -> None:
    """Half of the tokens ignored, half of the products; with drop_dead_rows=False all of them."""
    hidden, unembed, labels = draw.normal(1, S + 1, 1, D), draw.normal(V, D), draw.integers(V, 1, S + 1)
    labels[0, : S // 2 + 1] = -100

    def products(drop: bool | int) -> int:
        return watch(
            lambda: weighted_mtp_linear_ce(
                hidden, unembed, labels, chunk_bytes=2 * V * 4, drop_dead_rows=drop, impl=impl
            )
        ).products

    assert products(True) == products(S // 2) == S // 4
    assert products(S) == S // 2
    assert products(False) == S // 2 + 1


def test_the_chunk_stays_below_chunk_bytes_on_the_gpu_and_one_line_a_row_above_it_on_a_cpu(impl, device) -> None:
    """What chunk_bytes promises."""
    from mtp_ce.ops.chunks import new_logits, rows_at_once

    for vocabulary, dtype in ((1000, torch.float32), (50257, torch.bfloat16), (32000, torch.bfloat16), (1, torch.half)):
        row = vocabulary * dtype.itemsize
        for most in (1, 7, 200):
            unembed = torch.empty(vocabulary, 1, dtype=dtype, device=device)
            chunk = new_logits(unembed, rows_at_once(1000, most, device), dtype)
            assert chunk.shape[1] == vocabulary
            assert 1 <= len(chunk) <= most
            assert chunk.untyped_storage().nbytes() <= most * (row + (64 if device.type == "cpu" else 16))


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"softcap": 5.0, "z_loss": 0.1, "label_smoothing": 0.1, "weight_alignment": "target"},
    "per_token": {"head_reduction": "target"},
    "none": {"reduction": "none", "head_reduction": "horizon"},
    "sum_over_nothing": {"reduction": "sum", "shift": 9},
    "mean_over_nothing": {"shift": 9},
    "frozen_hidden": {"frozen": ("hidden",)},
    "frozen_unembed": {"frozen": ("unembed",)},
}


@pytest.mark.pairwise
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("drop", [True, False, 9, 100])
def test_no_result_depends_on_uninitialised_memory(draw, compare, name: str, drop: bool | int) -> None:
    """Chunks, sums and gradients are written on every path: rows left out, rows masked, no row at all."""
    hidden, unembed, labels = draw.normal(1, 5, 2, 7), draw.normal(107, 7), draw.integers(107, 1, 5)
    weights = draw.normal(1, 5)
    weights[0, 2] = 0.0
    labels[0, 1] = -100
    got = compare(
        hidden, labels, weights, unembed=unembed, bias=draw.normal(107), chunk_bytes=3 * 107 * 4, drop_dead_rows=drop,
        **CASES[name],
    )  # fmt: skip
    found = (got.loss, *(got.d_hidden or ()), got.d_unembed, got.d_bias, got.d_token_weights, *got.stats)
    assert not any(bool(x.isnan().any()) for x in found if x is not None)
