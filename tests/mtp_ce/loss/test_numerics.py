"""Where floating point bites: infinities, large logits, sure predictions, caps, vocabulary edges."""

import math

import pytest
import torch
import torch.nn.functional as F

from mtp_ce import weighted_mtp_ce

EDGES = [1, 2, 127, 507, 1000, 1024]


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [*EDGES, pytest.param(131072, marks=pytest.mark.gpu)])
def test_vocabularies_on_and_off_the_edge_of_a_tile(compare, draw, V: int, dtype: torch.dtype) -> None:
    """Labels in the first and the last entry; with and without what touches every lane."""
    labels = torch.tensor([[V // 2, 0, V - 1]], device=draw.integers(1, 1).device)
    logits, weights = draw.normal(1, 3, 2, V, scale=2, dtype=dtype), draw.normal(1, 3)
    compare(logits, labels, weights)
    compare(logits, labels, weights, softcap=0.3, z_loss=0.02, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "V", [50257, pytest.param(32000, marks=pytest.mark.gpu), pytest.param(256000, marks=pytest.mark.gpu)]
)
def test_vocabularies_of_real_models(compare, draw, V: int, dtype: torch.dtype) -> None:
    """GPT-2's is odd: no row but the first starts on a 16-byte boundary."""
    labels = draw.integers(V, 1, 3)
    labels[0, 2] = V - 1
    compare(draw.normal(1, 3, 1, V, scale=3, dtype=dtype), labels, draw.uniform(1, 3), label_smoothing=0.1)


@pytest.mark.pairwise
@pytest.mark.parametrize("softcap", [1e-3, 0.5, 3.0, 30.0, 1e4])
@pytest.mark.parametrize("V", [5, 1000, 2047])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softcap_of_any_size(compare, draw, softcap: float, V: int, dtype: torch.dtype) -> None:
    """Under a tiny cap all entries are nearly equal: one lane too many in the sum would show at once."""
    got = compare(draw.normal(1, 3, 2, V, scale=4, dtype=dtype), draw.integers(V, 1, 3), softcap=softcap)
    if softcap == 1e-3:
        live = got.stats.live
        torch.testing.assert_close(
            got.stats.lse[live], torch.full_like(got.stats.lse[live], math.log(V)), rtol=0, atol=2e-3
        )


def test_a_softcap_on_infinite_logits(compare, draw) -> None:
    """tanh(-inf) = -1: a masked vocabulary entry comes back as -softcap, in the oracle as here."""
    logits = draw.normal(1, 3, 1, 70)
    logits[..., 3:60:2] = -torch.inf
    logits[..., 10] = torch.inf
    compare(logits, draw.integers(70, 1, 3), softcap=2.0)


def test_a_softcap_near_zero_logits_keeps_their_digits(compare, draw) -> None:
    """c tanh(x/c) computed through exp cancels where x is small; most logits are."""
    compare(draw.normal(1, 4, 2, 300, scale=1e-4), draw.integers(300, 1, 4), softcap=1e-2)
    compare(draw.normal(1, 4, 2, 300, scale=1.0), draw.integers(300, 1, 4), softcap=1.8)


@pytest.mark.parametrize("impl", ["triton"])  # the others call torch's tanh
def test_a_softcap_keeps_the_digits_of_every_logit(impl, device) -> None:
    """Relative error of c tanh(x/c) from 1e-30 to far beyond the cap: the log-sum-exp over one entry is its logit."""
    sizes = torch.logspace(-30, 5, 36, device=device)
    logits = torch.cat([sizes, -torch.linspace(1, 300, 24, device=device)]).view(1, -1, 1, 1)
    labels = torch.zeros(logits.shape[:2], dtype=torch.int64, device=device)
    _, stats = weighted_mtp_ce(logits, labels, shift=0, softcap=30.0, impl=impl, return_stats=True)
    exact = 30 * torch.tanh(logits.double() / 30).flatten()
    assert float((stats.lse.double().flatten() / exact - 1).abs().max()) < 5 * 2**-23


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_vocabulary_entries_of_minus_infinity(compare, draw, dtype, smoothing: float) -> None:
    """Masked classes: probability 0, gradient 0. With smoothing their share of the loss is Inf, in torch too."""
    logits = draw.normal(1, 5, 2, 300, dtype=dtype)
    logits[..., 7::3] = -torch.inf
    logits[0, 1, 0, :] = -torch.inf
    logits[0, 1, 0, 299] = 1.5  # one class left
    logits[0, 2, 1, :290] = -torch.inf  # whole vectors masked, then some left
    labels = torch.tensor([[0, 1, 299, 295, 3]], device=logits.device)
    if smoothing:
        assert compare(logits, labels, reduction="none", label_smoothing=smoothing).loss[0, 0] == torch.inf
    else:
        got = compare(logits, labels)
        assert bool((got.d_logits[0][..., 10][got.stats.live] == 0).all())


# What the entries of a row have added, but for every fourth, and the label's logit.
UNLIKELY = {
    "masked_vocabulary": (-1e4, 0.0),  # exp underflows to 0
    "peaked": (0.0, 30.0),
    "denormal": (0.0, 95.0),  # exp of all but the label is a denormal number
    "denormal_when_scaled": (0.0, 78.0),  # those are only the gradients
    "far_below": (-1e35, 0.0),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.01, "label_smoothing": 0.1}, {"softcap": 200.0}])
@pytest.mark.parametrize("name", UNLIKELY)
def test_probabilities_near_the_least_number(compare, draw, name: str, dtype: torch.dtype, options: dict) -> None:
    """Exponentials that underflow beside some that do not; a masked entry's gradient is exactly 0."""
    added, peak = UNLIKELY[name]
    V, masked = 300, torch.arange(300) % 4 != 0
    logits, labels = draw.normal(1, 5, 2, V, scale=3), draw.integers(V // 4, 1, 5) * 4
    logits[..., masked.to(logits.device)] += added
    for h in range(2):
        logits[0, torch.arange(4 - h), h, labels[0, 1 + h :]] += peak
    got = compare(logits.to(dtype), labels, draw.uniform(1, 5), **options)
    if added and not options:
        assert bool((got.d_logits[0][..., masked.to(logits.device)] == 0).all())


def test_a_label_of_minus_infinity_costs_infinity(compare, draw) -> None:
    """And its gradient is still p - 1 = -1 on the label: what torch says."""
    logits = draw.normal(1, 3, 1, 40)
    logits[0, 0, 0, 5] = -torch.inf
    got = compare(logits, torch.full((1, 3), 5, device=logits.device), reduction="none")
    assert got.loss[0, 0] == torch.inf
    assert math.isclose(got.d_logits[0][0, 0, 0, 5].item(), -1.0, rel_tol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("V", [3, 300])
def test_a_row_of_minus_infinity_everywhere(impl, draw, V: int) -> None:
    """lse = -inf, ce = NaN as in torch; the other rows keep their losses."""
    logits, labels = draw.normal(1, 4, 1, V), draw.integers(V, 1, 4)
    logits[0, 1] = -torch.inf
    loss, stats = weighted_mtp_ce(logits, labels, reduction="none", impl=impl, return_stats=True)
    assert stats.lse[0, 1, 0] == -torch.inf
    assert stats.ce[0, 1, 0].isnan()
    assert loss[0].isnan().tolist() == [False, True, False, False]


@pytest.mark.pairwise
@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothing"])
def test_large_logits_cost_no_digits_of_the_gradient(compare, draw, offset: float, options: dict) -> None:
    """lse itself is good to 1e-3 there; p = exp(z - lse) would be, too, if it were rounded to one fp32."""
    compare(draw.normal(2, 4, 2, 300, scale=3) + offset, draw.integers(300, 2, 4), draw.normal(2, 4), **options)


@pytest.mark.parametrize("offset", [1e4, -1e4, 65536.0])
def test_an_offset_of_all_logits_changes_nothing(impl, draw, offset: float) -> None:
    """Softmax is invariant; on a grid where the sum is exact, so are loss and gradient, bit for bit."""
    logits, labels = (draw.normal(1, 4, 2, 300) * 64).round() / 64, draw.integers(300, 1, 4)
    results = []
    for x in (logits, logits + offset):
        leaf = x.requires_grad_()
        loss = weighted_mtp_ce(leaf, labels, impl=impl)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_both_signs_of_large_logits_in_one_row(compare, draw) -> None:
    """exp never overflows: the maximum goes first, wherever it stands in the row."""
    for place in (0, 150, 299):
        logits = draw.normal(1, 4, 1, 300) * 3e3 - 1e4
        logits[..., place] = 1e4
        compare(logits, draw.integers(300, 1, 4))


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [12.0, 16.0, 20.0])
def test_a_sure_prediction_keeps_its_gradient(compare, draw, dtype, lead: float) -> None:
    """p > 0.999: p - 1 is subtracted in fp32 before it is rounded, so the half types keep 2 to 3 digits of it."""
    V = 300
    logits, labels = draw.normal(1, 6, 1, V, scale=0.1, dtype=dtype), draw.integers(V, 1, 6)
    target = labels[:, 1:]
    logits[0, torch.arange(5), 0, target[0]] = lead
    # A sum, so that fp16 has no use for a loss scale.
    got = compare(logits, labels, reduction="sum")
    p = torch.softmax(logits[0, :5, 0].double(), dim=-1)
    exact = p.gather(1, target.view(5, 1))[:, 0] - 1
    assert bool((exact > -1e-2).all())
    label_gradient = got.d_logits[0][0, :5, 0].gather(1, target.view(5, 1))[:, 0].double()
    # p is good to a few of the last bits of 1, then one rounding to the dtype.
    allowed = 4 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps * exact.abs()
    assert bool(((label_gradient - exact).abs() <= allowed).all())


@pytest.mark.pairwise
@pytest.mark.parametrize("smoothing", [0.05, 0.99])
@pytest.mark.parametrize("V", [2, 507])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_label_smoothing_is_that_of_torch(impl, draw, smoothing: float, V: int, offset: float) -> None:
    """F.cross_entropy(label_smoothing=...), to three times its error: it averages z - lse, so 1e4 costs it nothing."""
    logits, labels = draw.normal(2, 4, 1, V, scale=2) + offset, draw.integers(V, 2, 4)
    results = []
    for kind, dtype in (("ours", torch.float32), ("torch", torch.float32), ("exact", torch.float64)):
        x = logits.to(dtype).requires_grad_()
        if kind == "ours":
            loss = weighted_mtp_ce(x, labels, label_smoothing=smoothing, impl=impl)
        else:
            z, y = x[:, :-1, 0].flatten(0, 1), labels[:, 1:].flatten()
            loss = F.cross_entropy(z, y, label_smoothing=smoothing)
        results.append((loss.detach(), *torch.autograd.grad(loss, x)))
    for ours, theirs, exact in zip(*results, strict=True):
        error, peer = (float((value.double() - exact).abs().max()) for value in (ours, theirs))
        assert error <= 3 * peer + 4 * torch.finfo(torch.float32).eps * max(float(exact.abs().max()), 0.25)


def test_z_loss_is_the_squared_lse(impl, draw) -> None:
    """c lse^2 added to every row, nothing else changed; gradient 2 c lse p."""
    logits, labels = draw.normal(1, 5, 1, 200, scale=2).requires_grad_(), draw.integers(200, 1, 5)
    plain, stats = weighted_mtp_ce(logits, labels, reduction="none", impl=impl, return_stats=True)
    with_z = weighted_mtp_ce(logits, labels, reduction="none", z_loss=0.3, impl=impl)
    torch.testing.assert_close(with_z - plain, 0.3 * stats.lse[..., 0] ** 2, rtol=1e-5, atol=1e-6)
    (extra,) = torch.autograd.grad((with_z - plain).sum(), logits)
    p = torch.softmax(logits.detach(), dim=-1)
    torch.testing.assert_close(extra, 0.6 * stats.lse[..., None] * p, rtol=1e-4, atol=1e-6)


def test_smoothing_and_z_loss_do_not_enter_the_statistics(impl, draw) -> None:
    """ce is the plain cross entropy: what perplexity is made of."""
    logits, labels = draw.normal(1, 5, 2, 77), draw.integers(77, 1, 5)
    _, plain = weighted_mtp_ce(logits, labels, impl=impl, return_stats=True)
    _, stats = weighted_mtp_ce(logits, labels, label_smoothing=0.3, z_loss=1.0, impl=impl, return_stats=True)
    assert torch.equal(stats.ce, plain.ce)
    assert torch.equal(stats.lse, plain.lse)


def test_half_logits_are_summed_in_fp32(compare, draw) -> None:
    """1000 equal bf16 logits: a bf16 sum of exponentials stalls at 256."""
    for dtype in (torch.bfloat16, torch.float16):
        logits = draw.normal(1, 2, 1, 1000, dtype=dtype) * 0 + 3
        got = compare(logits, draw.integers(1000, 1, 2))
        assert math.isclose(got.loss.item(), math.log(1000), rel_tol=1e-6)


def test_gradients_below_the_range_of_half_types_do_not_poison(compare, draw) -> None:
    """1/N underflows fp16 gradients to 0, as in torch; nothing turns into NaN."""
    compare(draw.normal(1, 4, 1, 300, dtype=torch.float16), draw.integers(300, 1, 4), normalizer=1e9)
