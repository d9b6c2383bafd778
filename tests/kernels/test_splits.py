"""Rows that several programs share, as a device with too few positions to fill it has them."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from mtp_ce import weighted_mtp_ce
from mtp_ce.kernels import backward, forward
from mtp_ce.kernels.tiles import LEAST_TILES, PROGRAMS_HELD, row_splits

pytestmark = pytest.mark.parametrize("impl", ["triton"])
# Of tiles of 4096 fp32 elements or 8192 bf16 ones: parts of unequal length, and an odd row at every alignment.
V = 30011


def pretend(monkeypatch: pytest.MonkeyPatch, multiprocessors: int) -> None:
    """Launchers see a device of so many multiprocessors."""
    for module in (forward, backward):
        monkeypatch.setattr(module, "processors", lambda device: multiprocessors)


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What launchers have decided."""
    decided: list[int] = []

    def spy(module: ModuleType) -> None:
        def decide(*arguments: int) -> int:
            decided.append(row_splits(*arguments))
            return decided[-1]

        monkeypatch.setattr(module, "row_splits", decide)

    spy(forward)
    spy(backward)
    return decided


def batch(draw, dtype: torch.dtype, H: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Labels at both ends of the row, in its edges and at the borders of its parts; a hole; a weight of 0."""
    places = [0, 1, 4095, 4096, 8191, 8192, 8199, 16384, 24575, V - 2, V - 1, V // 2]
    labels = torch.tensor(places, device=draw.normal(1).device).view(2, 6)
    labels[1, 4] = -100
    weights = draw.uniform(2, 6)
    weights[0, 2] = 0
    return draw.normal(2, 6, H, V, dtype=dtype, scale=3), labels, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 5.0, "z_loss": 1e-3, "label_smoothing": 0.1, "weight_alignment": "target"},
        {"label_smoothing": 0.3, "reduction": "none"},
    ],
    ids=["plain", "all terms", "smoothing"],
)
def test_shared_rows_err_as_little_as_whole_ones(
    impl,
    draw,
    compare,
    monkeypatch: pytest.MonkeyPatch,
    splits: list[int],
    dtype: torch.dtype,
    options: dict[str, object],
) -> None:
    """Loss, statistics, gradients of logits and weights, against the oracle."""
    pretend(monkeypatch, 10**6)
    logits, labels, weights = batch(draw, dtype)
    compare(logits, labels, weights, **options)
    assert len(splits) >= 2
    assert min(splits) > 1


def test_gradients_of_shared_rows_are_those_of_whole_ones(impl, draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the rounding of the sum, and to the bit where that is the same: nothing is left out, nothing written twice."""
    logits, labels, weights = batch(draw, torch.bfloat16)
    gradients = []
    for multiprocessors in (0, 10**6):
        pretend(monkeypatch, multiprocessors)
        x = logits.clone().requires_grad_()
        loss = weighted_mtp_ce(x * 1, labels, weights, impl=impl, inplace_backward=True)
        gradients.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(*gradients, rtol=2**-7, atol=0)
    assert float((gradients[0] != gradients[1]).float().mean()) < 1e-3


@pytest.mark.parametrize("row", ["ties", "huge", "far apart", "one finite", "nothing finite"])
def test_statistics_of_shared_rows(impl, draw, monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    """The first of equal maxima wins, whichever part it is in; no part of -inf becomes NaN."""
    pretend(monkeypatch, 10**6)
    x = draw.normal(V)
    if row == "ties":
        x[[5000, 20000, V - 1]] = 9.0
    elif row == "huge":
        x += 1e4
    elif row == "far apart":
        x[:10000] -= 1e4
    else:
        x[:] = float("-inf")
        if row == "one finite":
            x[V - 1] = 2.0
    labels = torch.full((1, 2), V - 1, device=x.device)
    options = {"return_stats": True, "reduction": "sum", "shift": 0}
    logits = x.expand(1, 2, 1, V)
    smoothing = {} if row.endswith("finite") else {"label_smoothing": 0.2}
    got, stats = weighted_mtp_ce(logits, labels, impl=impl, **smoothing, **options)
    assert int(stats.top1[0, 0, 0]) == {"ties": 5000, "nothing finite": 0}.get(row, int(x.argmax()))
    wanted, exact = weighted_mtp_ce(logits.double().cpu(), labels.cpu(), impl="reference", **smoothing, **options)
    torch.testing.assert_close(stats.lse.double().cpu(), exact.lse.double(), rtol=2e-7, atol=0, equal_nan=True)
    torch.testing.assert_close(got.double().cpu(), wanted.double(), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("tiles", [1, 2, 3, 7, 19, 64])
@pytest.mark.parametrize("programs", [1, 63, 256, 500, 792, 1100, 3168, 10**6])
def test_parts_are_whole_tiles_and_none_is_empty(impl, tiles: int, programs: int) -> None:
    """As many as fill 132 multiprocessors, or as the row has room for; one where whole rows fill every wave."""
    count = row_splits(programs, tiles * 4096 - 5, 4096, 132)
    each = -(-tiles // count)
    assert 1 <= count <= max(1, tiles // LEAST_TILES)
    assert each * (count - 1) < tiles <= each * count
    held = PROGRAMS_HELD * 132
    if programs % held == 0:
        assert count == 1
    # Sharing never makes more steps, one after the other, than whole rows.
    assert -(-programs * count // held) * each <= -(-programs // held) * tiles


def test_rows_are_shared_where_whole_ones_would_leave_a_wave_almost_empty(impl) -> None:
    """1100 positions are 1.4 times what 132 multiprocessors hold."""
    tiles = 37  # of backward at V 151936 in bf16
    count = row_splits(1100, tiles * 4096, 4096, 132)
    waves = -(-1100 * count // (PROGRAMS_HELD * 132))
    assert waves * -(-tiles // count) < 0.8 * 2 * tiles
