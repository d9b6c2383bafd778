"""All options at once: 200 seeded cases, 800 in the slow tier, each implementation against the oracle in float64.

The seed is in the name of the test, and stands for the case: `pytest -k seed_17` replays it, with `-m ""` any seed.
"""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_ce import weighted_mtp_ce, weighted_mtp_linear_ce

CASES = 200
SEEDS = [*range(CASES), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(CASES, 800))]
# On, before and after the edges of vectors (4 and 8 elements) and of tiles.
VOCABULARIES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 127, 128, 129, 255, 256, 257, 300, 507, 511, 512, 513]
LARGE_VOCABULARIES = [1000, 1023, 1024, 1025, 1500, 2047, 2048, 2049, 2056, 3000]
# Arguments of `compare` alone.
NOT_OF_THE_CALL = ("upstream", "weights_gradient", "frozen")
DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16]


def draw_logits(rng: random.Random, draw, B: int, S: int, H: int, V: int, dtype: torch.dtype) -> Tensor | list[Tensor]:
    """Logits in one of the layouts that callers have."""
    scale = rng.choice([0.1, 1.0, 1.0, 5.0, 30.0])

    def normal(*shape: int) -> Tensor:
        return draw.normal(*shape, dtype=dtype, scale=scale)

    past = rng.randint(1, 9)
    layouts = {
        "contiguous": lambda: normal(B, S, H, V),
        "heads_first": lambda: normal(H, B, S, V).permute(1, 2, 0, 3),
        "sequence_first": lambda: normal(S, B, H, V).transpose(0, 1),
        "vocabulary_before_heads": lambda: normal(B, S, V, H).transpose(2, 3),
        "without_first_entries": lambda: normal(B, S, H, V + past)[..., past:],
        "without_last_entries": lambda: normal(B, S, H, V + past)[..., :V],
        "every_other_position": lambda: normal(B, 2 * S, H, V)[:, 1::2],
        "expanded_over_heads": lambda: normal(B, S, 1, V).expand(B, S, H, V),
        "list": lambda: [normal(B, S, V) for _ in range(H)],
        "tuple_of_slices": lambda: tuple(normal(B, S, V + past + h)[..., past : past + V] for h in range(H)),
        "list_of_transposed": lambda: [normal(S, B, V).transpose(0, 1) for _ in range(H)],
    }
    if H == 1:
        layouts["three_dimensions"] = lambda: normal(B, S, V)
    return layouts[rng.choice([*layouts])]()


def draw_weights(rng: random.Random, draw, B: int, S: int, H: int, alignment: str) -> Tensor | None:
    """Token weights in one of their forms; some of them 0, in half of the cases some negative."""
    forms = {
        "none": lambda: None,
        "positions": lambda: draw.normal(B, S),
        "transposed": lambda: draw.normal(S, B).T,
        "strided": lambda: draw.normal(B, 2 * S + 1)[:, 1::2],
        "expanded": lambda: draw.normal(B, 1).expand(B, S),
    }
    if alignment == "position":
        forms["rows"] = lambda: draw.normal(B, S, H)
        forms["rows_permuted"] = lambda: draw.normal(H, S, B).permute(2, 1, 0)
    weights = forms[rng.choice([*forms])]()
    if weights is None:
        return None
    weights = weights.to(rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    return weights if rng.random() < 0.5 else weights.relu()


def draw_sizes(rng: random.Random) -> tuple[int, int, int, int, torch.dtype]:
    """B, S, H, V and a dtype."""
    B, S, H = rng.choice([1, 1, 1, 2]), rng.choice([1, 2, 3, 4, 4, 5, 5, 6, 6]), rng.choice([1, 2, 2, 3])
    H = rng.choice([4, 5]) if S <= 3 and rng.random() < 0.3 else H
    V = rng.choice(LARGE_VOCABULARIES if rng.random() < 0.12 else VOCABULARIES)
    return B, S, H, V, rng.choice(DTYPES)


def draw_options(rng: random.Random, S: int) -> dict[str, Any]:
    """Options that are numbers and words."""
    return {
        "shift": rng.choice(
            [0, 0, 1, 1, 1, 1, 2, 3] if S > 2 else [0, 0, 0, 1, 1, 2] if S == 2 else [0, 0, 0, 0, 0, 1]
        ),
        "weight_alignment": rng.choice(["position", "target"]),
        "reduction": rng.choice(["mean", "mean", "sum", "none"]),
        "loss_scale": rng.choice([1.0, 1.0, 0.125, -2.5]),
        "softcap": rng.choice([None, None, None, 0.05, 2.0, 30.0]),
        "z_loss": rng.choice([0.0, 0.0, 1e-4, 0.3]),
        "label_smoothing": rng.choice([0.0, 0.0, 0.1, 0.6]),
        "ignore_index": rng.choice([-100, -100, -1, 0]),
    }


def draw_tokens(
    rng: random.Random, draw, B: int, S: int, H: int, V: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Labels below V // 2 and weights; every option that is a tensor is added to `options`."""
    left, halo = rng.choice([(0, 0)] * 7 + [(0, 1), (0, H), (0, H + 3), (1, 0), (H - 1, H), (H, 1), (2, 2)])
    options["left_halo"], T = left, left + S + halo
    labels = draw.integers(max(V // 2, 1), B, T)
    device = labels.device
    if rng.random() < 0.6:
        share = rng.choice([0.1, 0.2, 0.3, 0.5]) if rng.random() < 0.95 else 1.0
        labels[draw.uniform(B, T) - 0.1 < share] = options["ignore_index"]
    if rng.random() < 0.3:
        options["document_ids"] = draw.integers(2, B, T, dtype=rng.choice([torch.int64, torch.int32]))
        if rng.random() < 0.7:
            options["document_ids"] = options["document_ids"].sort(dim=1).values
    if rng.random() < 0.3:
        shortest = 0 if rng.random() < 0.2 else (T + 1) // 2
        options["seq_lens"] = draw.integers(T + 1, B, low=shortest, dtype=rng.choice([torch.int64, torch.int32]))
    options["head_reduction"] = rng.choice(["live", "live", "horizon", "target", "target"])
    if options["head_reduction"] != "horizon" and rng.random() < 0.3:
        options["head_weights"] = torch.tensor([1.0, 0.25, 0.0, 2.0, 0.5][:H], device=device)
    if options["reduction"] == "mean" and rng.random() < 0.3:
        normalizer = rng.choice([5.0, 3, 11.0])
        options["normalizer"] = torch.tensor(normalizer, device=device) if rng.random() < 0.5 else normalizer
    if options["reduction"] == "none":
        # A dead position has an upstream like any other; some live ones have none.
        options["upstream"] = rng.choice(
            [draw.normal(B, S), draw.normal(S, B).T.relu(), draw.normal(1, 1).expand(B, S)]
        )
    else:
        options["upstream"] = rng.choice([None, None, -0.5, 3.0])
    alignment = options["weight_alignment"]
    weights = draw_weights(rng, draw, B, T if alignment == "target" else S, H, alignment)
    options["weights_gradient"] = rng.random() < 0.6
    labels = labels.to(rng.choice([torch.int64, torch.int64, torch.int32, torch.int16]))
    return labels if rng.random() < 0.7 else labels.T.contiguous().T, weights


def draw_case(seed: int, draw) -> SimpleNamespace:
    """Tensors and options of one case on logits."""
    rng = random.Random(seed)
    draw.generator.manual_seed(seed)
    B, S, H, V, dtype = draw_sizes(rng)
    options = draw_options(rng, S)
    logits = draw_logits(rng, draw, B, S, H, V, dtype)
    # Labels lie below the entries that may be -inf.
    if options["label_smoothing"] == 0 and rng.random() < 0.15:
        for part in [logits] if isinstance(logits, Tensor) else logits:
            part[..., V // 2 + 1 :: 3] = -torch.inf
    elif dtype == torch.float32 and rng.random() < 0.1 and isinstance(logits, Tensor) and logits.stride(2) != 0:
        logits += rng.choice([1e4, -1e4])
    labels, weights = draw_tokens(rng, draw, B, S, H, V, options)
    return SimpleNamespace(given=logits, labels=labels, weights=weights, options=options)


def draw_hidden(rng: random.Random, draw, B: int, S: int, H: int, D: int, dtype: torch.dtype) -> Tensor | list[Tensor]:
    """Hidden states in one of the layouts that callers have."""

    def normal(*shape: int) -> Tensor:
        return draw.normal(*shape, dtype=dtype)

    layouts = {
        "contiguous": lambda: normal(B, S, H, D),
        "heads_first": lambda: normal(H, B, S, D).permute(1, 2, 0, 3),
        "sequence_first": lambda: normal(S, B, H, D).transpose(0, 1),
        "features_first": lambda: normal(D, H, S, B).permute(3, 2, 1, 0),
        "every_other_position": lambda: normal(B, 2 * S, H, D + 1)[:, 1::2, :, 1:],
        "expanded_over_heads": lambda: normal(B, S, 1, D).expand(B, S, H, D),
        "list": lambda: [normal(B, S, D) for _ in range(H)],
        "tuple_of_slices": lambda: normal(B, S, H, D).unbind(2),
        "list_of_layouts": lambda: [normal(S, B, D + h).transpose(0, 1)[..., h:] for h in range(H)],
    }
    if H == 1:
        layouts["three_dimensions"] = lambda: normal(B, S, D)
    return layouts[rng.choice([*layouts])]()


def read_rows(hidden: Tensor | list[Tensor], labels: Tensor, weights: Tensor | None, options: dict[str, Any]) -> int:
    """How many rows there are to read: of weight 0 only where the gradient of the weights is wanted."""
    plain = {name: value for name, value in options.items() if name not in NOT_OF_THE_CALL}
    if weights is not None:
        weights = weights.detach().requires_grad_(options["weights_gradient"])
    loss = weighted_mtp_linear_ce(
        hidden, labels=labels, token_weights=weights, impl="reference", return_stats=True, **plain
    )
    return int((loss.stats.top1 >= 0).sum())


def draw_linear_case(seed: int, draw) -> SimpleNamespace:
    """The same on hidden states: beside the options of the loss, those of the linear path."""
    rng = random.Random(seed)
    draw.generator.manual_seed(seed)
    B, S, H, V, dtype = draw_sizes(rng)
    S += rng.choice([0, 3])  # rows for several chunks
    D = rng.choice([1, 2, 7, 8, 16, 17, 33])
    options = draw_options(rng, S)
    hidden = draw_hidden(rng, draw, B, S, H, D, dtype)
    scale = rng.choice([0.1, 1.0, 1.0, 3.0]) / D**0.5
    options["unembed"] = rng.choice([
        lambda: draw.normal(V, D, dtype=dtype, scale=scale),
        lambda: draw.normal(D, V, dtype=dtype, scale=scale).T,
        lambda: draw.normal(V + 3, D + 2, dtype=dtype, scale=scale)[:V, 2:],
    ])()  # fmt: skip
    if rng.random() < 0.5:
        options["bias"] = draw.normal(V, dtype=dtype) if rng.random() < 0.7 else draw.normal(V, 2, dtype=dtype)[:, 1]
        if options["label_smoothing"] == 0 and rng.random() < 0.3:
            options["bias"][V // 2 + 1 :: 3] = -torch.inf
    labels, weights = draw_tokens(rng, draw, B, S, H, V, options)
    options["frozen"] = [name for name in ("hidden", "unembed", "bias") if rng.random() < 0.15]
    options["grad_dtype"] = rng.choice([torch.float32, torch.float32, torch.float64])
    rows = rng.choice([1, 2, 3, rng.randint(2, 5), rng.randint(2, 9), B * S * H, 1000, None])
    if rows is not None:
        # Part of a row of bytes left over.
        options["chunk_bytes"] = (rows * V + rng.randint(0, V - 1)) * dtype.itemsize
    spare = rng.choice([None, None, None, 0, rng.randint(1, 20)])
    if spare is None:
        options["drop_dead_rows"] = rng.choice(["auto", True, False])
    else:
        options["drop_dead_rows"] = read_rows(hidden, labels, weights, options) + spare
    options["logits_dtype"] = rng.choice([None, None, torch.float32])
    if rows is not None and options["logits_dtype"] is not None:
        options["chunk_bytes"] *= 4 // dtype.itemsize
    return SimpleNamespace(given=hidden, labels=labels, weights=weights, options=options)


def halos(case: SimpleNamespace) -> set[str]:
    """Which halos the labels of a case have."""
    S = case.given.shape[1] if isinstance(case.given, Tensor) else case.given[0].shape[1]
    left = case.options["left_halo"]
    return {name for name, size in (("left_halo", left), ("halo", case.labels.shape[1] - left - S)) if size}


def check(function: Any, draw_one: Any, seed: int, compare_all) -> None:
    """All results of a case by their errors, and in some cases the loss of a call that wants nothing else."""
    for impl, case, got in compare_all(lambda draw: draw_one(seed, draw)):
        if seed % 4 == 0:
            options = {name: value for name, value in case.options.items() if name not in NOT_OF_THE_CALL}
            with torch.no_grad():
                alone = function(case.given, labels=case.labels, token_weights=case.weights, impl=impl, **options)
            assert torch.equal(alone, got.loss)


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed_{seed}")
def test_any_mixture_of_options_errs_at_most_three_times_as_much_as_torch(seed: int, compare_all) -> None:
    """loss, d_logits, d_token_weights, ce, lse by the error; live and top1 exactly; the same loss without stats."""
    check(weighted_mtp_ce, draw_case, seed, compare_all)


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed_{seed}")
def test_any_mixture_on_hidden_states_errs_at_most_three_times_as_much_as_torch(seed: int, compare_all) -> None:
    """The same for d_hidden, d_unembed, d_bias, in chunks of every size, with masked rows left out or not."""
    check(weighted_mtp_linear_ce, draw_linear_case, seed, compare_all)


@pytest.mark.parametrize("impl", ["cpu"])
@pytest.mark.parametrize(
    ("function", "draw_one"), [(weighted_mtp_ce, draw_case), (weighted_mtp_linear_ce, draw_linear_case)]
)
def test_the_cases_reach_every_corner(impl, draw, function, draw_one) -> None:
    """No option is there in name only: each value is drawn, and most cases have rows that are live and some dead."""
    cases = [draw_one(seed, draw) for seed in range(CASES)]
    for name in ("document_ids", "seq_lens", "head_weights", "normalizer"):
        assert sum(name in case.options for case in cases) >= 20, name
    for name in ("head_reduction", "softcap", "z_loss", "label_smoothing", "shift", "ignore_index", "loss_scale"):
        assert len({case.options[name] for case in cases}) >= 3, name
    for sizes in ({"left_halo", "halo"}, {"halo"}, {"left_halo"}):
        assert sum(halos(case) == sizes for case in cases) >= 10, sizes
    live, chunked = [], 0
    for case in cases:
        options = {name: value for name, value in case.options.items() if name not in NOT_OF_THE_CALL}
        _, stats = function(
            case.given, labels=case.labels, token_weights=case.weights, impl="reference", return_stats=True, **options
        )
        live.append(stats.live.float().mean().item())
        if "unembed" in options:
            row_bytes = options["unembed"].shape[0] * options["unembed"].element_size()
            chunked += 0 < options.get("chunk_bytes", 2**60) // row_bytes < int((stats.top1 >= 0).sum())
    assert sum(share > 0 for share in live) >= 0.7 * CASES
    assert sum(0 < share < 1 for share in live) >= 0.5 * CASES
    if function is weighted_mtp_linear_ce:
        assert chunked >= CASES / 4
        numbers = [case.options["drop_dead_rows"] for case in cases]
        assert sum(number is True for number in numbers) >= 20
        assert sum(number is False for number in numbers) >= 20
        assert sum(not isinstance(number, (bool, str)) for number in numbers) >= 60
        assert sum(c.options["logits_dtype"] is not None and c.options["unembed"].itemsize == 2 for c in cases) >= 20
        for name in ("hidden", "unembed", "bias"):
            assert sum(name in case.options["frozen"] for case in cases) >= 20, name
