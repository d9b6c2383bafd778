"""normalize_weights: mean 1 and bounds together, on every scope, whatever the scores are."""

from __future__ import annotations

import json
import math
import random
import socket
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mtp_ce import normalize_weights

SHAPES = [(1, 1), (2, 17), (3, 64), (4, 257)]


def draw_scores(seed: int) -> tuple[Tensor, Tensor]:
    """Scores of Student's t with 3 degrees of freedom, some of them planted to be awkward; 70 % supervised."""
    generator = torch.Generator().manual_seed(seed)
    shape = SHAPES[seed % 4]
    normal, three = (torch.randn(*n, *shape, generator=generator) for n in ((), (3,)))
    scores = normal / three.square().mean(0).sqrt()
    if seed % 5 == 0:
        scores[0, 0] = 1e6
    if seed % 7 == 0:
        scores = scores * 1e6 + 1e6
    if seed % 11 == 0:
        scores[:] = 3.3
    supervised = torch.rand(shape, generator=generator) < 0.7
    if seed % 13 == 0:
        scores[0, -1], supervised[0, -1] = (math.nan, math.inf, -math.inf)[seed % 3], True
    return scores, supervised


def options_of(seed: int) -> dict[str, float]:
    return {
        "temperature": (0.7, 0.1, 2.0, 0.01)[seed % 4],
        "eps": (0.05, 0.0, 0.5, 1.0)[seed // 4 % 4],
        "w_max": (3.0, 1.0, 1.5, 50.0)[seed // 16 % 4],
    }


def broken_scopes(weights: Tensor, supervised: Tensor, scope: str, eps: float, w_max: float) -> int:
    """How many scopes miss mean 1 +- 1e-5 or a bound."""
    rows = range(len(weights)) if scope == "sequence" else [slice(None)]
    broken = 0
    for row in rows:
        w = weights[row][supervised[row]].double()
        if len(w):
            held = abs(float(w.mean()) - 1) <= 1e-5 and w.min() >= eps - 1e-6 and w.max() <= w_max + 1e-6
            broken += not held
    return broken


def clip_and_rescale(scores: Tensor, supervised: Tensor, temperature: float, eps: float, w_max: float) -> Tensor:
    """What others do: the control that the test can fail."""
    s = scores[supervised]
    u = ((s - s.mean()) / s.std(correction=0) / temperature).softmax(0) * len(s)
    clipped = u.clamp(eps, w_max)
    weights = torch.zeros_like(scores)
    weights[supervised] = clipped / clipped.mean()
    return weights


@pytest.mark.parametrize("scope", ["sequence", "batch", "global"])
def test_mean_and_bounds_hold_together_on_1000_heavy_tailed_cases(scope: str) -> None:
    for seed in range(1000):
        scores, supervised = draw_scores(seed)
        options = options_of(seed)
        weights, statistics = normalize_weights(scores, supervised, scope=scope, **options)
        assert not broken_scopes(weights, supervised, scope, options["eps"], options["w_max"]), seed
        assert (weights[~supervised] == 0).all()
        assert not weights.requires_grad
        assert weights.dtype == torch.float32
        assert int(statistics.neutral) == int((supervised & ~scores.isfinite())[:, 1:].sum()), (
            "nothing predicts the first"
        )


def test_clipping_and_rescaling_fails_the_same_test() -> None:
    failed = 0
    for seed in range(1, 1000, 5):
        scores, supervised = draw_scores(seed)
        if seed % 7 and seed % 11 and seed % 13 and supervised.sum() > 10:
            weights = clip_and_rescale(scores, supervised, 0.7, 0.05, 3.0)
            failed += broken_scopes(weights, supervised, "batch", 0.05, 3.0)
    assert failed > 50


def weights_by_bisection(scores: list[float], temperature: float, eps: float, w_max: float) -> list[float]:
    """The definition: clip(c u, eps, w_max) with the c of mean 1, found by halving an interval of log c."""
    n = len(scores)
    mean = math.fsum(scores) / n
    std = math.sqrt(math.fsum((s - mean) ** 2 for s in scores) / n)
    exponents = [(s - mean) / (std or 1.0) / temperature for s in scores]

    def clipped(log_c: float) -> list[float]:
        return [min(w_max, max(eps, math.exp(max(-745.0, min(700.0, log_c + e))))) for e in exponents]

    lowest, highest = -max(exponents) - 800, -min(exponents) + 800
    for _ in range(100):
        middle = (lowest + highest) / 2
        lowest, highest = (middle, highest) if math.fsum(clipped(middle)) < n else (lowest, middle)
    return clipped(highest)


def test_few_tokens_at_every_corner_are_the_definition() -> None:
    """eps 0 or lost beside 1, k tokens at w_max that take everything, temperatures that leave one token nothing."""
    draw = random.Random(0)
    for case in range(700):
        n = draw.randint(1, 9)
        scale = 10.0 ** draw.randint(-3, 6)
        scores = [draw.choice([draw.randint(0, 3), draw.gauss(0, 1), draw.gauss(0, scale)]) for _ in range(n)]
        temperature = draw.choice([0.7, 0.1, 0.01, 0.001, 1e-4, 2.0, 50.0])
        eps = draw.choice([0.0, 0.0, 1e-300, 1e-17, 1e-16, 1e-8, 0.05, 0.5, 1.0])
        w_max = draw.choice([n / draw.randint(1, n), n / draw.randint(1, n), 1.0, 1.5, 3.0, 50.0])
        expected = torch.tensor([weights_by_bisection(scores, temperature, eps, w_max)])
        given = torch.tensor([scores], dtype=torch.float64)
        supervised = torch.ones(1, n, dtype=torch.bool)
        weights, _ = normalize_weights(given, supervised, temperature=temperature, eps=eps, w_max=w_max)
        assert torch.allclose(weights, expected, rtol=0, atol=1e-5), (case, scores, temperature, eps, w_max)
        assert not broken_scopes(weights, supervised, "batch", eps, w_max), case


def test_tokens_at_the_upper_bound_that_take_everything_keep_it() -> None:
    """2 of 3 tokens at 1.5: the third one's share is lost in the last bit of the sum, and they are not."""
    three, four = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    options = {"eps": 0.0, "w_max": 1.5}
    weights, _ = normalize_weights(three, three >= 0, temperature=0.01, **options)
    assert weights.tolist() == [[0.0, 1.5, 1.5]]
    # What is left goes to the next token, not to all others alike.
    weights, _ = normalize_weights(four, four >= 0, temperature=0.001, **options)
    assert weights.tolist() == [[0.0, 1.0, 1.5, 1.5]]


def test_higher_scores_never_weigh_less() -> None:
    for seed in range(60):
        scores, supervised = draw_scores(seed)
        finite = supervised & scores.isfinite()
        weights, _ = normalize_weights(scores, supervised, scope="batch", **options_of(seed))
        in_order = weights[finite][scores[finite].argsort(stable=True)]
        assert (in_order.diff() >= -1e-6).all()


def test_weights_between_the_bounds_are_softmax_weights() -> None:
    """log w falls by dz / T from token to token, which is the definition of T."""
    scores = torch.tensor([[0.0, 0.3, 0.5, 1.0, 4.0]])
    weights, _ = normalize_weights(scores, torch.ones(1, 5, dtype=torch.bool), temperature=2.0, eps=0.0, w_max=50.0)
    z = (scores - scores.mean()) / scores.std(correction=0)
    assert torch.allclose(weights, (z / 2.0).softmax(-1) * 5, rtol=1e-6)


def test_equal_scores_one_token_and_no_token() -> None:
    for value in (0.0, 1e6, -3.3, 1e-30):
        weights, _ = normalize_weights(torch.full((2, 9), value), torch.ones(2, 9, dtype=torch.bool))
        assert torch.equal(weights, torch.ones(2, 9))
    one = torch.zeros(1, 9, dtype=torch.bool)
    one[0, 4] = True
    assert normalize_weights(torch.randn(1, 9), one).weights.tolist() == [[0, 0, 0, 0, 1, 0, 0, 0, 0]]
    weights, statistics = normalize_weights(torch.randn(1, 9), torch.zeros(1, 9, dtype=torch.bool))
    assert torch.equal(weights, torch.zeros(1, 9))
    assert (int(statistics.count), float(statistics.mean), float(statistics.ess)) == (0, 0, 0)
    for shape in ((0, 5), (3, 0)):
        assert normalize_weights(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)).weights.shape == shape


def test_one_outlier_of_a_million_tokens_breaks_nothing() -> None:
    """Its z is 447, and exp(447 / 0.7) is no double."""
    scores = torch.zeros(1, 200_000)
    scores[0, 5] = 1e6
    weights, statistics = normalize_weights(scores, torch.ones_like(scores, dtype=torch.bool))
    assert float(weights.double().mean()) == pytest.approx(1, abs=1e-6)
    assert (float(statistics.max), weights[0, 5].item()) == (3.0, 3.0)


def test_a_documents_weights_do_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    scores, supervised = torch.randn(2, 30), torch.rand(2, 30) < 0.8
    document_ids = torch.tensor([[0] * 8 + [1] * 12 + [2] * 10, [5] * 30])
    before, _ = normalize_weights(scores, supervised, document_ids=document_ids)
    scores[0, :8], scores[0, 20:], scores[1] = 100 * torch.randn(8), 1e6, torch.randn(30)
    after, _ = normalize_weights(scores, supervised, document_ids=document_ids)
    assert torch.equal(before[0, 8:20], after[0, 8:20])
    alone, _ = normalize_weights(scores[:1, 8:20], supervised[:1, 8:20])
    assert torch.equal(alone[0], after[0, 8:20])
    assert float(after[0, 8:20].sum() / supervised[0, 8:20].sum()) == pytest.approx(1, abs=1e-6)


def test_topk_keeps_the_top_share_and_gives_it_everything() -> None:
    scores = torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0, 0.0, 9.0, 9.0, -1.0, -2.0]])
    supervised = torch.ones(1, 10, dtype=torch.bool)
    weights, _ = normalize_weights(scores, supervised, mode="topk", top_fraction=0.3)
    assert weights.tolist()[0] == pytest.approx([10 / 3, 0, 0, 0, 0, 0, 10 / 3, 10 / 3, 0, 0])
    supervised[0, 6] = False
    scores[0, 7] = math.nan
    weights, statistics = normalize_weights(scores, supervised, mode="topk", top_fraction=0.25)
    assert weights.tolist()[0] == pytest.approx([4, 0, 4, 0, 0, 0, 0, 1, 0, 0])
    assert (float(statistics.mean), int(statistics.neutral), int(statistics.clipped)) == (1, 1, 0)


def test_statistics_count_the_tokens_at_a_bound() -> None:
    scores = torch.tensor([[0.0] * 20 + [1e3]])
    weights, statistics = normalize_weights(scores, torch.ones(1, 21, dtype=torch.bool), w_max=2.0)
    assert int(statistics.clipped) == 1
    assert float(statistics.ess) == pytest.approx(21 / float(weights.square().sum()))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"scores": [[1.0]]}, TypeError, "scores is list; expected"),
        ({"scores": torch.zeros(1, 4, dtype=torch.int64)}, TypeError, "scores is torch.int64; expected"),
        ({"scores": torch.zeros(4)}, ValueError, "scores is [4]; expected [B, S]"),
        ({"supervised": torch.ones(1, 4)}, TypeError, "supervised is torch.float32; expected"),
        ({"supervised": torch.ones(1, 5, dtype=torch.bool)}, ValueError, "supervised is [1, 5]; expected [1, 4]"),
        ({"document_ids": torch.zeros(4)}, ValueError, "document_ids is [4]; expected [1, 4]"),
        ({"mode": "hard"}, ValueError, "mode is 'hard'; expected"),
        ({"scope": "world"}, ValueError, "scope is 'world'; expected"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0; expected"),
        ({"temperature": math.nan}, ValueError, "temperature is nan; expected"),
        ({"eps": 1.5}, ValueError, "eps is 1.5; expected"),
        ({"eps": -0.1}, ValueError, "eps is -0.1; expected"),
        ({"w_max": 0.9}, ValueError, "w_max is 0.9; expected"),
        ({"w_max": math.inf}, ValueError, "w_max is inf; expected"),
        ({"top_fraction": 0.0}, ValueError, "top_fraction is 0.0; expected"),
        ({"group": object()}, ValueError, "group is given with scope='sequence'; expected"),
    ],
)
def test_bad_input_names_the_argument(wrong, error, message) -> None:
    good = {"scores": torch.zeros(1, 4), "supervised": torch.ones(1, 4, dtype=torch.bool)}
    with pytest.raises(error) as raised:
        normalize_weights(**{**good, **wrong})
    assert message in str(raised.value)


def test_scope_global_is_one_batch_over_two_ranks() -> None:
    """Four rows on one rank or two on each of two: the same weights, NaN and all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen([sys.executable, __file__, rank, port], stdout=subprocess.PIPE, text=True) for rank in "01"
    ]
    parts = [json.loads(rank.communicate(timeout=300)[0].splitlines()[-1]) for rank in ranks]
    scores, supervised = draw_scores(39)
    whole, _ = normalize_weights(scores, supervised, scope="batch")
    assert len(whole) == 4
    assert torch.equal(torch.tensor(parts[0]["weights"] + parts[1]["weights"]), whole)
    assert sum(part["neutral"] for part in parts) == int((supervised & ~scores.isfinite())[:, 1:].sum())


def main(rank: int, port: str) -> None:
    """One of two ranks: its half of the rows."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    scores, supervised = (x[2 * rank : 2 * rank + 2] for x in draw_scores(39))
    weights, statistics = normalize_weights(scores, supervised, scope="global")
    torch.distributed.destroy_process_group()
    print(json.dumps({"weights": weights.tolist(), "neutral": int(statistics.neutral)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
