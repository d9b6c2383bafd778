"""Slices of a sequence, whose labels have a halo: together they are the whole, whatever is cut where."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mtp_ce import token_ce, weighted_mtp_ce, weighted_mtp_linear_ce
from mtp_ce.ops.rows import count_terms, row_targets
from mtp_ce.options import LossInputs, LossOptions

B, S, V, D, PARTS = 2, 16, 11, 5, 4
DOCUMENTS = {
    "one": [0] * 16,
    "cut_at_every_part": [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4,
    "cut_elsewhere": [0] * 3 + [1] * 6 + [2] + [3] * 6,
    "coming_back": [0, 0, 0, 1, 0, 1, 1, 0, 2, 0, 0, 2, 2, 1, 1, 1],
    "of_one_token": [*range(16)],
}


def parts_of_ranks(layout: str) -> list[list[int]]:
    """First positions of each rank's slices: one of S / 4 positions, or in zig-zag two of S / 8."""
    if layout == "contiguous":
        return [[r * S // PARTS] for r in range(PARTS)]
    return [[r * S // (2 * PARTS), (2 * PARTS - 1 - r) * S // (2 * PARTS)] for r in range(PARTS)]


def cut(x: Tensor, starts: list[int], size: int, before: int = 0, after: int = 0) -> Tensor:
    """One rank's slices of [B, S, ...] beside one another in the batch, with tokens before and after."""
    return torch.cat([x[:, a : a + before + size + after] for a in starts])


def put_together(parts: list[Tensor], ranks: list[list[int]], whole: Tensor) -> Tensor:
    """Slices [slices * B, size + halos, ...] added up where they come from, in a tensor like `whole`."""
    total = torch.zeros_like(whole)
    for part, starts in zip(parts, ranks, strict=True):
        for a, piece in zip(starts, part.split(len(whole)), strict=True):
            total[:, a : a + piece.shape[1]] += piece
    return total


def draw_whole(draw, H: int, documents: str | None, weights: str, dtype: torch.dtype) -> SimpleNamespace:
    """Hidden states, labels (a run of them masked, over a cut), weights and documents of whole sequences."""
    labels = draw.integers(V, B, S)
    labels[0, 5:9] = -100
    labels[1, 0] = labels[1, 13] = -100
    ids = None if documents is None else torch.tensor([DOCUMENTS[documents]] * B, device=labels.device)
    shape = {"none": (), "position": (B, S), "rows": (B, S, H), "target": (B, S)}[weights]
    return SimpleNamespace(
        hidden=draw.normal(B, S, H, D, dtype=dtype), unembed=draw.normal(V, D, dtype=dtype), labels=labels, ids=ids,
        weights=draw.normal(*shape, dtype=dtype) if shape else None, of_targets=weights == "target",
    )  # fmt: skip


def run(
    whole: SimpleNamespace, ranks: list[list[int]], size: int, halos: tuple[int, int], linear: bool, **options: Any
) -> SimpleNamespace:
    """Loss and statistics over all ranks, and the gradients put together; a rank sees its slices and their halos."""
    left = halos[0]
    labels = F.pad(whole.labels, halos, value=-100)
    # Before the sequence and after it there is no position.
    ids = torch.zeros_like(whole.labels) if whole.ids is None else whole.ids
    ids = F.pad(ids, halos, value=-1)
    hidden, unembed, weights = (None if x is None else x.clone() for x in (whole.hidden, whole.unembed, whole.weights))
    if whole.of_targets:
        weights = F.pad(weights, halos)
    out: dict[str, list[Tensor]] = {name: [] for name in ("loss", "ce", "live", "lse", "top1", "hidden", "weights")}
    d_unembed = torch.zeros_like(unembed)
    for starts in ranks:
        x = cut(hidden, starts, size).requires_grad_()
        u = unembed.clone().requires_grad_()
        wide = halos if whole.of_targets else (0, 0)
        w = None if weights is None else cut(weights, starts, size, *wide).requires_grad_()
        call = {"document_ids": cut(ids, starts, size, *halos), "left_halo": left, "return_stats": True, **options}
        y = cut(labels, starts, size, *halos)
        call["weight_alignment"] = "target" if whole.of_targets else "position"
        if linear:
            loss, stats = weighted_mtp_linear_ce(x, u, y, w, **call)
        else:
            loss, stats = weighted_mtp_ce(x @ u.T, y, w, **call)
        leaves = [x, u] if w is None else [x, u, w]
        gradients = torch.autograd.grad(loss.sum(), leaves)
        out["loss"].append(loss.detach())
        for name, column in stats._asdict().items():
            out[name].append(column)
        out["hidden"].append(gradients[0])
        d_unembed += gradients[1]
        out["weights"].append(gradients[2] if len(gradients) == 3 else torch.zeros(len(x), 1))
    found = {name: put_together(out[name], ranks, whole.hidden[..., 0].to(out[name][0].dtype)) for name in (
        "ce", "live", "lse", "top1")}  # fmt: skip
    loss = out["loss"]
    d_weights = None
    if weights is not None:
        d_weights = put_together(out["weights"], ranks, weights)
        if whole.of_targets:
            d_weights = d_weights[:, left : left + S]
    return SimpleNamespace(
        **found, d_hidden=put_together(out["hidden"], ranks, whole.hidden), d_unembed=d_unembed, d_weights=d_weights,
        loss=sum(loss) if loss[0].dim() == 0 else put_together(loss, ranks, whole.hidden[..., 0, 0]),
    )  # fmt: skip


def assert_slices_are_the_whole(whole: SimpleNamespace, layout: str, linear: bool, tolerance: float, **options) -> None:
    """Every result of slices with halos against those of one call without."""
    H = whole.hidden.shape[2]
    ranks = parts_of_ranks(layout)
    expected = run(whole, [[0]], S, (0, 0), linear, **options)
    found = run(whole, ranks, S // PARTS // len(ranks[0]), (H - 1, H), linear, **options)
    for name, value in vars(expected).items():
        got = getattr(found, name)
        if value is None or value.dtype in (torch.bool, torch.int32):
            assert value is got or torch.equal(got, value), name
        else:
            torch.testing.assert_close(
                got, value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.pairwise
@pytest.mark.parametrize("layout", ["contiguous", "zig_zag"])
@pytest.mark.parametrize("documents", [None, *DOCUMENTS])
@pytest.mark.parametrize("head_reduction", ["live", "horizon", "target"])
@pytest.mark.parametrize("weights", ["none", "position", "rows", "target"])
@pytest.mark.parametrize("H", [1, 3, 6])  # 6: more than a rank's positions, and than a slice of one
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("normalizer", [7.0, None])
def test_four_ranks_with_halos_are_one_without(
    impl, draw, layout, documents, head_reduction, weights, H, linear, normalizer
) -> None:
    """Loss, statistics of every row and all gradients, with documents cut anywhere; nothing is sent between ranks."""
    dtype = torch.float64 if impl == "cpu" else torch.float32
    whole = draw_whole(draw, H, documents, weights, dtype)
    # A local mean has a local N, so that without a global one the ranks return sums.
    reduction = "sum" if normalizer is None else "mean"
    options = {"head_reduction": head_reduction, "reduction": reduction, "normalizer": normalizer, "impl": impl}
    if head_reduction != "horizon" and linear:
        options["head_weights"] = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0][:H], device=whole.labels.device)
    assert_slices_are_the_whole(whole, layout, linear, 1e-12 if impl == "cpu" else 2e-5, **options)


@pytest.mark.parametrize("linear", [False, True])
def test_every_option_on_slices(impl, draw, linear: bool) -> None:
    """Softcap, z-loss, smoothing and a loss per position, for heads that predict the same token in the mean."""
    dtype = torch.float64 if impl == "cpu" else torch.float32
    whole = draw_whole(draw, 3, "cut_elsewhere", "target", dtype)
    options = {"softcap": 3.0, "z_loss": 0.1, "label_smoothing": 0.2, "head_reduction": "target", "impl": impl}
    assert_slices_are_the_whole(whole, "zig_zag", linear, 1e-12 if impl == "cpu" else 2e-5, reduction="none", **options)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("head_reduction", ["live", "horizon", "target"])
def test_the_counts_of_slices_add_up(documents: str, head_reduction: str) -> None:
    """N of the whole is the sum of the slices' own; a slice with a valid row has a count above 0."""
    H, size = 5, 2
    labels = torch.arange(S).expand(B, S).clone()
    labels[0, 4:11] = -100
    ids = torch.tensor([DOCUMENTS[documents]] * B)
    options = LossOptions(head_reduction=head_reduction, left_halo=H - 1)

    def count(y: Tensor, documents: Tensor, options: LossOptions, S: int) -> float:
        inputs = LossInputs(y, document_ids=documents)
        _, _, valid = row_targets(inputs, options, S, H)
        found = float(count_terms(valid, options, inputs))
        assert (found > 0) == bool(valid.any())
        return found

    whole = count(labels, ids, LossOptions(head_reduction=head_reduction), S)
    wide_labels, wide_ids = F.pad(labels, (H - 1, H), value=-100), F.pad(ids, (H - 1, H), value=-1)
    slices = (slice(a, a + H - 1 + size + H) for a in range(0, S, size))
    assert sum(count(wide_labels[:, i], wide_ids[:, i], options, size) for i in slices) == pytest.approx(whole)


@pytest.mark.parametrize("linear", [False, True])
def test_a_slice_that_is_masked_costs_and_counts_nothing(impl, draw, device, linear: bool) -> None:
    """Loss and gradients of exactly 0 where the targets are all ignored, in the halo too, whatever the slice holds."""
    hidden = draw.normal(1, 4, 2, D)
    hidden[0, 3] = torch.nan
    unembed = draw.normal(V, D)
    labels = torch.full((1, 6), -100, device=device)
    labels[0, 0] = 3  # a token of the first position, which nothing here predicts
    x, u = hidden.requires_grad_(), unembed.requires_grad_()
    options = {"head_reduction": "target", "impl": impl}
    loss = weighted_mtp_linear_ce(x, u, labels, **options) if linear else weighted_mtp_ce(x @ u.T, labels, **options)
    loss.backward()
    assert loss.item() == 0
    assert x.grad.abs().max() == 0
    if linear:  # a product of ones own would multiply the NaN
        assert u.grad.abs().max() == 0


def test_a_token_of_the_halo_is_a_target(impl, draw, device) -> None:
    """The last positions lose no target: every row is valid, with the cross entropy of the token in the halo."""
    hidden, unembed, labels = draw.normal(1, 4, 3, D), draw.normal(V, D), draw.integers(V, 1, 7)
    ce = token_ce(hidden, unembed, labels, impl=impl)
    assert ce.shape == (1, 4, 3)  # of the positions, not of the labels
    z = (hidden.double() @ unembed.double().T).log_softmax(-1)
    for h in range(3):
        wanted = -z[0, :, h].gather(-1, labels[0, 1 + h : 5 + h, None])[:, 0]
        torch.testing.assert_close(ce[0, :, h].double(), wanted, rtol=1e-5, atol=1e-5)
    lens = torch.tensor([5], device=device)  # counts in the labels: one token of the halo is left
    _, stats = weighted_mtp_linear_ce(hidden, unembed, labels, seq_lens=lens, return_stats=True, impl=impl)
    assert stats.live[0].int().tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]]


def test_a_broken_label_of_the_halo_is_named(draw, impl, device) -> None:
    """By its index in the labels; one that no position predicts is no error."""
    labels = torch.zeros(1, 8, dtype=torch.int64, device=device)
    labels[0, 7] = V  # beyond what two heads predict from 4 positions
    weighted_mtp_ce(draw.normal(1, 4, 2, V), labels, validate=True, impl=impl)
    labels[0, 5] = V
    with pytest.raises(IndexError, match=rf"labels\[0, 5\] is {V}"):
        weighted_mtp_ce(draw.normal(1, 4, 2, V), labels, validate=True, impl=impl)
