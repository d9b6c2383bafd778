"""Memory: nothing of the size of the logits in forward, one gradient in backward, and no uninitialised number used."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_ce import weighted_mtp_ce
from mtp_ce.ops import cpu


def small_change(impl: str, rows: int) -> int:
    """Bytes that a pass may take beside a gradient: some numbers a row, and on a CPU a block a thread."""
    return 8192 + 128 * rows + (cpu.BLOCK_BYTES * torch.get_num_threads() if impl == "cpu" else 0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """The CPU path's block grows with the threads: the same block on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sizes(device: torch.device, impl: str) -> tuple[int, int, int, int]:
    """Logits far above the block that the CPU path works in; the interpreter needs less to show it."""
    if device.type == "cuda":
        return 2, 512, 4, 32000
    return (1, 256, 4, 8192) if impl == "cpu" else (1, 4, 2, 2048)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_allocates_nothing_of_the_size_of_the_logits(impl, device, draw, sizes, watch, dtype) -> None:
    """Not [B,S,H,V], not one head of it, not one in fp32; with statistics and every option."""
    B, S, H, V = sizes
    logits = draw.normal(B, S, H, V, dtype=dtype).requires_grad_()
    labels, weights = draw.integers(V, B, S), draw.uniform(B, S).requires_grad_()

    def forward() -> None:
        weighted_mtp_ce(
            logits, labels, weights, softcap=30.0, z_loss=1e-4, label_smoothing=0.1, return_stats=True, impl=impl
        )

    used = watch(forward).peak
    assert used <= small_change(impl, B * S * H)
    assert 3 * used < logits.numel() * logits.element_size()


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_backward_allocates_one_gradient_or_none(impl, device, draw, sizes, watch, dtype, inplace: bool) -> None:
    """In the logits' dtype, out of place; in place nothing but small change."""
    B, S, H, V = sizes
    logits = draw.normal(B, S, H, V, dtype=dtype).requires_grad_() * 1
    labels = draw.integers(V, B, S)
    loss = weighted_mtp_ce(logits, labels, inplace_backward=inplace, impl=impl)
    seen: list[Tensor] = []
    logits.register_hook(seen.append)
    size = logits.numel() * logits.element_size()

    def backward() -> None:
        torch.autograd.grad(loss, logits)

    used = watch(backward).peak
    small = small_change(impl, B * S * H)
    assert used <= (small if inplace else size + small)
    assert (seen[0].data_ptr() == logits.data_ptr()) == inplace


def test_the_blocks_of_all_threads_stay_below_64_mib() -> None:
    """However many cores a machine has."""
    assert cpu.BLOCK_BYTES * 32 <= 64 * 1024 * 1024


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"softcap": 5.0, "z_loss": 0.1, "label_smoothing": 0.1, "weight_alignment": "target"},
    "per_token": {"head_reduction": "target"},
    "none": {"reduction": "none", "head_reduction": "horizon"},
    "sum_over_nothing": {"reduction": "sum", "shift": 9},
    "mean_over_nothing": {"shift": 9},
    "ignored": {"ignore_index": 3},
}


@pytest.mark.pairwise
@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["one", "list", "column_major"])
def test_no_result_depends_on_uninitialised_memory(
    impl, draw, compare, poisoned_memory, name: str, layout: str
) -> None:
    """Every output is written on every path: under torch.compile and in a caching allocator buffers come dirty."""
    B, S, H, V = 1, 5, 2, 107
    logits, labels, weights = draw.normal(B, S, H, V), draw.integers(V, B, S), draw.normal(B, S).relu()
    labels[0, 1:3] = 3
    if layout == "list":
        logits = [x.contiguous() for x in logits.unbind(2)]
    elif layout == "column_major":
        logits = logits.transpose(2, 3).contiguous().transpose(2, 3)
    got = compare(logits, labels, weights, **CASES[name])
    assert not any(
        bool(x.isnan().any()) for x in (got.loss, *got.d_logits, got.d_token_weights, got.stats.ce, got.stats.lse)
    )


@pytest.mark.pairwise
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
@pytest.mark.parametrize("shape", [(0, 4, 2, 5), (2, 0, 2, 5)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_empty_batch_is_not_uninitialised_memory(impl, device, shape, reduction: str) -> None:
    """The shortcut for no rows writes its zero."""
    labels = torch.zeros(shape[:2], dtype=torch.int64, device=device)
    logits = torch.zeros(shape, device=device, requires_grad=True)
    loss = weighted_mtp_ce(logits, labels, reduction=reduction, impl=impl)
    assert loss.item() == 0
    loss.backward()
